"""To and from networks with `flax.linen.BatchNorm`."""

import re
from collections.abc import Mapping
from typing import Any

import flax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from mbn_jax.core.batch_stats import (
    inference_statistics,
    map_layers,
    moments_shape,
    with_moments,
)
from mbn_jax.core.moments import Array, Moments

PyTree = Any

NAMES = ("MemorizedBatchNorm", "BatchRenorm", "VirtualBatches")
"""Classes by which flax names the layers that stand where a `BatchNorm` could."""


def to_batch_norm(variables: PyTree) -> PyTree:
    """Folds trained statistics into variables for the same network with `flax.linen.BatchNorm`.

    Its output at inference is the same: a memory becomes its pooled mean and variance, by the rule
    that it recorded in training. Layers that flax named by their class are renamed,
    `MemorizedBatchNorm_0` to `BatchNorm_0`.

    Args:
      variables: 'params' and 'batch_stats' of the trained network.

    Returns:
      The variables for the network with `BatchNorm` of the same `epsilon`.

    Raises:
      ValueError: where two layers would get one name.

    >>> import jax
    >>> from mbn_jax import MemorizedBatchNorm
    >>> layer = MemorizedBatchNorm(memory_size=2, decay=1.0, use_running_average=False)
    >>> variables = layer.init(jax.random.key(0), jnp.zeros((2, 1)))
    >>> for x in (jnp.array([[0.0], [2.0]]), jnp.array([[2.0], [4.0]])):
    ...     _, updates = layer.apply(variables, x, mutable=['batch_stats'])
    ...     variables = {**variables, **updates}
    >>> {name: x.tolist() for name, x in to_batch_norm(variables)['batch_stats'].items()}
    {'mean': [2.0], 'var': [2.0]}
    """

    def fold(path: tuple[str, ...], stats: PyTree) -> PyTree:
        try:
            mean, var = inference_statistics(stats)
        except ValueError as error:
            raise ValueError(f"The layer {'/'.join(path)} cannot be folded: {error}") from error
        return {"mean": mean, "var": var}

    _check_names(variables)
    batch_stats = map_layers(fold, variables.get("batch_stats", {}))
    return _named_as_batch_norm({**variables, "batch_stats": batch_stats})


def from_batch_norm(batch_norm: PyTree, variables: PyTree) -> PyTree:
    """Starts a network from a checkpoint of the same one with `flax.linen.BatchNorm`.

    Parameters are taken over as they are. The moving averages become the first slot of a memory and
    leave it as newer batches come; in a memory without end they count as one batch. At inference
    the output is that of the checkpoint.

    Args:
      batch_norm: 'params' and 'batch_stats' of the checkpoint.
      variables: what `init` of the new network returned.

    Returns:
      Variables of the tree of `variables`.

    Raises:
      ValueError: where the two are not of the same network, naming what differs.

    >>> import jax
    >>> from flax import linen as nn
    >>> from mbn_jax import MemorizedBatchNorm
    >>> x = jnp.zeros((2, 1))
    >>> trained = nn.BatchNorm(use_running_average=True).init(jax.random.key(0), x)
    >>> layer = MemorizedBatchNorm(memory_size=3, use_running_average=True)
    >>> fresh = layer.init(jax.random.key(0), x)
    >>> from_batch_norm(trained, fresh)['batch_stats']['count'][:, 0].tolist()
    [1.0, 0.0, 0.0]
    """

    def renamed(path: tuple[str, ...]) -> str:
        return "/".join(map(_batch_norm_name, path))

    def contents(tree: PyTree) -> tuple[dict[str, PyTree], dict[str, Array]]:
        """Returns the statistics of layers, and all other arrays, by path."""
        _check_names(tree)
        layers, others = {}, {}
        map_layers(
            lambda path, stats: layers.update({renamed(path): stats}),
            {"batch_stats": tree.get("batch_stats", {})},
            lambda path, x: others.update({renamed(path): x}),
        )
        rest = {name: child for name, child in tree.items() if name != "batch_stats"}
        others |= {renamed(path): x for path, x in flatten_dict(flax.core.unfreeze(rest)).items()}
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
        found = old_layers[renamed(path)]
        mean, var = jnp.asarray(found["mean"]), jnp.asarray(found["var"])
        expected = moments_shape(layer_stats)
        if mean.shape != expected:
            raise ValueError(
                f"The checkpoint must be of the same network with BatchNorm; {'/'.join(path)} "
                f"expected statistics of shape {expected}, got {mean.shape}."
            )
        return with_moments(layer_stats, Moments(mean, var, jnp.ones_like(var)))

    batch_stats = {"batch_stats": variables.get("batch_stats", {})}
    started = map_layers(start, batch_stats, lambda path, _: old[renamed(path)])
    rest = {name: child for name, child in variables.items() if name != "batch_stats"}
    paths = flatten_dict(flax.core.unfreeze(rest))
    return {**unflatten_dict({path: old[renamed(path)] for path in paths}), **started}


def _batch_norm_name(name: str) -> str:
    # Lifted transforms put their own name in front: VmapMemorizedBatchNorm_0.
    return re.sub(rf"(?:{'|'.join(NAMES)})(?=_\d+$)", "BatchNorm", name)


def _named_as_batch_norm(tree: PyTree) -> PyTree:
    """Renames layers; `tree` has passed `_check_names`."""
    if not isinstance(tree, Mapping):
        return tree
    return {_batch_norm_name(name): _named_as_batch_norm(child) for name, child in tree.items()}


def _check_names(tree: PyTree) -> None:
    """Raises ValueError where two layers would get one name."""
    if not isinstance(tree, Mapping):
        return
    if len(set(map(_batch_norm_name, tree))) < len(tree):
        raise ValueError(
            f"Renamed to BatchNorm, two layers of {sorted(tree)} would have one name; give the "
            "normalization layers of the network names of their own."
        )
    for child in tree.values():
        _check_names(child)
