"""Convolutions whose kernels are centered or standardized, by name."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax


def centered(kernel: jax.Array) -> jax.Array:
    """Returns a kernel `[..., in, out]` of mean 0 in each output channel.

    >>> centered(jnp.array([[1.0], [3.0]])).tolist()
    [[-1.0], [1.0]]
    """
    return kernel - kernel.mean(tuple(range(kernel.ndim - 1)), keepdims=True)


def standardized(kernel: jax.Array, epsilon: float = 1e-10) -> jax.Array:
    """Returns a kernel `[..., in, out]` of mean 0 and variance 1 / inputs in each output channel.

    Inputs are the values that one output sums over; dividing by their number keeps the scale of
    the usual initialization. Computed in float32 or wider.

    References:
      Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight
      Standardization" (arXiv 1903.10520).

    >>> jnp.square(standardized(jnp.array([[1.0], [3.0]]))).round(3).tolist()
    [[0.5], [0.5]]
    """
    axes = tuple(range(kernel.ndim - 1))
    wide = centered(kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32)))
    scale = lax.rsqrt(jnp.square(wide).sum(axes, keepdims=True) + epsilon)
    return (wide * scale).astype(kernel.dtype)


def _convolution(change: Callable[[jax.Array], jax.Array]) -> Callable[..., nn.Module]:
    """Returns `nn.Conv` with each use of its kernel changed; the parameters stay as they are."""

    def convolve(inputs: jax.Array, kernel: jax.Array, *args: Any, **options: Any) -> jax.Array:
        return lax.conv_general_dilated(inputs, change(kernel), *args, **options)

    return functools.partial(nn.Conv, conv_general_dilated=convolve)


CONVOLUTIONS: dict[str, Callable[..., nn.Module]] = {
    "plain": nn.Conv,
    "centered": _convolution(centered),
    "standardized": _convolution(standardized),
}
"""Factories of convolutions, called as `nn.Conv` is."""
