"""What layers keep in a `batch_stats` collection: how it is laid out, pooled, read and filled.

Works on the statistics of all layers of this package and of `flax.linen.BatchNorm`, alone, in
`VirtualBatches`, and stacked by `nn.scan` and `nn.vmap`. A layer is known by what it records of
itself: `rule` (a memory), `steps` (`BatchRenorm`, `MovingAverageBatchNorm`), `groups`
(`VirtualBatches`).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mbn_jax.core.memory import Slots
from mbn_jax.core.moments import Array, Moments, pool_groups, pool_two

PyTree = Any


class Layout(NamedTuple):
    """How the arrays of one layer are laid out: `[*stacked, groups, slots, *features]`.

    Attributes:
      kind: 'slots', 'endless' (of an endless memory) or 'averages'.
      stacked: number of leading axes that `nn.scan` and `nn.vmap` added; None: not recorded, as of
        a plain `flax.linen.BatchNorm`.
      has_groups: whether an axis of virtual batches follows.
      feature_rank: number of feature axes; None where `stacked` is.
    """

    kind: str
    stacked: int | None
    has_groups: bool
    feature_rank: int | None


def layout_of(layer_stats: Mapping[str, Array]) -> Layout:
    """Returns the layout of what one layer keeps.

    Raises:
      ValueError: for a memory that does not record its rule.

    >>> slots = jnp.zeros((3, 8, 2))
    >>> stats = {'mean': slots, 'var': slots, 'count': slots, 'rule': jnp.ones((3, 2))}
    >>> layout_of(stats)
    Layout(kind='slots', stacked=1, has_groups=False, feature_rank=1)
    """
    kinds = {"count": "slots", "weight": "endless"}
    kind = next((kinds[name] for name in kinds if name in layer_stats), "averages")
    has_groups = "groups" in layer_stats
    if kind != "averages":
        if "rule" not in layer_stats:
            raise ValueError(
                "The statistics of a memory need its 'rule' (memory size and decay), which every "
                "MemorizedBatchNorm records; got only " + ", ".join(sorted(layer_stats)) + "."
            )
        *leading_shape, numbers = jnp.shape(layer_stats["rule"])
        leading = len(leading_shape)
        slots = jnp.shape(layer_stats["mean"])
        if numbers != 2 or (kind == "slots" and slots[:leading] != tuple(leading_shape)):
            raise ValueError(
                "Lifted transforms must stack batch_stats on axis 0 (variable_axes), got a memory "
                f"of shape {slots} with a rule of shape {(*leading_shape, numbers)}."
            )
    elif "steps" in layer_stats:
        leading = jnp.ndim(layer_stats["steps"])
    elif has_groups:
        leading = jnp.ndim(layer_stats["groups"])
    else:
        return Layout(kind, None, False, None)
    feature_rank = jnp.ndim(layer_stats["mean"]) - leading - (kind == "slots")
    return Layout(kind, leading - has_groups, has_groups, feature_rank)


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
    are_statistics: Callable[[tuple[str, ...]], bool] = lambda path: True,
) -> PyTree:
    """Returns `batch_stats` with `function(path, statistics)` in place of each layer's.

    Args:
      function: takes the names that lead to a layer, and what the layer keeps.
      batch_stats: nested dicts.
      others: takes the names that lead to an array that belongs to no such layer, and the array.
      are_statistics: whether arrays at a path can be a layer's statistics: parameters may be called
        'mean' and 'var' too.

    >>> map_layers(lambda path, stats: stats['mean'], {'a': {'norm': {'mean': 0, 'var': 1}}})
    {'a': {'norm': 0}}
    """

    def visit(path: tuple[str, ...], tree: PyTree) -> PyTree:
        if not isinstance(tree, Mapping):
            return others(path, tree)
        # Not a module with layers of these names.
        has_moments = {"mean", "var"} <= set(tree) and not isinstance(tree["mean"], Mapping)
        if has_moments and are_statistics(path):
            return function(path, tree)
        return {name: visit((*path, name), child) for name, child in tree.items()}

    return visit((), batch_stats)


def overlay(tree: PyTree, changes: PyTree) -> PyTree:
    """Returns nested dicts with all that `changes` has in its place.

    >>> overlay({'norm': {'mean': 0, 'var': 1}}, {'norm': {'mean': 2}})
    {'norm': {'mean': 2, 'var': 1}}
    """
    if not isinstance(tree, Mapping):
        return changes
    return {k: overlay(v, changes[k]) if k in changes else v for k, v in tree.items()}


def inference_statistics(layer_stats: PyTree) -> tuple[Array, Array]:
    """Returns (mean, var) that one layer normalizes by at inference, `[*stacked, *F]`.

    Args:
      layer_stats: what the layer keeps in `batch_stats`. A memory is pooled by the rule of its last
        training call, virtual batches are pooled into one.
    """
    layout = layout_of(layer_stats)
    if layout.has_groups:
        layer_stats = _pool_layer(layer_stats, axis=layout.stacked or 0)
    mean, var = layer_stats["mean"], layer_stats["var"]
    if layout.kind != "slots":
        return mean, var

    def pooled(mean: Array, var: Array, count: Array, rule: Array) -> tuple[Array, Array]:
        pool = Slots(rule[0], rule[1]).pooled(Moments(mean, var, count))
        return pool.mean, pool.var

    for _ in range(layout.stacked or 0):
        pooled = jax.vmap(pooled)
    return pooled(mean, var, layer_stats["count"], jnp.asarray(layer_stats["rule"]))


def pool_batch_stats(batch_stats: PyTree) -> PyTree:
    """Pools the statistics of groups, such as devices, into those of all their batches.

    By the law of total variance, wherever a layer keeps a `mean` beside a `var`: weighted by its
    `count` or `weight` if it has one (a memory, slot by slot), else equally. An average of
    variances would lose the spread between the groups. Counts are of examples and add up. A
    `weight` is in batches, of which each group saw a part, and is averaged. Other floating-point
    arrays are averaged too; integers, such as counters, and rules are the first group's.

    Args:
      batch_stats: nested dicts of arrays `[groups, ...]`.

    Returns:
      The same without the first axis, for one network to use at inference or to continue from.

    Raises:
      ValueError: for statistics that have no axis of groups.

    >>> stats = {'mean': jnp.array([[0.0], [2.0]]), 'var': jnp.array([[1.0], [1.0]])}
    >>> {name: float(x[0]) for name, x in pool_batch_stats(stats).items()}
    {'mean': 1.0, 'var': 2.0}
    """
    return map_layers(
        lambda _, stats: _pool_layer(stats, axis=0), batch_stats, lambda _, x: _average(x)
    )


def _average(x: Array) -> Array:
    return x.mean(0) if jnp.issubdtype(x.dtype, jnp.inexact) else x[0]


def _pool_layer(stats: PyTree, *, axis: int) -> PyTree:
    """Pools what one layer keeps over an axis of groups."""
    if jnp.ndim(stats["mean"]) < 2 or ("rule" in stats and jnp.ndim(stats["rule"]) < 2):
        raise ValueError(
            "pool_batch_stats expected statistics [groups, ...], such as those of all devices, got "
            f"a mean of shape {jnp.shape(stats['mean'])}; stack the groups on a first axis."
        )
    stats = jax.tree.map(lambda x: jnp.moveaxis(x, axis, 0), dict(stats))
    mean, var = stats["mean"], stats["var"]
    count = stats.get("count", stats.get("weight", jnp.ones_like(var)))
    pooled = pool_groups(Moments(*map(jnp.asarray, (mean, var, count))))._asdict()
    pooled["weight"] = pooled["count"] / len(mean)
    if "rule" in stats:
        pooled["rule"] = stats["rule"][0]
    return {
        name: pooled[name] if name in pooled else jax.tree.map(_average, value)
        for name, value in stats.items()
    }


def moments_shape(layer_stats: PyTree) -> tuple[int, ...]:
    """Returns the shape of a batch's moments for one layer, `[*stacked, *F]`."""
    layout, shape = layout_of(layer_stats), list(jnp.shape(layer_stats["mean"]))
    if layout.kind == "slots":
        del shape[(layout.stacked or 0) + layout.has_groups]
    if layout.has_groups:
        del shape[layout.stacked or 0]
    return tuple(shape)


