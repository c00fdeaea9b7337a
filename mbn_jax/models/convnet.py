"""A small convolutional network for small images."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mbn_jax.models.remat import stage


class ConvNet(nn.Module):
    """3x3 convolutions, each with a norm and a ReLU, then a mean over space and a classifier.

    Every convolution but the first halves the image.

    Attributes:
      num_classes: outputs of the classifier.
      norm: factory of normalization layers, called with `use_running_average`.
      features: channels of each convolution.
      remat: whether the backward pass recomputes normalization and activation.
      conv: factory of convolutions, called as `nn.Conv` is.
      dtype: dtype of the computation.

    >>> from mbn_jax import MemorizedBatchNorm
    >>> model = ConvNet(num_classes=10, norm=MemorizedBatchNorm)
    >>> images = jnp.zeros((2, 8, 8, 1))
    >>> logits, _ = model.init_with_output(jax.random.key(0), images, train=False)
    >>> logits.shape
    (2, 10)
    """

    num_classes: int
    norm: Callable[..., nn.Module]
    features: Sequence[int] = (16, 32, 32, 64)
    remat: bool = False
    conv: Callable[..., nn.Module] = nn.Conv
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Returns float32 logits `[batch, classes]` for `[batch, height, width, channels]`."""
        x = x.astype(self.dtype)
        for i, features in enumerate(self.features):
            layer = functools.partial(
                ConvNet._layer, features=features, stride=1 if i == 0 else 2, train=train
            )
            x = stage(self.remat, layer)(self, x)
        x = x.mean((1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype)(x).astype(jnp.float32)

    def _layer(self, x: jax.Array, *, features: int, stride: int, train: bool) -> jax.Array:
        x = self.conv(features, (3, 3), stride, use_bias=False, dtype=self.dtype)(x)
        return nn.relu(self.norm(use_running_average=not train)(x))
