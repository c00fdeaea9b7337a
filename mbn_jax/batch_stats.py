"""What can be done to a `batch_stats` collection beside training: read, pool, fill and fold it.

Works on the collections of `MemorizedBatchNorm`, `BatchRenorm` and `flax.linen.BatchNorm`, alone or
in `VirtualBatches`.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mbn_jax.memory import Slots, memory_rule
from mbn_jax.statistics import Array, Moments, Schedule, pool_groups

PyTree = Any

NAMES = ("MemorizedBatchNorm", "AveragedBatchNorm", "BatchRenorm", "VirtualBatches")
"""Classes by which flax names the layers that stand where a `BatchNorm` could."""


def layers_with_statistics(batch_stats: PyTree) -> dict[str, PyTree]:
    """Returns what each layer keeps in `batch_stats`, by the layer's path.

    >>> list(layers_with_statistics({'block': {'norm': {'mean': 0, 'var': 1}}}))
    ['block/norm']
    """
    layers: dict[str, PyTree] = {}

    def keep(path: tuple[str, ...], stats: PyTree) -> PyTree:
        layers["/".join(path)] = stats
        return stats

    map_layers(keep, batch_stats)
    return layers


def map_layers(
    function: Callable[[tuple[str, ...], PyTree], PyTree],
    batch_stats: PyTree,
    others: Callable[[tuple[str, ...], Array], Any] = lambda _, x: x,
) -> PyTree:
    """Returns `batch_stats` with `function(path, statistics)` in place of each layer's.

    Args:
      function: of the names that lead to a layer, and of what it keeps.
      batch_stats: nested dicts.
      others: of the names that lead to an array that belongs to no such layer, and of it.

    >>> map_layers(lambda path, stats: stats['mean'], {'a': {'norm': {'mean': 0, 'var': 1}}})
    {'a': {'norm': 0}}
    """

    def visit(path: tuple[str, ...], tree: PyTree) -> PyTree:
        if not isinstance(tree, Mapping):
            return others(path, tree)
        if {"mean", "var"} <= set(tree) and not isinstance(tree["mean"], Mapping):
            return function(path, tree)  # Not a module with layers of these names.
        return {name: visit((*path, name), child) for name, child in tree.items()}

    return visit((), batch_stats)


def inference_statistics(
    layer_stats: PyTree, memory_size: Schedule, decay: Schedule
) -> tuple[Array, Array]:
    """Returns (mean, var) that one layer normalizes by at inference.

    Args:
      layer_stats: what the layer keeps in `batch_stats`: a memory, or moving averages.
      memory_size: of a memory.
      decay: of a memory.
    """
    mean, var = layer_stats["mean"], layer_stats["var"]
    if "count" not in layer_stats:
        return mean, var
    slots = Moments(mean, var, layer_stats["count"])
    last = jnp.maximum(layer_stats.get("steps", 0) - 1, 0)
    mean, var, _ = Slots(*memory_rule(memory_size, decay, last)).pooled(slots)
    return mean, var


def pool_batch_stats(batch_stats: PyTree) -> PyTree:
    """Pools statistics that devices, or virtual batches, keep for themselves into those of all.

    By the law of total variance, wherever a layer keeps a `mean` beside a `var`: weighted by its
    `count` or `weight` if it has one (a memory, slot by slot), else equally. An average of
    variances would lose the spread between the groups. Counts are of examples and add up. Other
    floating-point arrays are averaged, a `weight` (in batches, of which each group saw a part) too;
    integers, such as counters, are the first group's, for an average would turn them into floats.

    Args:
      batch_stats: nested dicts of arrays `[groups, ...]`.

    Returns:
      The same without the first axis: what one network can use for inference or go on from.

    >>> stats = {'mean': jnp.array([[0.0], [2.0]]), 'var': jnp.array([[1.0], [1.0]])}
    >>> {name: float(x[0]) for name, x in pool_batch_stats(stats).items()}
    {'mean': 1.0, 'var': 2.0}
    """

    def average(x: Array) -> Array:
        return x.mean(0) if jnp.issubdtype(x.dtype, jnp.inexact) else x[0]

    def pool_layer(_, stats: PyTree) -> PyTree:
        mean, var = stats["mean"], stats["var"]
        count = stats.get("count", stats.get("weight", jnp.ones_like(var)))
        pooled = pool_groups(Moments(*map(jnp.asarray, (mean, var, count))))._asdict()
        pooled["weight"] = pooled["count"] / len(mean)
        return {
            name: pooled[name] if name in pooled else jax.tree.map(average, value)
            for name, value in stats.items()
        }

    return map_layers(pool_layer, batch_stats, lambda _, x: average(x))


def with_moments(layer_stats: PyTree, moments: Moments) -> PyTree:
    """Returns a layer's statistics as if it had seen one batch, and nothing else.

    Args:
      layer_stats: what the layer keeps in `batch_stats`, with or without leading axes of groups.
      moments: of the batch, `[*F]`; in a memory they are the newest slot, and the only one.

    >>> stats = {'mean': jnp.zeros((2, 1)), 'var': jnp.ones((2, 1)), 'count': jnp.zeros((2, 1))}
    >>> batch = Moments(jnp.array([3.0]), jnp.array([4.0]), jnp.array([8.0]))
    >>> {name: x[:, 0].tolist() for name, x in with_moments(stats, batch).items()}
    {'mean': [3.0, 0.0], 'var': [4.0, 0.0], 'count': [8.0, 0.0]}
    """
    # An average weighs by batches.
    moments_by_name = {**moments._asdict(), "weight": (moments.count > 0).astype(jnp.float32)}

    def filled(name: str, value: Array) -> Array:
        new = moments_by_name[name].astype(value.dtype)
        if "count" not in layer_stats:
            return jnp.broadcast_to(new, value.shape)
        newest = (..., 0, *(slice(None),) * new.ndim)
        return jnp.zeros_like(value).at[newest].set(new)

    return {
        name: filled(name, jnp.asarray(value)) if name in moments_by_name else value
        for name, value in layer_stats.items()
    }


def to_batch_norm(
    variables: PyTree,
    *,
    memory_size: Schedule | None = None,
    decay: Schedule | None = None,
    virtual_batches: bool = False,
) -> PyTree:
    """Folds trained statistics into variables for the same network with `flax.linen.BatchNorm`.

    Its output at inference is the same: a memory becomes its pooled mean and variance. Layers that
    flax named by their class are renamed, `MemorizedBatchNorm_0` to `BatchNorm_0`.

    Args:
      variables: 'params' and 'batch_stats' of the trained network.
      memory_size: of its layers; must be given where they have memories.
      decay: of its layers; likewise.
      virtual_batches: whether its layers are in `VirtualBatches`.

    Returns:
      The variables for the network with `BatchNorm` of the same `epsilon`.

    Raises:
      ValueError: where two layers would get one name, or the rule of a memory is missing.

    >>> from mbn_jax import MemorizedBatchNorm
    >>> stats = {'mean': jnp.array([[1.0], [3.0]]), 'var': jnp.ones((2, 1))}
    >>> variables = {'batch_stats': {'norm': {**stats, 'count': jnp.ones((2, 1))}}}
    >>> folded = to_batch_norm(variables, memory_size=2, decay=1.0)['batch_stats']['norm']
    >>> {name: x.tolist() for name, x in folded.items()}
    {'mean': [2.0], 'var': [2.0]}
    """

    def fold(_, stats: PyTree) -> PyTree:
        stats = pool_batch_stats(stats) if virtual_batches else stats
        if "count" not in stats:
            return {"mean": stats["mean"], "var": stats["var"]}
        if memory_size is None or decay is None:
            raise ValueError(
                "A memory is folded by the rule of its layer: give the memory_size and the decay "
                "that it was built with."
            )
        mean, var = inference_statistics(stats, memory_size, decay)
        return {"mean": mean, "var": var}

    _check_names(variables)
    batch_stats = map_layers(fold, variables.get("batch_stats", {}))
    return _named_as_batch_norm({**variables, "batch_stats": batch_stats})


def from_batch_norm(batch_norm: PyTree, variables: PyTree) -> PyTree:
    """Starts a network from a checkpoint of the same one with `flax.linen.BatchNorm`.

    All is taken over as it is, but for the moving averages, which become the first slot of a memory
    and leave it as newer batches come; in an average they count as one batch. At inference the
    output is that of the checkpoint.

    Args:
      batch_norm: 'params' and 'batch_stats' of the checkpoint.
      variables: what `init` of the new network returned.

    Returns:
      Variables of the tree of `variables`.

    Raises:
      ValueError: where the two are not of the same network, naming what differs.

    >>> trained = {'batch_stats': {'norm': {'mean': jnp.array([2.0]), 'var': jnp.array([4.0])}}}
    >>> empty = {'mean': jnp.zeros((3, 1)), 'var': jnp.ones((3, 1)), 'count': jnp.zeros((3, 1))}
    >>> started = from_batch_norm(trained, {'batch_stats': {'norm': empty}})
    >>> started['batch_stats']['norm']['mean'][:, 0].tolist()
    [2.0, 0.0, 0.0]
    """

    def renamed(path: tuple[str, ...]) -> str:
        return "/".join(map(_batch_norm_name, path))

    def contents(tree: PyTree) -> tuple[dict[str, PyTree], dict[str, Array]]:
        """Returns the statistics of layers and all other arrays, by path."""
        _check_names(tree)
        layers, others = {}, {}
        map_layers(
            lambda path, stats: layers.update({renamed(path): stats}),
            tree,
            lambda path, x: others.update({renamed(path): x}),
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
        found = old_layers[renamed(path)]
        mean, var = jnp.asarray(found["mean"]), jnp.asarray(found["var"])
        return with_moments(layer_stats, Moments(mean, var, jnp.ones_like(var)))

    return map_layers(start, variables, lambda path, _: old[renamed(path)])


def _batch_norm_name(name: str) -> str:
    return re.sub(rf"^({'|'.join(NAMES)})(?=_\d+$)", "BatchNorm", name)


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
