"""What can be done to a `batch_stats` collection beside training: read, pool, fill and fold it.

Works on the collections of `MemorizedBatchNorm`, `BatchRenorm` and `flax.linen.BatchNorm`, alone or
in `VirtualBatches`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mbn_jax.core.memory import Slots, memory_rule
from mbn_jax.core.moments import Array, Moments, Schedule, pool_groups

PyTree = Any


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
