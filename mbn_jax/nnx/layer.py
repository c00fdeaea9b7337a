"""What the normalization layers for `flax.nnx` share: options, parameters, the flag."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mbn_jax.core.moments import Array, AxisName
from mbn_jax.core.normalization import NormOptions


class NormLayer(nnx.Module):
    """Options and parameters of a normalization layer, as of `flax.nnx.BatchNorm`."""

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        use_running_average: bool | None,
        axis: int | Sequence[int],
        epsilon: float,
        dtype: Any,
        param_dtype: Any,
        use_bias: bool,
        use_scale: bool,
        bias_init: Any,
        scale_init: Any,
        axis_name: AxisName | None,
        axis_index_groups: Sequence[Sequence[int]] | None,
        use_fast_variance: bool,
        force_float32_reductions: bool,
        bias_metadata: Mapping[str, Any],
        scale_metadata: Mapping[str, Any],
        rngs: nnx.Rngs,
    ):
        shape = (num_features,) if isinstance(num_features, int) else tuple(num_features)

        def parameter(is_used: bool, init: Any, metadata: Mapping[str, Any]) -> Any:
            if not is_used:
                return nnx.data(None)
            return nnx.Param(init(rngs.params(), shape, param_dtype), **metadata)

        self.scale = parameter(use_scale, scale_init, scale_metadata)
        self.bias = parameter(use_bias, bias_init, bias_metadata)
        self.num_features = num_features if isinstance(num_features, int) else shape
        self.use_running_average = use_running_average
        self.axis = axis if isinstance(axis, int) else tuple(axis)
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.axis_name = axis_name
        # Hashable, as nnx.jit needs it.
        groups = axis_index_groups
        self.axis_index_groups = None if groups is None else tuple(map(tuple, groups))
        self.use_fast_variance = use_fast_variance
        self.force_float32_reductions = force_float32_reductions

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Called by `nnx.view`.

        Args:
          use_running_average: if True, normalize by the statistics that are kept, and keep them.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def _options(self) -> NormOptions:
        return NormOptions.of(self, "", synced=True)

    def _feature_shape(self) -> tuple[int, ...]:
        features = self.num_features
        return (features,) if isinstance(features, int) else features

    def _statistics_dtype(self) -> Any:
        """Returns the dtype of inputs that the statistics are made for."""
        return jnp.dtype(self.dtype or self.param_dtype)

    def _is_inference(self, use_running_average: bool | None) -> bool:
        """Returns the flag of the call, or else of the attribute."""
        flag = self.use_running_average if use_running_average is None else use_running_average
        if flag is None:
            raise ValueError(
                f"{type(self).__name__} needs use_running_average: give it to the layer or in the "
                "call, or call model.train() or model.eval()."
            )
        return flag

    def _input(self, x: Array, options: NormOptions) -> Array:
        """Returns the input as an array; raises ValueError where it does not fit the layer."""
        x = options.as_input(x)
        expected, found = self._feature_shape(), options.feature_shape(x)
        if found != expected:
            raise ValueError(
                f"{options.layer} expected {self.num_features} features (num_features) on "
                f"axis={self.axis}, got an input of shape {x.shape}."
            )
        return x

    def _parameters(self) -> dict[str, jax.Array | None]:
        """Returns scale and bias, as `NormOptions.normalize` takes them."""
        parameters = {"scale": self.scale, "bias": self.bias}
        return {
            name: None if variable is None else variable.get_value()
            for name, variable in parameters.items()
        }
