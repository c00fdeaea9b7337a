"""One split of a data set, and how its examples are read."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np

from mbn_jax.datasets.crops import center_box, random_box, resize

EXAMPLES_PER_THREAD = 64


class Examples(NamedTuple):
    """Images with their labels: a whole split, a batch, or a stack of batches.

    Attributes:
      image: `[..., height, width, channels]`.
      label: `[...]`, int32.
    """

    image: Any
    label: Any


class Source(Protocol):
    """Random access to examples, dicts with 'image' and 'label'."""

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
      image_shape: (height, width, channels).
      num_classes: number of labels.
      in_memory: all examples, images uint8 or float32 as the data set has them; None where they
        stay on disk.
      random_resized_crop: whether `read` crops images.
    """

    name: str
    ranges: tuple[StoredRange, ...]
    source: Source
    encoded: Source
    image_shape: tuple[int, int, int]
    num_classes: int
    in_memory: Examples | None = None
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
            return Examples(self.in_memory.image[indices], self.in_memory.label[indices])
        examples = [self.source[int(i)] for i in indices]
        images = []
        for example, key in itertools.zip_longest(examples, crop_keys):
            box = None
            if self.random_resized_crop:
                size = example["image"].shape[:2]
                box = center_box(size) if key is None else random_box(size, key)
            images.append(resize(example["image"], self.image_shape, box))
        labels = np.array([example["label"] for example in examples], np.int32)
        return Examples(np.stack(images), labels)

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
        return Examples(*map(np.concatenate, zip(*parts, strict=True)))

    def read_labels(self) -> np.ndarray:
        """Returns the labels of all examples, int32, without decoding an image."""
        if self.in_memory is not None:
            return self.in_memory.label
        labels = [self.encoded[i]["label"] for i in range(len(self.encoded))]
        return np.array(labels, np.int32)

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
