"""What the normalization layers for `flax.linen` share: options, parameters, the flag."""

from typing import Any

from flax import linen as nn

from mbn_jax.core.moments import Array
from mbn_jax.core.normalization import NormOptions


def options_of(layer: Any) -> NormOptions:
    """Returns a layer's options; initialization needs no named axis."""
    return NormOptions.of(layer, "/".join(layer.path), synced=not layer.is_initializing())


def is_inference(layer: Any, use_running_average: bool | None) -> bool:
    """Returns whether this is inference; either the attribute or the argument says so."""
    return nn.merge_param("use_running_average", layer.use_running_average, use_running_average)


def scale_and_bias(layer: Any, shape: tuple[int, ...]) -> dict[str, Array | None]:
    """Declares the learned parameters of a layer, as `NormOptions.normalize` takes them."""
    names = {"scale": layer.use_scale, "bias": layer.use_bias}
    inits = {"scale": layer.scale_init, "bias": layer.bias_init}
    return {
        name: layer.param(name, inits[name], shape, layer.param_dtype) if is_used else None
        for name, is_used in names.items()
    }
