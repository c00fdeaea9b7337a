"""A U-Net, images of shapes on textured ground, and a loss for each pixel."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

CLASSES = 3
"""Ground, disk, square."""


class UNet(nn.Module):
    """Two levels down and up again, with skip connections.

    Attributes:
      norm: factory of normalization layers, called with `use_running_average`.
      width: channels of the first level.
    """

    norm: Callable[..., nn.Module]
    width: int = 8

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns logits `[batch, height, width, CLASSES]` of images `[..., channels]`."""

        def block(x: jax.Array, features: int) -> jax.Array:
            x = nn.Conv(features, (3, 3), use_bias=False)(x)
            return nn.relu(self.norm(use_running_average=not train)(x))

        skips = []
        for level in range(2):
            x = block(x, self.width * 2**level)
            skips.append(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = block(x, self.width * 4)
        for level in reversed(range(2)):
            x = x.repeat(2, axis=1).repeat(2, axis=2)
            x = block(jnp.concatenate([x, skips[level]], axis=-1), self.width * 2**level)
        return nn.Conv(CLASSES, (1, 1))(x)


class Shapes:
    """A data source: a disk and a square with a texture of their own, on textured ground."""

    def __init__(self, split: str, data_dir: str | None, examples: int = 320, size: int = 24):
        """Makes nothing yet: each image is a function of its split and its index.

        Args:
          split: 'train' or 'test'.
          data_dir: not used.
          examples: training images; there are half as many test images.
          size: height and width.
        """
        self._seed = {"train": 0, "test": 1}[split]
        self._count = examples if split == "train" else examples // 2
        self._size = size

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self._seed, index))
        y, x = np.mgrid[: self._size, : self._size]
        label = np.zeros((self._size, self._size), np.int32)
        image = self._texture(rng)
        for shape in (1, 2):
            (cy, cx), radius = rng.uniform(5, self._size - 5, 2), rng.uniform(3, 6)
            dy, dx = abs(y - cy), abs(x - cx)
            inside = (dy**2 + dx**2 if shape == 1 else np.maximum(dy, dx) ** 2) < radius**2
            image = np.where(inside[..., None], self._texture(rng), image)
            label[inside] = shape
        return {"image": image + rng.normal(0, 0.2, image.shape), "label": label}

    def _texture(self, rng: np.random.Generator) -> np.ndarray:
        y, x = np.mgrid[: self._size, : self._size]
        waves = [np.sin(rng.uniform(-1, 1) * y + rng.uniform(-1, 1) * x) for _ in range(3)]
        return rng.normal(0, 1, 1) + 0.5 * np.stack(waves, axis=-1)


class PixelLoss:
    """Cross-entropy for each pixel; intersection over union of the shapes."""

    def __call__(self, apply: Callable, batch: dict[str, jax.Array]):
        """Returns (loss, (metrics, updates)) in training."""
        logits, updates = apply(batch["image"], train=True)
        loss, (intersection, union) = self._measure(logits, batch["label"])
        iou = intersection.sum() / jnp.maximum(union.sum(), 1)
        return loss.mean(), ({"iou": iou}, updates)

    def eval_metrics(self, apply: Callable, batch: dict[str, jax.Array]):
        """Returns the loss of each example, and the parts of the ratio."""
        loss, iou = self._measure(apply(batch["image"], train=False), batch["label"])
        return {"loss": loss, "iou": iou}

    def _measure(self, logits: jax.Array, label: jax.Array):
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, label).mean((1, 2))
        found = logits.argmax(-1)
        is_shape = (found > 0).astype(jnp.int32) + (label > 0)
        right = ((found == label) & (label > 0)).sum((1, 2))
        # A pixel of one shape that is taken for the other is in the union twice.
        return loss, (right, is_shape.sum((1, 2)) - right)


adamw = functools.partial(optax.adamw, b2=0.99)