def with_moments(layer_stats: PyTree, moments: Moments) -> PyTree:
    """Returns a layer's statistics as if it had seen one batch, and nothing else.

    Args:
      layer_stats: what the layer keeps in `batch_stats`.
      moments: of the batch, `[*F]` or `[*stacked, *F]`; each stacked layer and each virtual batch
        without moments of its own gets the same.

    Returns:
      The new statistics, with the batch as the only slot of a memory, or as the averages.

    >>> from mbn_jax import MemorizedBatchNorm
    >>> layer = MemorizedBatchNorm(memory_size=2, use_running_average=True)
    >>> stats = layer.init(jax.random.key(0), jnp.zeros((1, 1)))['batch_stats']
    >>> batch = Moments(jnp.array([3.0]), jnp.array([4.0]), jnp.array([8.0]))
    >>> filled = with_moments(stats, batch)
    >>> {name: filled[name][:, 0].tolist() for name in ('mean', 'var', 'count')}
    {'mean': [3.0, 0.0], 'var': [4.0, 0.0], 'count': [8.0, 0.0]}
    """
    layout = layout_of(layer_stats)
    # An endless memory weighs by batches.
    moments_by_name = {**moments._asdict(), "weight": (moments.count > 0).astype(jnp.float32)}

    def filled(name: str, value: Array) -> Array:
        new = moments_by_name[name].astype(value.dtype)
        slots = layout.kind == "slots"
        shape = value.shape
        if layout.feature_rank is not None:
            leading = new.ndim - layout.feature_rank
            missing = value.ndim - slots - new.ndim
            new = jnp.expand_dims(new, tuple(range(leading, leading + missing)))
        if not slots:
            return jnp.broadcast_to(new, shape)
        axis = (layout.stacked or 0) + layout.has_groups
        newest = (*(slice(None),) * axis, 0)
        return (
            jnp.zeros_like(value)
            .at[newest]
            .set(jnp.broadcast_to(new, shape[:axis] + shape[axis + 1 :]))
        )

    return {
        name: filled(name, jnp.asarray(value)) if name in moments_by_name else value
        for name, value in layer_stats.items()
    }


