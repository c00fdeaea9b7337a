"""How an update moves a memory: the shift of one batch, applied to all."""

import jax.numpy as jnp

from mbn_jax.core.moments import Moments, is_usable

MAX_SHIFT = 1.0
"""Largest shift of the mean in one update that a memory follows, in standard deviations."""

MAX_SCALE = 2.0
"""Largest factor, up or down, by which one update may scale the variances of a memory."""

MIN_VALUES_OF_SHIFT = 5
"""Fewest values of a feature whose shift moves a memory; the shift of fewer is mostly noise."""


def transport(slots: Moments, before: Moments, after: Moments, epsilon: float) -> Moments:
    """Moves a memory by what an update did to the statistics of one batch.

    The update took the batch from (m, v) to (m', v'). As a map of each feature that is a scale and
    an offset, and every slot moves by it::

        r = (v' + epsilon) / (v + epsilon)
        m_i <- m_i + (m' - m) + (sqrt(r) - 1) (m_i - m)        v_i <- r v_i

    which is exact where the update changed a feature by a scale and an offset, and nothing where
    nothing moved. One bad update must not spoil a memory: r is bounded to [1/2, 2] and m' - m to
    one standard deviation of the batch. A feature of which the batch has fewer than five values, or
    that is not finite, is left as it is.

    Args:
      slots: `Moments` of shape `[k, *F]`, or of an average, `[*F]`.
      before: moments of the batch under the parameters before the update, `[*F]`.
      after: moments of the same batch under those after it, `[*F]`.
      epsilon: added to variances.

    Returns:
      `Moments` of the shape and in the dtypes of `slots`.

    References:
      This project's own. With geometric weights and no end to the memory, the mean follows the
      recursion of STORM (Cutkosky and Orabona, 2019).

    >>> slots = Moments(jnp.array([1.0, 3.0]), jnp.array([4.0, 4.0]), jnp.array([8.0, 8.0]))
    >>> before = Moments(jnp.array(2.0), jnp.array(4.0), jnp.array(8.0))
    >>> after = Moments(jnp.array(4.0), jnp.array(6.25), jnp.array(8.0))  # x -> 1.25 x + 1.5
    >>> moved = transport(slots, before, after, 0.0)
    >>> moved.mean.tolist(), moved.var.tolist()
    ([2.75, 5.25], [6.25, 6.25])
    """
    if slots.mean.ndim > before.mean.ndim:
        before, after = (Moments(*(x[None] for x in moments)) for moments in (before, after))
    usable = is_usable(before) & is_usable(after)
    usable &= jnp.minimum(before.count, after.count) >= MIN_VALUES_OF_SHIFT
    ratio = jnp.clip((after.var + epsilon) / (before.var + epsilon), 1 / MAX_SCALE, MAX_SCALE)
    offset = after.mean - before.mean
    size, limit = jnp.abs(offset), MAX_SHIFT * jnp.sqrt(before.var + epsilon)
    offset *= jnp.where(size > limit, limit / jnp.where(size > 0, size, 1), 1)
    mean = slots.mean + (offset + (jnp.sqrt(ratio) - 1) * (slots.mean - before.mean))
    return slots._replace(
        mean=jnp.where(usable, mean, slots.mean).astype(slots.mean.dtype),
        var=jnp.where(usable, slots.var * ratio, slots.var).astype(slots.var.dtype),
    )
