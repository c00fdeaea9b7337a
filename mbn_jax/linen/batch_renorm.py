"""Batch Renormalization as a drop-in for `flax.linen.BatchNorm`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.nn import initializers

from mbn_jax.core.layers import check_renorm
from mbn_jax.core.moments import Array, AxisName, Schedule
from mbn_jax.core.renorm import D_MAX, R_MAX, renormalize
from mbn_jax.linen.layer import is_inference, options_of, scale_and_bias


class BatchRenorm(nn.Module):
    """Batch normalization corrected towards its moving averages, by a bounded amount.

    With moving averages mu and sigma, batch mean mu_B and deviation sigma_B::

        y = ((x - mu_B) / sigma_B * r + d) * scale + bias
        r = clip(sigma_B / sigma, 1 / r_max, r_max)     d = clip((mu_B - mu) / sigma, -d_max, d_max)

    r and d are constants to the gradient. The averages then move by 1 - `momentum` towards the
    batch. Inference normalizes by mu and sigma; a training step does too wherever no limit binds.
    `batch_stats` holds `mean` and `var` (sigma is averaged, its square is kept, so that the layer's
    statistics read as those of `flax.linen.BatchNorm`) and `steps`, the batches seen.

    The other attributes are those of flax's layer.

    Attributes:
      momentum: of the moving averages.
      r_max: 1 or more, a number or a function of the steps so far; 1 with `d_max` 0 is batch
        normalization. The default is the paper's schedule, for runs of 100,000 steps and more.
      d_max: 0 or more; likewise.

    Raises:
      ValueError: on construction, where an option is impossible.

    References:
      Ioffe, "Batch Renormalization", arXiv 1702.03275, Algorithm 1 and section 4.

    >>> import jax
    >>> layer = BatchRenorm(use_running_average=False, r_max=3.0, d_max=5.0)
    >>> x = jnp.array([[1.0], [3.0]])
    >>> variables = layer.init(jax.random.key(0), x)
    >>> y, _ = layer.apply(variables, x, mutable=['batch_stats'])  # Averages: still 0 and 1.
    >>> [round(float(value), 3) for value in y[:, 0]]
    [1.0, 3.0]
    """

    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
    momentum: float = 0.99
    _: dataclasses.KW_ONLY
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Any = initializers.zeros
    scale_init: Any = initializers.ones
    axis_name: AxisName | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    r_max: Schedule = optax.linear_schedule(**R_MAX)
    d_max: Schedule = optax.linear_schedule(**D_MAX)

    def __post_init__(self):
        check_renorm(self)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Array,
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
    ) -> Array:
        """Normalizes `x`.

        Args:
          x: inputs, `[..., features]` or as `axis` says, floating point or complex.
          use_running_average: as the attribute; give one of the two.
          mask: boolean, broadcastable to `x`: the elements that count.

        Returns:
          Array of the shape of `x`.
        """
        inference = is_inference(self, use_running_average)
        options = options_of(self)
        x = options.as_input(x)
        shape = options.feature_shape(x)
        mean_dtype, var_dtype, _ = options.statistics_dtypes(x.dtype)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, mean_dtype)
        var = self.variable("batch_stats", "var", jnp.ones, shape, var_dtype)
        steps = self.variable("batch_stats", "steps", jnp.zeros, (), jnp.int32)
        parameters = scale_and_bias(self, shape)
        if inference:
            return options.normalize(x, mean.value, var.value, **parameters)
        result = renormalize(x, mask, mean.value, var.value, steps.value, options, self)
        if not self.is_initializing():
            mean.value, var.value = result.new_mean, result.new_var
            steps.value = steps.value + 1
        return options.normalize(x, result.mean, result.var, **parameters, center=result.center)
