"""Batch Renormalization as a drop-in for `flax.nnx.BatchNorm`."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import optax
from flax import nnx
from jax.nn import initializers

from mbn_jax.core.layers import check_renorm
from mbn_jax.core.moments import Array, AxisName, Schedule
from mbn_jax.core.renorm import D_MAX, R_MAX, renormalize
from mbn_jax.nnx.layer import NormLayer

_R_MAX, _D_MAX = (optax.linear_schedule(**schedule) for schedule in (R_MAX, D_MAX))


class BatchRenorm(NormLayer):
    """Batch normalization corrected towards its moving averages, by a bounded amount.

    Computes what `mbn_jax.BatchRenorm` computes, which documents the mathematics. `mean`, `var` and
    `steps` are Variables of type `nnx.BatchStat`.

    The other arguments are those of `mbn_jax.nnx.MemorizedBatchNorm`.

    Args:
      momentum: of the moving averages.
      r_max: 1 or more, a number or a function of the steps so far; default: the paper's schedule.
      d_max: 0 or more; likewise.

    Raises:
      ValueError: on construction, where an option is impossible.

    >>> layer = BatchRenorm(1, r_max=3.0, d_max=5.0, rngs=nnx.Rngs(0))
    >>> y = layer(jnp.array([[1.0], [3.0]]))  # Averages: still 0 and 1.
    >>> [round(float(value), 3) for value in y[:, 0]]
    [1.0, 3.0]
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        use_running_average: bool | None = False,
        axis: int | Sequence[int] = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Any = initializers.zeros,
        scale_init: Any = initializers.ones,
        axis_name: AxisName | None = None,
        axis_index_groups: Sequence[Sequence[int]] | None = None,
        use_fast_variance: bool = True,
        force_float32_reductions: bool = True,
        r_max: Schedule = _R_MAX,
        d_max: Schedule = _D_MAX,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        rngs: nnx.Rngs,
    ):
        super().__init__(
            num_features,
            use_running_average=use_running_average,
            axis=axis,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=scale_init,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            force_float32_reductions=force_float32_reductions,
            bias_metadata=bias_metadata,
            scale_metadata=scale_metadata,
            rngs=rngs,
        )
        self.momentum = momentum
        self.r_max = r_max
        self.d_max = d_max
        check_renorm(self)
        shape = self._feature_shape()
        mean_dtype, var_dtype, _ = self._options().statistics_dtypes(self._statistics_dtype())
        self.mean = nnx.BatchStat(jnp.zeros(shape, mean_dtype))
        self.var = nnx.BatchStat(jnp.ones(shape, var_dtype))
        self.steps = nnx.BatchStat(jnp.zeros((), jnp.int32))

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
          use_running_average: takes precedence over the attribute.
          mask: boolean, broadcastable to `x`: the elements that count.

        Returns:
          Array of the shape of `x`.
        """
        inference = self._is_inference(use_running_average)
        options = self._options()
        x = self._input(x, options)
        mean, var = self.mean.get_value(), self.var.get_value()
        parameters = self._parameters()
        if inference:
            return options.normalize(x, mean, var, **parameters)
        steps = self.steps.get_value()
        result = renormalize(x, mask, mean, var, steps, options, self)
        self.mean.set_value(result.new_mean)
        self.var.set_value(result.new_var)
        self.steps.set_value(steps + 1)
        return options.normalize(x, result.mean, result.var, **parameters, center=result.center)
