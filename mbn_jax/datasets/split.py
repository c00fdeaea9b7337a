"""One split of a data set, and how its examples are read."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np

from mbn_jax.datasets.images import ImageReader
from mbn_jax.errors import UserError

EXAMPLES_PER_THREAD = 64


Examples = dict[str, Any]
"""Arrays of examples by name: a whole split `[examples, ...]`, a batch `[batch, ...]`, or a stack
of batches `[steps, batch, ...]`. Image classification has 'image' `[..., height, width, channels]`
and 'label' `[...]`, int32."""


class ArraySpec(NamedTuple):
    """Shape and dtype of an array of one example."""

    shape: tuple[int, ...]
    dtype: np.dtype


class Source(Protocol):
    """Random access to examples, dicts of arrays."""

    def __len__(self) -> int:
        """Returns the number of examples."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Reads one example."""


class StoredRange(NamedTuple):
    """Neighbouring examples of a data set as it is stored.

    Attributes:
      split: name of the stored split.
      start: first example.
      stop: the example after the last one.
    """

    split: str
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Split:
    """A split of a data set, in memory where it fits and on disk otherwise.

    Attributes:
      name: TFDS split, for example 'train[:90%]'.
      ranges: the stored examples that it consists of.
      source: examples by index.
      spec: shape and dtype of each array of an example, as `read` returns it.
      num_classes: number of labels; None: the data set does not say.
      images: decodes 'image', which is an image file in the source; None: it has arrays.
      in_memory: all examples as `read` returns them; None where they stay on disk.
    """

    name: str
    ranges: tuple[StoredRange, ...]
    source: Source
    spec: Mapping[str, ArraySpec]
    num_classes: int | None
    images: ImageReader | None = None
    in_memory: Examples | None = None

    def __len__(self) -> int:
        return len(self.source)

    def read(self, indices: np.ndarray, crop_keys: Iterable[tuple[int, ...]] = ()) -> Examples:
        """Reads examples, their images decoded, cropped and resized as the split says.

        Args:
          indices: `[n]`.
          crop_keys: one for each example; its random crop is a function of it. Without keys the
            centre is cropped.

        Returns:
          `n` examples.

        Raises:
          UserError: for the first example that is damaged or not what its data set declares.
        """
        if self.in_memory is not None:
            return {name: array[indices] for name, array in self.in_memory.items()}
        count = len(indices)
        found = {n: np.empty((count, *shape), dtype) for n, (shape, dtype) in self.spec.items()}
        for row, (index, key) in enumerate(itertools.zip_longest(indices, crop_keys)):
            example = self.source[int(index)]
            if self.images is not None:
                example["image"] = self.images.read(example["image"], int(index), key)
            for name, array in found.items():
                array[row] = example[name]
        return found

    def read_in_threads(
        self, indices: np.ndarray, crop_keys: Sequence[tuple[int, ...]] = ()
    ) -> Examples:
        """Reads many examples, as `read` does."""
        if self.in_memory is not None:  # There is nothing to decode.
            return self.read(indices)
        starts = range(0, len(indices), EXAMPLES_PER_THREAD)
        chunks = [
            (indices[i : i + EXAMPLES_PER_THREAD], crop_keys[i : i + EXAMPLES_PER_THREAD])
            for i in starts
        ]
        with ThreadPoolExecutor() as pool:  # Decoders release the interpreter lock.
            parts = list(pool.map(self.read, *zip(*chunks, strict=True)))
        return {name: np.concatenate([part[name] for part in parts]) for name in self.spec}

    def read_labels(self) -> np.ndarray:
        """Returns the labels of all examples, int32, without decoding an image.

        Raises:
          UserError: where the data set has no whole number 'label' for each example.
        """
        label = self.spec.get("label")
        if label is None or label.shape or label.dtype.kind not in "iu":
            raise UserError(
                f"dataset.classes_per_batch needs a whole number 'label' for each example of split "
                f"{self.name!r}; set it to 0."
            )
        if self.in_memory is not None:
            return self.in_memory["label"]
        labels = [self.source[i]["label"] for i in range(len(self))]
        return np.array(labels, np.int32)

    def zeros(self, size: int) -> Examples:
        """Returns a batch of zeros, for shapes and dtypes."""
        return {n: np.zeros((size, *shape), dtype) for n, (shape, dtype) in self.spec.items()}

    def count_shared(self, other: "Split") -> int:
        """Returns how many stored examples two splits of one data set have in common.

        An example that a split has twice counts twice.
        """
        return sum(
            max(0, min(a.stop, b.stop) - max(a.start, b.start))
            for a in self.ranges
            for b in other.ranges
            if a.split == b.split
        )

    def holds_the_same(self, other: "Split") -> bool:
        """Returns whether two splits in memory have the same examples in the same order."""
        mine, theirs = self.in_memory, other.in_memory
        if mine is None or theirs is None or sorted(mine) != sorted(theirs):
            return False
        # A value that is missing is NaN in both.
        return all(
            np.array_equal(mine[name], theirs[name], equal_nan=mine[name].dtype.kind == "f")
            for name in mine
        )


def in_memory_if_small(split: Split, max_bytes: int) -> Split:
    """Returns a split with its examples in memory, unless they have more bytes."""
    size = sum(np.prod(s.shape, dtype=int) * s.dtype.itemsize for s in split.spec.values())
    crops = split.images is not None and split.images.random_resized_crop
    if crops or len(split) * size > max_bytes:
        return split
    return dataclasses.replace(split, in_memory=split.read_in_threads(np.arange(len(split))))
