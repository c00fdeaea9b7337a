"""Moments of batches, and how they pool over groups.

Pure functions on arrays: no module, no state, no configuration. Shapes are written with `F` for the
feature shape (usually `(channels,)`) and `k` for the number of slots in a memory.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
AxisName = str | tuple[str, ...]

Schedule = int | float | Array | Callable[[Array], Any]
"""A number, or a function of the steps so far, of optax for example."""


def value_at(schedule: Schedule, step: Array) -> Any:
    """Returns the value of a schedule at a step."""
    return schedule(step) if callable(schedule) else schedule


class Moments(NamedTuple):
    """Mean, biased variance and number of elements, of one batch `[*F]` or of k batches `[k, *F]`.

    A count of 0 marks an empty slot: nothing was seen, and mean and variance mean nothing.
    """

    mean: Array
    var: Array
    count: Array  # type: ignore[assignment]  # Not the method of tuples.


def common_dtype(*dtypes: Any) -> Any:
    """Returns the dtype that holds all, also where JAX forbids implicit promotion.

    >>> with jax.numpy_dtype_promotion('strict'):
    ...     common_dtype('bfloat16', 'float32')
    dtype('float32')
    """
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*map(jnp.dtype, dtypes))


def abs_sq(x: Array) -> Array:
    """Returns |x|^2 elementwise, real for complex input."""
    if jnp.iscomplexobj(x):
        return lax.square(lax.real(x)) + lax.square(lax.imag(x))
    return lax.square(x)


def _all_sum(xs: Sequence[Array], axis_name: AxisName, axis_index_groups) -> list[Array]:
    """Sums feature-shaped arrays over a named axis in one collective, complex ones included."""
    parts = []
    for x in xs:
        parts += [lax.real(x), lax.imag(x)] if jnp.iscomplexobj(x) else [x]
    total = iter(lax.psum(jnp.stack(parts), axis_name, axis_index_groups=axis_index_groups))
    return [
        lax.complex(next(total), next(total)) if jnp.iscomplexobj(x) else next(total) for x in xs
    ]


def batch_moments(
    x: Array,
    axes: Sequence[int],
    *,
    dtype=None,
    mask: Array | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    center: Array | None = None,
    use_fast_variance: bool = True,
    force_float32_reductions: bool = True,
) -> Moments:
    """Computes mean, biased variance and count of a batch over `axes` (and over devices).

    With deviations e = x - center, in one pass over the data::

        mean = center + E[e]        var = E[|e|^2] - |E[e]|^2

    which is exact algebra for any constant `center`, and loses about `|mean - center|^2 / var`
    times the unit roundoff: nothing, with a center within a few standard deviations of the mean.
    With center 0 it is flax's fast variance. `use_fast_variance=False` takes the mean first and the
    variance around it (a second pass, and a second collective under `axis_name`).

    Args:
      x: inputs, any rank, real or complex floating point.
      axes: the axes to reduce, non-negative; the others are the features, of shape F.
      dtype: least precision of the statistics, as in flax; default: that of `x`.
      mask: boolean, broadcastable to `x`; False elements count nowhere, whatever their value. Over
        devices each weighs by the elements it really has.
      axis_name: named axis (`pmap`, `shard_map`, `vmap`) to pool over.
      axis_index_groups: groups of indices within `axis_name`, each pooled by itself.
      center: `[*F]`, a guess of the mean, held constant, the same on all pooled devices.
      use_fast_variance: one pass around `center` instead of two passes.
      force_float32_reductions: compute in float32 at least.

    Returns:
      `Moments` of shape `[*F]`; with nothing to count (all masked), mean and variance are 0.

    >>> x = jnp.array([[1.0, 300.0], [3.0, 302.0]])
    >>> moments = batch_moments(x, (0,), center=jnp.array([0.0, 300.0]))
    >>> moments.mean.tolist(), moments.var.tolist(), moments.count.tolist()
    ([2.0, 301.0], [1.0, 1.0], [2.0, 2.0])
    """
    dtype = jnp.dtype(dtype or x.dtype)
    if force_float32_reductions:
        dtype = common_dtype(dtype, jnp.float32)
    if jnp.iscomplexobj(x):
        dtype = common_dtype(dtype, jnp.complex64)
    axes = tuple(axes)
    x = x.astype(dtype)
    feature_shape = tuple(n for i, n in enumerate(x.shape) if i not in axes)
    real_dtype = jnp.finfo(dtype).dtype
    # Counts and sums of them leave float16's range at once.
    count_dtype = common_dtype(real_dtype, jnp.float32)
    if mask is None:
        count = jnp.full(feature_shape, math.prod(x.shape[i] for i in axes), count_dtype)
    else:
        mask = jnp.broadcast_to(jnp.asarray(mask, bool), x.shape)
        # Replaced before any arithmetic: NaN times a zero weight is NaN, here and in the gradient.
        x = jnp.where(mask, x, jnp.zeros_like(x))
        count = mask.sum(axes, dtype=count_dtype)

    def wide(values: Array):
        return common_dtype(values.dtype, count_dtype)

    def average(values: Array) -> Array:
        if mask is None:
            return values.mean(axes)
        total = jnp.where(mask, values, jnp.zeros_like(values)).sum(axes, dtype=wide(values))
        return (total / jnp.maximum(count, 1)).astype(values.dtype)

    def average_over_devices(*values: Array) -> tuple[list[Array], Array]:
        if axis_name is None:
            return list(values), count
        if mask is None:
            devices = lax.psum(1, axis_name, axis_index_groups=axis_index_groups)
            total = count * devices
            sums = _all_sum([v.astype(wide(v)) for v in values], axis_name, axis_index_groups)
            means = [s / devices for s in sums]
        else:
            weighted = [v.astype(wide(v)) * count for v in values]
            *sums, total = _all_sum([*weighted, count], axis_name, axis_index_groups)
            means = [s / jnp.maximum(total, 1) for s in sums]
        return [m.astype(v.dtype) for m, v in zip(means, values, strict=True)], total

    if use_fast_variance:
        if center is None:
            center = jnp.zeros(feature_shape, dtype)
        center = lax.stop_gradient(center).astype(dtype)
        deviation = x - jnp.expand_dims(center, axes)
        (offset, square), total = average_over_devices(
            average(deviation), average(abs_sq(deviation))
        )
        # Rounding can leave the difference below 0.
        var = jnp.maximum(square - abs_sq(offset), 0)
        mean = center + offset
    else:
        (mean,), total = average_over_devices(average(x))
        deviation = x - jnp.expand_dims(mean, axes)
        (var,), total = average_over_devices(average(abs_sq(deviation)))
    if mask is not None:
        mean = jnp.where(total > 0, mean, jnp.zeros_like(mean))
        var = jnp.where(total > 0, var, jnp.zeros_like(var))
    return Moments(mean, var, total)


def select(condition: Array, chosen: Moments, others: Moments) -> Moments:
    """Returns `chosen` where a condition, broadcastable to them, holds, and `others` elsewhere."""
    return Moments(*(jnp.where(condition, *pair) for pair in zip(chosen, others, strict=True)))


def around_zero(moments: Moments) -> Moments:
    """Returns mean 0 and the mean square, by which a layer normalizes that subtracts no mean.

    >>> [float(x) for x in around_zero(Moments(jnp.array(3.0), jnp.array(1.0), jnp.array(2.0)))]
    [0.0, 10.0, 2.0]
    """
    square = moments.var + abs_sq(moments.mean)
    return Moments(jnp.zeros_like(moments.mean), square, moments.count)


def is_usable(moments: Moments) -> Array:
    """Returns where moments are of something, and finite."""
    return (moments.count > 0) & jnp.isfinite(moments.mean) & jnp.isfinite(moments.var)


def pool_groups(groups: Moments) -> Moments:
    """Pools the moments of groups, weighted by their counts, into those of their union::

        n = sum_g n_g    mean = sum_g n_g m_g / n    var = sum_g n_g (v_g + |m_g - mean|^2) / n

    Averaging the variances alone would lose the spread of the means.

    Args:
      groups: `Moments` of shape `[groups, ...]`.

    Returns:
      `Moments` without the first axis.

    >>> groups = Moments(jnp.array([0.0, 3.0]), jnp.array([1.0, 1.0]), jnp.array([2.0, 1.0]))
    >>> [round(float(x), 4) for x in pool_groups(groups)]
    [1.0, 3.0, 3.0]
    """
    total = groups.count.sum(0)
    weights = groups.count / jnp.where(total > 0, total, 1)[None]
    mean = (weights * groups.mean).sum(0)
    var = (weights * (groups.var + abs_sq(groups.mean - mean[None]))).sum(0)
    # The dtype of the slots is part of the state: counts in float32 must not widen it.
    return Moments(mean.astype(groups.mean.dtype), var.astype(groups.var.dtype), total)


def pool_two(one: Moments, other: Moments) -> Moments:
    """Pools the moments of two groups of examples, as `pool_groups`."""
    return pool_groups(jax.tree.map(lambda *x: jnp.stack(x), one, other))
