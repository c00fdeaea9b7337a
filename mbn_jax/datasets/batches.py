"""Batches of a split for one host: training batches in their order, evaluation batches once.

A split that is in memory is held by the devices, and its batches are indices; a split on disk is
decoded and cropped here.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from mbn_jax.datasets.order import BatchOrder
from mbn_jax.datasets.split import Examples, Split
from mbn_jax.datasets.workers import begin_worker

STATISTICS_EXAMPLES = 10_000

EXAMPLES_PER_CHUNK = 32
"""Examples that a thread or process decodes at a time. What is read ahead is a few of these for
each, so that memory grows neither with the batch nor with the run."""


class EvalBatch(NamedTuple):
    """A batch in which padding does not count.

    Attributes:
      examples: indices int32 `[batch]` for a split in memory, else `Examples`.
      mask: bool `[batch]`, False for padding.
    """

    examples: Any
    mask: Any


@dataclasses.dataclass(frozen=True)
class HostBatches:
    """One host's part of the training batches; it travels to worker processes."""

    split: Split
    order: BatchOrder
    process_index: int = 0
    process_count: int = 1

    def indices(self, first: int, last: int) -> np.ndarray:
        """Returns the examples of steps `first` to `last` - 1, int32 `[steps, local batch]`."""
        indices = self.order.steps(first, last)
        local = indices.shape[1] // self.process_count
        return indices[:, self.process_index * local :][:, :local]

    @property
    def chunks_per_step(self) -> int:
        """Chunks that this host's part of a batch is decoded in."""
        return -(-self.order.batch_size // self.process_count // EXAMPLES_PER_CHUNK)

    def read_chunk(self, number: int) -> Examples:
        """Reads a chunk, counted from step 0; crops are functions of (seed, step, position)."""
        step, chunk = divmod(number, self.chunks_per_step)
        indices = self.indices(step, step + 1)[0]
        start = chunk * EXAMPLES_PER_CHUNK
        first = self.process_index * len(indices) + start
        indices = indices[start:][:EXAMPLES_PER_CHUNK]
        keys = [(self.order.seed, step, first + i) for i in range(len(indices))]
        return self.split.read(indices, keys)


def training_batches(
    host: HostBatches,
    *,
    first_step: int,
    num_steps: int,
    steps_per_stack: int,
    num_workers: int = 0,
) -> Iterator[np.ndarray | Examples]:
    """Yields this host's batches of steps `first_step` to `num_steps` - 1, several at a time.

    A split on disk is decoded by `num_workers` processes; 0: by threads of this one.

    Yields:
      For a split in memory, indices int32 `[steps, local batch]`, the last stack padded with 0.
      Else `Examples` `[steps, local batch, ...]`, the last stack with as many steps as are left.
    """
    starts = range(first_step, num_steps, steps_per_stack)
    if host.split.in_memory is not None:
        for step in starts:
            indices = host.indices(step, min(step + steps_per_stack, num_steps))
            yield np.pad(indices, ((0, steps_per_stack - len(indices)), (0, 0)))
        return
    import grain  # It takes a tenth of a second, for a split that is on disk.
    from absl import flags

    threads = 1 if num_workers else os.cpu_count() or 1
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    chunks = host.chunks_per_step
    numbers = grain.MapDataset.range(first_step * chunks, num_steps * chunks)
    batches = numbers.map(host.read_chunk).to_iter_dataset(options)
    if num_workers:
        if not flags.FLAGS.is_parsed():  # Grain reads absl flags, which the program may not use.
            flags.FLAGS.mark_as_parsed()
        workers = grain.MultiprocessingOptions(num_workers=num_workers)
        batches = batches.mp_prefetch(workers, worker_init_fn=begin_worker)
    with contextlib.closing(iter(batches)) as decoded:
        for step in starts:
            steps = min(steps_per_stack, num_steps - step)
            yield _stacked(decoded, steps, steps * chunks)


def _stacked(chunks: Iterator[Examples], steps: int, count: int) -> Examples:
    """Returns the next chunks as arrays of their own: those of workers are in shared memory."""
    stack = [next(chunks) for _ in range(count)]
    joined = {name: np.concatenate([chunk[name] for chunk in stack]) for name in stack[0]}
    return {name: x.reshape(steps, -1, *x.shape[1:]) for name, x in joined.items()}


def evaluation_batches(
    split: Split,
    batch_size: int,
    *,
    num_examples: int = 0,
    crop_seed: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[EvalBatch]:
    """Yields this host's part of every example once, the last batch padded.

    Args:
      split: split to read.
      batch_size: examples in a global batch, a multiple of `process_count`.
      num_examples: read only this many, evenly spaced, in random order, so that each batch is a
        fair sample; 0: all, in the order in which they are stored.
      crop_seed: seed of random crops, if the split has them; None: crop the centre.
      process_index: number of this host.
      process_count: number of hosts.

    Yields:
      Batches of `batch_size / process_count` examples.
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
        in_memory = split.in_memory is not None
        batch = indices if in_memory else split.read_in_threads(indices, keys)
        yield EvalBatch(batch, positions < count)


def pixel_statistics(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation of each channel of 'image', float32 `[channels]`.

    Computed over up to `STATISTICS_EXAMPLES` examples, evenly spaced.
    """
    count = min(len(split), STATISTICS_EXAMPLES)
    images = split.read_in_threads(np.linspace(0, len(split) - 1, count).astype(int))["image"]
    pixels = images.reshape(-1, images.shape[-1])
    std = pixels.std(0, dtype=np.float64)
    mean = pixels.mean(0, dtype=np.float64)
    return mean.astype(np.float32), np.where(std > 0, std, 1).astype(np.float32)
