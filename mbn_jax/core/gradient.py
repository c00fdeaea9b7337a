"""How gradients flow from pooled statistics into the current batch."""

import jax.numpy as jnp
from jax import lax

from mbn_jax.core.moments import Array, Moments

GRADIENTS = ("auto", "renorm", "through")
"""Gradient rules of a memory; `gradient_rule` chooses for 'auto'."""


def gradient_rule(gradient: str, num_values: int) -> str:
    """Returns the rule that 'auto' stands for; other rules stay as they are.

    Batch normalization's own gradient vanishes where a feature has at most two values, and 'renorm'
    inherits that. 'auto' is 'through' there and 'renorm' elsewhere. A symbolic number of values, as
    of `jax.export`, counts as more than two.

    Args:
      gradient: one of `GRADIENTS`.
      num_values: values of a feature in the batch (batch x space x synced devices).

    >>> gradient_rule('auto', 2), gradient_rule('auto', 3), gradient_rule('renorm', 2)
    ('through', 'renorm', 'renorm')
    """
    if gradient != "auto":
        return gradient
    return "through" if isinstance(num_values, int) and num_values <= 2 else "renorm"


def with_gradient(
    batch: Moments, mean: Array, var: Array, *, gradient: str, epsilon: float
) -> tuple[Array, Array]:
    """Returns pooled statistics with a gradient into the moments of the current batch.

    `'through'` differentiates the pool as it stands: d mean/d m_B = a_0, d var/d v_B = a_0,
    d var/d m_B = 2 a_0 (m_B - mean).

    `'renorm'` is Batch Renormalization's rule. With s_B = sqrt(v_B + epsilon) and
    s = sqrt(var + epsilon), it differentiates::

        x_hat = (x - m_B) / s_B * r + d,    r = s_B / s,    d = (m_B - mean) / s

    with r and d held constant: the backward pass is batch normalization's, scaled by r, and weights
    before the layer stay scale-invariant. In terms of the statistics that is::

        d mean = dm_B - (m_B - mean) / (2 s_B^2) dv_B        d var = s^2 / s_B^2 dv_B

    Args:
      batch: moments of the current batch, `[*F]`.
      mean: pooled mean, `[*F]`.
      var: pooled variance, `[*F]`.
      gradient: 'through' or 'renorm'.
      epsilon: added to variances.

    Returns:
      (mean, var), the same values to the bit, with the gradient of the rule.

    References:
      Ioffe, "Batch Renormalization", arXiv 1702.03275, equations (2) to (6).

    >>> batch = Moments(jnp.array(2.0), jnp.array(1.0), jnp.array(8.0))
    >>> rule = dict(gradient='renorm', epsilon=0.0)
    >>> [float(s) for s in with_gradient(batch, jnp.array(1.0), jnp.array(4.0), **rule)]
    [1.0, 4.0]
    """
    if gradient == "through":
        return mean, var
    # r and d cancel, and no square root is left, whose gradient is infinite at 0.
    leaning = (batch.mean - mean) / (2 * (batch.var + epsilon))
    ratio = (var + epsilon) / (batch.var + epsilon)
    # Of value 0: the pool's value stays to the last bit, so that training and inference agree.
    of_mean = batch.mean - lax.stop_gradient(batch.mean)
    of_var = batch.var - lax.stop_gradient(batch.var)
    mean, var, leaning, ratio = lax.stop_gradient((mean, var, leaning, ratio))
    return mean + of_mean - leaning * of_var, var + ratio * of_var


def clipped_renorm(
    batch: Moments, mean: Array, var: Array, *, epsilon: float, r_max: Array, d_max: Array
) -> tuple[Array, Array]:
    """Returns the statistics that Batch Renormalization normalizes by, limits included::

        x_hat = (x - m_B) / s_B * r + d
        r = clip(s_B / s, 1 / r_max, r_max)    d = clip((m_B - mean) / s, -d_max, d_max)

    with r and d constants to the gradient. Written as statistics, that is the deviation s_B / r and
    the mean m_B - d s_B / r.

    Args:
      batch: moments of the current batch, `[*F]`.
      mean: moving mean, `[*F]`.
      var: moving variance, `[*F]`.
      epsilon: added to variances.
      r_max: 1 or more.
      d_max: 0 or more.

    Returns:
      (mean, var) to normalize with, `[*F]`.

    References:
      Ioffe, "Batch Renormalization", arXiv 1702.03275, Algorithm 1.
    """
    batch_scale = jnp.sqrt(batch.var + epsilon)
    scale = jnp.sqrt(var + epsilon)
    r = jnp.clip(lax.stop_gradient(batch_scale / scale), 1 / r_max, r_max)
    d = lax.stop_gradient((batch.mean - mean) / scale)
    size = jnp.abs(d)
    d = d * jnp.where(size > d_max, d_max / jnp.where(size > 0, size, 1), 1)
    renorm_scale = batch_scale / r
    renorm_mean = batch.mean - d * renorm_scale
    renorm_var = (batch.var + epsilon) / lax.square(r) - epsilon
    # A feature that is masked out whole has no r and d to clip.
    seen = batch.count > 0
    return jnp.where(seen, renorm_mean, mean), jnp.where(seen, renorm_var, var)
