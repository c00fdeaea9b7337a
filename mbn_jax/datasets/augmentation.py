"""What a device does to a batch of images before the network sees it: standardize and augment.

Every random draw is a function of the seed, the step and the position in the global batch.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mbn_jax.datasets.split import Examples


def look_up(data: Examples | None, batch: jax.Array | Examples) -> Examples:
    """Returns the examples of a batch.

    Args:
      data: the whole split on the device; None for a split that is decoded as it is used.
      batch: indices into `data`, or examples, which pass through.
    """
    if isinstance(batch, dict):
        return batch
    if data is None:
        raise ValueError("A batch of indices needs the split that they are indices into.")
    return {name: array[batch] for name, array in data.items()}


def standardize(images: jax.Array, mean: np.ndarray, std: np.ndarray) -> jax.Array:
    """Returns (images - mean) / std in float32.

    Args:
      images: `[..., channels]`.
      mean: `[channels]`.
      std: `[channels]`.

    >>> standardize(jnp.array([[7]], jnp.uint8), np.array([3.0]), np.array([2.0])).tolist()
    [[2.0]]
    """
    shape = (1,) * (images.ndim - 1) + (-1,)
    return (images.astype(jnp.float32) - mean.reshape(shape)) / std.reshape(shape)


def augment(images: jax.Array, keys: jax.Array, *, crop_padding: int, flip: bool) -> jax.Array:
    """Shifts each image by up to `crop_padding` pixels (filled with 0) and flips half of them.

    Args:
      images: `[batch, height, width, channels]`, standardized, so that 0 is the mean.
      keys: `[batch]`, a random key for each image.
      crop_padding: pixels added on each side before the crop; 0: no crop.
      flip: whether to mirror left and right with probability 1/2.

    Returns:
      Images of the same shape.
    """

    def augment_one(image: jax.Array, key: jax.Array) -> jax.Array:
        crop_key, flip_key = jax.random.split(key)
        if crop_padding:
            pad = (crop_padding, crop_padding)
            start = jax.random.randint(crop_key, (2,), 0, 2 * crop_padding + 1)
            padded = jnp.pad(image, (pad, pad, (0, 0)))
            image = jax.lax.dynamic_slice(padded, (start[0], start[1], 0), image.shape)
        if flip:
            image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
        return image

    return jax.vmap(augment_one)(images, keys) if crop_padding or flip else images


def example_keys(key: jax.Array, step: jax.Array, positions: jax.Array) -> jax.Array:
    """Returns a random key for each example of a batch.

    Args:
      key: random key.
      step: int32 scalar, training step.
      positions: int32 `[batch]`, the examples' positions in the global batch.
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), positions)
