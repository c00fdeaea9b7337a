"""VGG-16 with normalization, for small images."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mbn_jax.models.remat import stage

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


class VGG16(nn.Module):
    """Thirteen 3x3 convolutions, each with a norm and a ReLU, five times pooled, and a classifier.

    The classifier is one layer on the mean over space, as is usual for CIFAR, in place of the three
    large ones for ImageNet.

    Attributes:
      num_classes: outputs of the classifier.
      norm: factory of normalization layers, called with `use_running_average`.
      remat: whether the backward pass recomputes normalization and activation.
      conv: factory of convolutions, called as `nn.Conv` is.
      dtype: dtype of the computation.

    References:
      Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
      ICLR 2015, configuration D; the norms are later practice.
    """

    num_classes: int
    norm: Callable[..., nn.Module]
    remat: bool = False
    conv: Callable[..., nn.Module] = nn.Conv
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Returns float32 logits `[batch, classes]` for images of 32x32 pixels or more."""
        x = x.astype(self.dtype)
        for features, count in STAGES:
            layers = functools.partial(VGG16._stage, features=features, count=count, train=train)
            x = stage(self.remat, layers)(self, x)
        x = x.mean((1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype)(x).astype(jnp.float32)

    def _stage(self, x: jax.Array, *, features: int, count: int, train: bool) -> jax.Array:
        for _ in range(count):
            x = self.conv(features, (3, 3), use_bias=False, dtype=self.dtype)(x)
            x = nn.relu(self.norm(use_running_average=not train)(x))
        return nn.max_pool(x, (2, 2), (2, 2))
