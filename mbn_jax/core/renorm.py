"""Batch Renormalization: what a training call of its layers computes."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from mbn_jax.core.gradient import clipped_renorm
from mbn_jax.core.moments import Array, is_usable, value_at
from mbn_jax.core.normalization import NormOptions

R_MAX = {"init_value": 1.0, "end_value": 3.0, "transition_steps": 35_000, "transition_begin": 5_000}
"""The paper's schedule of r_max, for `optax.linear_schedule`."""

D_MAX = {"init_value": 0.0, "end_value": 5.0, "transition_steps": 20_000, "transition_begin": 5_000}
"""The paper's schedule of d_max, likewise."""


class Renormalized(NamedTuple):
    """What a training call of `BatchRenorm` computes.

    Attributes:
      mean: to normalize by, `[*F]`, with its gradient.
      var: likewise.
      center: what the batch's moments were taken around, `[*F]`.
      new_mean: moving mean after this call, `[*F]`.
      new_var: square of the moving deviation after this call.
    """

    mean: Array
    var: Array
    center: Array
    new_mean: Array
    new_var: Array


def renormalize(
    x: Array,
    mask: Array | None,
    mean: Array,
    var: Array,
    steps: Array,
    options: NormOptions,
    layer: Any,
) -> Renormalized:
    """Corrects a batch's moments towards the moving averages, and moves these.

    Args:
      x: inputs.
      mask: boolean, broadcastable to `x`: the elements that count; None: all.
      mean: moving mean, `[*F]`.
      var: square of the moving deviation, `[*F]`.
      steps: training calls so far.
      options: of the layer.
      layer: with `momentum`, `r_max` and `d_max`.

    Returns:
      The statistics to normalize by, and what is kept.
    """
    batch = options.moments(x, mask, mean)
    used_mean, used_var = clipped_renorm(
        batch,
        mean,
        var,
        epsilon=options.epsilon,
        r_max=value_at(layer.r_max, steps),
        d_max=value_at(layer.d_max, steps),
    )
    usable, rate = is_usable(batch), 1 - layer.momentum
    sigma = jnp.sqrt(var) + rate * (jnp.sqrt(batch.var) - jnp.sqrt(var))
    mean_dtype, var_dtype, _ = options.statistics_dtypes(x.dtype)
    new_mean = jnp.where(usable, mean + rate * (batch.mean - mean), mean).astype(mean_dtype)
    new_var = jnp.where(usable, lax.square(sigma), var).astype(var_dtype)
    center = mean if options.use_fast_variance else batch.mean
    return Renormalized(used_mean, used_var, center, *lax.stop_gradient((new_mean, new_var)))
