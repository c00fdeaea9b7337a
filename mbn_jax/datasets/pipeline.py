"""From a split to training batches: order and decoding on the host, pixels under jit on the device.

The order and every random draw are functions of (seed, step, position in the global batch) alone,
so a run is the same on one host or many, and a resumed run goes on as if never stopped.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from mbn_jax.datasets.images import Split
from mbn_jax.errors import UserError

STATISTICS_EXAMPLES = 10_000


class BatchOrder:
    """Which examples are in the global batch of any step, as a function of seed and step.

    Examples are shuffled anew each epoch; batches run across the end of an epoch, so none is short.
    With `classes_per_batch`, each class's examples are cut into chunks, and a batch is so many
    chunks drawn at random: it sees at most so many classes. What does not fill a chunk is left out
    of that epoch.
    """

    def __init__(self, split: Split, *, seed: int, batch_size: int, classes_per_batch: int = 0):
        """Raises UserError where the split has no batch of so few classes."""
        self.seed = seed
        self._batch_size = batch_size
        self._num_examples = len(split)
        self._chunk = batch_size // classes_per_batch if classes_per_batch else 0
        self._length = self._num_examples
        if not classes_per_batch:
            return
        self._labels = split.read_labels()
        chunks = (np.bincount(self._labels) // self._chunk).sum()
        self._length = chunks // classes_per_batch * batch_size
        if not self._length:
            raise UserError(
                f"dataset.classes_per_batch={classes_per_batch} needs {self._chunk} examples of "
                f"a class, more than split {split.name!r} has; raise it or lower batch_size."
            )

    def steps(self, first: int, last: int) -> np.ndarray:
        """Returns the indices of steps `first` to `last` - 1, int32 `[steps, batch]`."""
        begin, end = first * self._batch_size, last * self._batch_size
        epochs = range(begin // self._length, -(-end // self._length))
        order = np.concatenate([self._epoch(epoch) for epoch in epochs])
        begin -= epochs.start * self._length
        return order[begin:][: (last - first) * self._batch_size].reshape(-1, self._batch_size)

    @functools.lru_cache(maxsize=2)  # noqa: B019  # Lives as long as the run.
    def _epoch(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(self._num_examples).astype(np.int32)
        if not self._chunk:
            return order
        chunks = []
        for label in np.unique(self._labels):
            examples = order[self._labels[order] == label]
            whole = len(examples) // self._chunk * self._chunk
            chunks.append(examples[:whole].reshape(-1, self._chunk))
        return rng.permutation(np.concatenate(chunks)).reshape(-1)[: self._length]


@dataclasses.dataclass(frozen=True)
class HostBatches:
    """One host's part of the training batches; travels to worker processes.

    Attributes:
      split: what to read.
      order: of its examples.
      process_index: of this host.
      process_count: number of hosts.
    """

    split: Split
    order: BatchOrder
    process_index: int
    process_count: int

    def indices(self, first: int, last: int) -> np.ndarray:
        """Returns the examples of steps `first` to `last` - 1, int32 `[steps, local batch]`."""
        indices = self.order.steps(first, last)
        local = indices.shape[1] // self.process_count
        return indices[:, self.process_index * local :][:, :local]

    def read(self, step: int) -> dict[str, np.ndarray]:
        """Reads the batch of a step, decoded, and cropped by (seed, step, position)."""
        indices = self.indices(step, step + 1)[0]
        first = self.process_index * len(indices)
        keys = [(self.order.seed, step, first + i) for i in range(len(indices))]
        return self.split.read(indices, keys)


def training_blocks(
    split: Split,
    order: BatchOrder,
    *,
    first_step: int,
    num_steps: int,
    steps_per_block: int,
    num_workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields this host's part of the global batches of steps `first_step` to `num_steps` - 1.

    Args:
      split: what to read.
      order: of its examples.
      first_step: 0, or the step that a resumed run goes on with.
      num_steps: of the whole run.
      steps_per_block: steps handed over at once.
      num_workers: processes that decode what is not in memory; 0: threads of this one.
      process_index: of this host.
      process_count: number of hosts.

    Yields:
      'index' int32 `[steps, local batch]` for a split in memory, the last block filled up with 0;
      else 'image' and 'label', decoded, `[steps, local batch, ...]`, the last block as it is left.
    """
    host = HostBatches(split, order, process_index, process_count)
    if split.images is not None:
        for step in range(first_step, num_steps, steps_per_block):
            indices = host.indices(step, min(step + steps_per_block, num_steps))
            yield {"index": np.pad(indices, ((0, steps_per_block - len(indices)), (0, 0)))}
        return
    # Whole batches are read ahead: few of them, because they may be large.
    threads = 1 if num_workers else os.cpu_count() or 1
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    batches = grain.MapDataset.range(first_step, num_steps).map(host.read).to_iter_dataset(options)
    if num_workers:
        if not flags.FLAGS.is_parsed():  # Grain looks for flags of absl, which may be unused.
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
    with contextlib.closing(iter(batches)) as decoded:
        for step in range(first_step, num_steps, steps_per_block):
            stack = [next(decoded) for _ in range(min(steps_per_block, num_steps - step))]
            yield {key: np.stack([batch[key] for batch in stack]) for key in stack[0]}


def evaluation_batches(
    split: Split,
    batch_size: int,
    *,
    num_examples: int = 0,
    crop_seed: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields this host's part of every example once, in global batches of `batch_size`.

    The last batch is padded, and its 'mask' is False there.

    Args:
      split: what to read.
      batch_size: global, a multiple of `process_count`.
      num_examples: only so many, evenly spaced, in an order without pattern, so that each batch is
        a fair sample; 0: all, as they are stored.
      crop_seed: of random crops, where the split has them; None: the centre.
      process_index: of this host.
      process_count: number of hosts.

    Yields:
      'index' int32 `[local batch]` for a split in memory, else 'image' and 'label', decoded; and
      'mask' bool `[local batch]`.
    """
    local = batch_size // process_count
    count = min(num_examples or len(split), len(split))
    examples = np.linspace(0, len(split) - 1, count).round().astype(np.int32)
    if num_examples:
        examples = np.random.default_rng(0).permutation(examples)
    for start in range(process_index * local, count + process_index * local, batch_size):
        positions = np.arange(start, start + local)
        indices = examples[np.minimum(positions, count - 1)]
        keys = [(crop_seed, int(p)) for p in positions] if crop_seed is not None else []
        in_memory = split.images is not None
        batch = {"index": indices} if in_memory else split.read_in_threads(indices, keys)
        yield {**batch, "mask": positions < count}


def pixel_statistics(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation of each channel, float32, over up to 10,000 examples."""
    count = min(len(split), STATISTICS_EXAMPLES)
    images = split.read_in_threads(np.linspace(0, len(split) - 1, count).astype(int))["image"]
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
    """Returns (images - mean) / std in float32, for `[..., channels]`.

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
