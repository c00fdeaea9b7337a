"""One split of a data set, and how its examples are read."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np

from mbn_jax.datasets.crops import center_box, random_box, resize
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
      encoded: the same examples with encoded images, to read labels alone.
      spec: shape and dtype of each array of an example, as `read` returns it.
      num_classes: number of labels; None: the data set does not say.
      in_memory: all examples as `read` returns them; None where they stay on disk.
      resizes: whether `read` gives each 'image' the shape of the spec.
      random_resized_crop: whether it crops them at random for that.
    """

    name: str
    ranges: tuple[StoredRange, ...]
    source: Source
    encoded: Source
    spec: Mapping[str, ArraySpec]
    num_classes: int | None
    in_memory: Examples | None = None
    resizes: bool = False
    random_resized_crop: bool = False

    def __len__(self) -> int:
        return len(self.source)

    def read(self, indices: np.ndarray, crop_keys: Iterable[tuple[int, ...]] = ()) -> Examples:
        """Reads examples, and crops and resizes their images where the split says so.

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
        examples = [self.source[int(i)] for i in indices]
        if self.resizes:
            for example, key in itertools.zip_longest(examples, crop_keys):
                example["image"] = self._resized(example["image"], key)
        return {
            name: np.stack([example[name] for example in examples]).astype(dtype, copy=False)
            for name, (_, dtype) in self.spec.items()
        }

    def _resized(self, image: np.ndarray, key: tuple[int, ...] | None) -> np.ndarray:
        box = None
        if self.random_resized_crop:
            size = image.shape[:2]
            box = center_box(size) if key is None else random_box(size, key)
        height, width, channels = self.spec["image"].shape
        return resize(image, (height, width, channels), box)

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
        with ThreadPoolExecutor() as pool:  # Decoding a PNG releases the interpreter lock.
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
        labels = [self.encoded[i]["label"] for i in range(len(self.encoded))]
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


def in_memory_if_small(split: Split, max_bytes: int) -> Split:
    """Returns a split with its examples in memory, unless they have more bytes."""
    size = sum(np.prod(s.shape, dtype=int) * s.dtype.itemsize for s in split.spec.values())
    if split.random_resized_crop or len(split) * size > max_bytes:
        return split
    return dataclasses.replace(split, in_memory=split.read_in_threads(np.arange(len(split))))
