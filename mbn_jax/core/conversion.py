"""Statistics of a network from those of the same one with `BatchNorm`, and into them."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from mbn_jax.core.batch_stats import (
    inference_statistics,
    map_layers,
    moments_shape,
    with_moments,
)
from mbn_jax.core.moments import Array, Moments

PyTree = Any


def folded(batch_stats: PyTree) -> PyTree:
    """Returns `batch_stats` with the mean and variance at inference in place of each layer's.

    >>> ones = jnp.ones(1)
    >>> stats = {'norm': {'mean': ones, 'var': ones, 'weight': ones, 'rule': jnp.ones(2)}}
    >>> sorted(folded(stats)['norm'])
    ['mean', 'var']
    """

    def fold(path: tuple[str, ...], stats: PyTree) -> PyTree:
        try:
            mean, var = inference_statistics(stats)
        except ValueError as error:
            raise ValueError(f"The layer {'/'.join(path)} cannot be folded: {error}") from error
        return {"mean": mean, "var": var}

    return map_layers(fold, batch_stats)


def started_from(
    batch_norm: PyTree,
    variables: PyTree,
    renamed: Callable[[str], str] = lambda name: name,
    are_statistics: Callable[[tuple[str, ...]], bool] = lambda path: True,
) -> PyTree:
    """Returns `variables` with the arrays of a network with `BatchNorm`.

    Its averages become the first slot of a memory, or count as one batch.

    Args:
      batch_norm: nested dicts of arrays of the network with `BatchNorm`.
      variables: those of the new network.
      renamed: gives the name in `batch_norm` of each name in `variables`.
      are_statistics: as for `map_layers`.

    Raises:
      ValueError: where the two are not of the same network, naming what differs.
    """

    def name(path: tuple[str, ...]) -> str:
        return "/".join(map(renamed, path))

    def contents(tree: PyTree) -> tuple[dict[str, PyTree], dict[str, Array]]:
        """Returns the statistics of layers and all other arrays, by path."""
        layers, others = {}, {}
        map_layers(
            lambda path, stats: layers.update({name(path): stats}),
            tree,
            lambda path, x: others.update({name(path): x}),
            are_statistics,
        )
        return layers, others

    (old_layers, old), (layers, new) = contents(batch_norm), contents(variables)
    shapes = ({(path, jnp.shape(x)) for path, x in others.items()} for others in (old, new))
    differing = {path for path, _ in set.symmetric_difference(*shapes)}
    differing |= set(old_layers) ^ set(layers)
    if differing:
        raise ValueError(
            "The checkpoint must be of the same network with BatchNorm, and differs in "
            f"{', '.join(sorted(differing)[:5])}{' and more' if len(differing) > 5 else ''}."
        )

    def start(path: tuple[str, ...], layer_stats: PyTree) -> PyTree:
        found = old_layers[name(path)]
        mean, var = jnp.asarray(found["mean"]), jnp.asarray(found["var"])
        expected = moments_shape(layer_stats)
        if mean.shape != expected:
            raise ValueError(
                f"The checkpoint must be of the same network with BatchNorm; {'/'.join(path)} "
                f"expected statistics of shape {expected}, got {mean.shape}."
            )
        return with_moments(layer_stats, Moments(mean, var, jnp.ones_like(var)))

    return map_layers(start, variables, lambda path, _: old[name(path)], are_statistics)
