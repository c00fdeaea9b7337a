"""The order of the training examples: a function of the seed and the step alone.

So a run is the same on one host or many, and a resumed run continues as if it had never stopped.
"""

import numpy as np

from mbn_jax.datasets.split import Split
from mbn_jax.errors import UserError


class BatchOrder:
    """Says which examples are in the global batch of any step.

    Each epoch shuffles the examples anew. Batches run across the end of an epoch, so none is short.
    With `classes_per_batch`, the examples of each class are cut into chunks, and a batch consists
    of that many chunks, drawn at random and mixed: it has examples of at most that many classes.
    Examples that do not fill a chunk are left out of that epoch.
    """

    def __init__(self, split: Split, *, seed: int, batch_size: int, classes_per_batch: int = 0):
        """Prepares the order of global batches; `classes_per_batch` of 0 is no limit.

        Raises:
          UserError: if no class has enough examples for a chunk.
        """
        self.seed = seed
        self._drawn: dict[int, np.ndarray] = {}
        self.batch_size = batch_size
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
        """Returns the examples of steps `first` to `last` - 1, int32 `[steps, batch]`."""
        begin, end = first * self.batch_size, last * self.batch_size
        epochs = range(begin // self._length, -(-end // self._length))
        orders = [self._epoch(epoch) for epoch in epochs]
        # A copy of the order of millions takes as long as decoding an image.
        order = orders[0] if len(orders) == 1 else np.concatenate(orders)
        begin -= epochs.start * self._length
        return order[begin:][: (last - first) * self.batch_size].reshape(-1, self.batch_size)

    def _epoch(self, epoch: int) -> np.ndarray:
        drawn = self._drawn  # Threads may read across the end of an epoch.
        if epoch not in drawn:
            last = list(drawn.items())[-1:]
            self._drawn = drawn = {**dict(last), epoch: self._draw(epoch)}
        return drawn[epoch]

    def _draw(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(self._num_examples).astype(np.int32)
        if not self._chunk:
            return order
        chunks = []
        for label in np.unique(self._labels):
            examples = order[self._labels[order] == label]
            whole = len(examples) // self._chunk * self._chunk
            chunks.append(examples[:whole].reshape(-1, self._chunk))
        order = rng.permutation(np.concatenate(chunks)).reshape(-1)[: self._length]
        # A part of a batch, of one device for example, must not see one class alone.
        return rng.permuted(order.reshape(-1, self.batch_size), axis=1).reshape(-1)
