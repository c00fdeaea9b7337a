"""Residual networks: those of He et al. (2016) for CIFAR, and those for ImageNet (v1.5)."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mbn_jax.models.remat import stage


class ResidualBlock(nn.Module):
    """Options and shortcut of a residual block.

    Attributes:
      features: channels of its convolutions.
      stride: stride of the first 3x3 convolution.
      norm: factory of normalization layers, called with `use_running_average`.
      shortcut: where the shape changes, 'pad' (option A: every other pixel, new channels 0, no
        parameters) or 'projection' (option B: a strided 1x1 convolution and a norm).
      zero_init_last_scale: whether the block starts as its shortcut.
      conv: factory of convolutions, called as `nn.Conv` is.
      dtype: dtype of the computation.
    """

    features: int
    stride: int
    norm: Callable[..., nn.Module]
    shortcut: str = "projection"
    zero_init_last_scale: bool = False
    conv: Callable[..., nn.Module] = nn.Conv
    dtype: Any = jnp.float32

    def _add_shortcut(self, x: jax.Array, y: jax.Array, *, train: bool) -> jax.Array:
        """Normalizes the last convolution's output `y`, and adds the block's input `x`."""
        options = {"scale_init": nn.initializers.zeros} if self.zero_init_last_scale else {}
        norm = functools.partial(self.norm, use_running_average=not train)
        y = norm(**options)(y)
        if x.shape != y.shape and self.shortcut == "pad":
            x = x[:, :: self.stride, :: self.stride]
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, y.shape[-1] - x.shape[-1])))
        elif x.shape != y.shape:
            conv = functools.partial(self.conv, use_bias=False, dtype=self.dtype)
            x = norm()(conv(y.shape[-1], (1, 1), self.stride)(x))
        return nn.relu(y + x)


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions and a shortcut."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Returns `[batch, height / stride, width / stride, features]`."""
        conv = functools.partial(self.conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(self.norm, use_running_average=not train)
        y = nn.relu(norm()(conv(self.features, (3, 3), self.stride)(x)))
        return self._add_shortcut(x, conv(self.features, (3, 3))(y), train=train)


class BottleneckBlock(ResidualBlock):
    """1x1, 3x3 (strided: v1.5) and 1x1 convolutions and a shortcut."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Returns `[batch, height / stride, width / stride, 4 features]`."""
        conv = functools.partial(self.conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(self.norm, use_running_average=not train)
        y = nn.relu(norm()(conv(self.features, (1, 1))(x)))
        y = nn.relu(norm()(conv(self.features, (3, 3), self.stride)(y)))
        return self._add_shortcut(x, conv(4 * self.features, (1, 1))(y), train=train)


class ResNet(nn.Module):
    """A residual network.

    Attributes:
      num_classes: outputs of the classifier.
      norm: factory of normalization layers, called with `use_running_average`.
      block: class of the residual blocks.
      stage_sizes: blocks of each stage; every stage but the first halves the image.
      features: channels of the first stage; each further one has twice as many.
      large_images: begin with a strided 7x7 convolution and pooling (ImageNet), not 3x3 (CIFAR).
      shortcut: as for `ResidualBlock`.
      zero_init_last_scale: as for `ResidualBlock`.
      remat: whether the backward pass recomputes normalization and activation, stage by
        stage.
      conv: factory of convolutions, called as `nn.Conv` is.
      dtype: dtype of the computation.

    References:
      He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016; section 4.2
      for CIFAR. v1.5 strides in the 3x3 convolution of a bottleneck.

    >>> model = ResNet(10, nn.BatchNorm, BasicBlock, (1, 1, 1), features=16, shortcut='pad')
    >>> images = jnp.zeros((1, 16, 16, 3))
    >>> logits, _ = model.init_with_output(jax.random.key(0), images, train=False)
    >>> logits.shape
    (1, 10)
    """

    num_classes: int
    norm: Callable[..., nn.Module]
    block: Any
    stage_sizes: Sequence[int]
    features: int = 64
    large_images: bool = False
    shortcut: str = "projection"
    zero_init_last_scale: bool = False
    remat: bool = False
    conv: Callable[..., nn.Module] = nn.Conv
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Returns float32 logits `[batch, classes]` for `[batch, height, width, channels]`."""
        x = stage(self.remat, functools.partial(ResNet._stem, train=train))(self, x)
        for number in range(len(self.stage_sizes)):
            blocks = functools.partial(ResNet._stage, number=number, train=train)
            x = stage(self.remat, blocks)(self, x)
        x = x.mean((1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype)(x).astype(jnp.float32)

    def _stem(self, x: jax.Array, *, train: bool) -> jax.Array:
        conv = functools.partial(self.conv, self.features, use_bias=False, dtype=self.dtype)
        x = x.astype(self.dtype)
        x = conv((7, 7), 2, padding=3)(x) if self.large_images else conv((3, 3))(x)
        x = nn.relu(self.norm(use_running_average=not train)(x))
        if self.large_images:
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        return x

    def _stage(self, x: jax.Array, *, number: int, train: bool) -> jax.Array:
        for i in range(self.stage_sizes[number]):
            x = self.block(
                self.features * 2**number,
                2 if number and i == 0 else 1,
                self.norm,
                self.shortcut,
                self.zero_init_last_scale,
                self.conv,
                self.dtype,
            )(x, train=train)
        return x


def cifar_resnet(depth: int) -> Callable[..., ResNet]:
    """Returns the CIFAR network of 6n + 2 layers, with parameter-free shortcuts (option A).

    >>> cifar_resnet(20)(num_classes=10, norm=nn.BatchNorm).stage_sizes
    (3, 3, 3)
    """
    return functools.partial(
        ResNet,
        block=BasicBlock,
        stage_sizes=((depth - 2) // 6,) * 3,
        features=16,
        shortcut="pad",
    )


RESNETS = {f"cifar_resnet{depth}": cifar_resnet(depth) for depth in (8, 20, 32, 44, 56, 110)} | {
    f"resnet{depth}": functools.partial(
        ResNet, block=block, stage_sizes=stage_sizes, large_images=True
    )
    for depth, block, stage_sizes in (
        (18, BasicBlock, (2, 2, 2, 2)),
        (34, BasicBlock, (3, 4, 6, 3)),
        (50, BottleneckBlock, (3, 4, 6, 3)),
    )
}
