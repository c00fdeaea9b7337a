"""From a split to training batches: order by Grain on the host, pixels under jit on the device.

The order and every random draw are functions of (seed, step, position in the global batch) alone,
so a run is the same on one host or many, and a resumed run goes on as if never stopped.
"""

import os
from collections.abc import Iterator

import grain
import jax
import jax.numpy as jnp
import numpy as np

from mbn_jax.datasets.images import Split

STATISTICS_EXAMPLES = 10_000


def training_batches(
    split: Split,
    *,
    seed: int,
    batch_size: int,
    first_step: int,
    num_steps: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields this host's part of the global batches of steps `first_step` to `num_steps` - 1.

    The split is shuffled anew each epoch; batches run across the end of an epoch, so none is short.

    Args:
      split: what to read.
      seed: of the order.
      batch_size: global, a multiple of `process_count`.
      first_step: 0, or the step that a resumed run goes on with.
      num_steps: of the whole run.
      process_index: of this host.
      process_count: number of hosts.

    Yields:
      'index' int32 `[local batch]` for a split in memory; else 'image' and 'label', decoded.
    """
    local = batch_size // process_count
    part = slice(process_index * local, (process_index + 1) * local)

    def load(indices: np.ndarray) -> dict[str, np.ndarray]:
        indices = indices[part].astype(np.int32)
        return {"index": indices} if split.images is not None else split.read(indices)

    order = grain.MapDataset.range(len(split)).seed(seed).shuffle().repeat()
    batches = order.batch(batch_size, drop_remainder=True).slice(slice(first_step, num_steps))
    # Whole batches are read ahead: few of them, because they may be large.
    threads = os.cpu_count() or 1
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(batches.map(load).to_iter_dataset(options))


def evaluation_batches(
    split: Split, batch_size: int, *, process_index: int = 0, process_count: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """Yields this host's part of every example once, in global batches of `batch_size`.

    The last batch is padded, and its 'mask' is False there.

    Args:
      split: what to read.
      batch_size: global, a multiple of `process_count`.
      process_index: of this host.
      process_count: number of hosts.

    Yields:
      'index' (or 'image' and 'label') as `training_batches`, and 'mask' bool `[local batch]`.
    """
    local = batch_size // process_count
    for start in range(process_index * local, len(split) + process_index * local, batch_size):
        positions = np.arange(start, start + local)
        indices = np.minimum(positions, len(split) - 1).astype(np.int32)
        batch = {"index": indices} if split.images is not None else split.read(indices)
        yield {**batch, "mask": positions < len(split)}


def pixel_statistics(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation of each channel, float32, over up to 10,000 examples."""
    count = min(len(split), STATISTICS_EXAMPLES)
    images = split.read(np.linspace(0, len(split) - 1, count).astype(int))["image"]
    pixels = images.reshape(-1, images.shape[-1])
    std = pixels.std(0, dtype=np.float64)
    mean = pixels.mean(0, dtype=np.float64)
    return mean.astype(np.float32), np.where(std > 0, std, 1).astype(np.float32)


def take(data: dict[str, jax.Array], batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Looks a batch's 'index' up in the data set on the device; decoded batches pass through."""
    if "index" not in batch:
        return batch
    found = {key: data[key][batch["index"]] for key in ("image", "label")}
    return {**{k: v for k, v in batch.items() if k != "index"}, **found}


def standardize(images: jax.Array, mean: np.ndarray, std: np.ndarray) -> jax.Array:
    """Returns (images - mean) / std in float32, for uint8 `[..., channels]`.

    >>> standardize(jnp.array([[7]], jnp.uint8), np.array([3.0]), np.array([2.0])).tolist()
    [[2.0]]
    """
    shape = (1,) * (images.ndim - 1) + (-1,)
    return (images.astype(jnp.float32) - mean.reshape(shape)) / std.reshape(shape)


def augment(images: jax.Array, keys: jax.Array, *, crop_padding: int, flip: bool) -> jax.Array:
    """Shifts each image by up to `crop_padding` pixels (filled with 0) and flips half of them.

    Args:
      images: `[batch, height, width, channels]`, standardized, so that 0 is the mean.
      keys: `[batch]` random keys, one an image.
      crop_padding: pixels added on each side before the crop; 0 = no crop.
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
    """Returns a random key an example, a function of (key, step, position in the global batch)."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), positions)