def add_moments(totals: dict[str, Moments], recorded: dict[str, Moments]) -> dict[str, Moments]:
    """Pools two batches' moments, layer by layer; `totals` may be empty."""
    if not totals:
        return recorded
    return {layer: pool_two(totals[layer], moments) for layer, moments in recorded.items()}


def moments_over(
    batches: Iterable[PyTree], add_batch: Callable[..., dict[str, Moments]], package: str
) -> dict[str, Moments]:
    """Returns the moments of the layers' inputs over batches, by layer.

    Args:
      batches: one or more.
      add_batch: `add_batch(totals, batch=batch)` returns the totals with a batch in them.
      package: the package whose layers are looked for, for the message.

    Raises:
      ValueError: without batches, or where no layer is called.
    """
    totals: dict[str, Moments] = {}
    count = 0
    for count, batch in enumerate(batches, start=1):  # noqa: B007
        totals = add_batch(totals, batch=batch)
    if not totals:
        raise ValueError(
            "Statistics are computed from one batch or more, by a model that calls BatchNorm or a "
            f"layer of {package}; got {count} batches, and no such call."
        )
    return totals


def recalibrated(batch_stats: PyTree, moments: dict[str, Moments]) -> PyTree:
    """Returns `batch_stats` with the statistics of the layers in `moments` replaced, by path."""

    def replaced(path: tuple[str, ...], stats: PyTree) -> PyTree:
        found = moments.get("/".join(path))
        return stats if found is None else with_moments(stats, found)

    return map_layers(replaced, batch_stats)
