"""The baseline without normalization."""

import jax
import jax.numpy as jnp
from flax import linen as nn


class Affine(nn.Module):
    """A learned scale and bias per channel and nothing else.

    Attributes:
      use_running_average: ignored; networks pass it to every normalization layer.
      dtype: dtype of the result; default: that of the input.
      scale_init: initializer of the scale.

    >>> Affine().init(jax.random.key(0), jnp.zeros((2, 3)))['params']['scale'].tolist()
    [1.0, 1.0, 1.0]
    """

    use_running_average: bool | None = None
    dtype: jnp.dtype | None = None
    scale_init: nn.initializers.Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns x * scale + bias, for x `[..., channels]`."""
        shape = (x.shape[-1],)
        scale = self.param("scale", self.scale_init, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        broadcast = (1,) * (x.ndim - 1) + shape
        y = x * scale.reshape(broadcast) + bias.reshape(broadcast)
        return y.astype(self.dtype or x.dtype)
