"""Image-classification data sets, read through TFDS without TensorFlow."""

import dataclasses
import difflib
import importlib
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from mbn_jax.errors import UserError


class Source(Protocol):
    """Random access to examples, dicts with 'image' and 'label'."""

    def __len__(self) -> int:
        """Returns the number of examples."""

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Reads one example."""


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a data set, in memory where it fits and on disk otherwise.

    Attributes:
      name: the TFDS split, for example 'train[:90%]'.
      source: examples by index, dicts with 'image' and 'label'.
      image_shape: (height, width, channels).
      num_classes: number of labels.
      images: uint8 `[examples, height, width, channels]`, or None where they stay on disk.
      labels: int32 `[examples]`, or None likewise.
    """

    name: str
    source: "Source"
    image_shape: tuple[int, int, int]
    num_classes: int
    images: np.ndarray | None = None
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.source)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Reads examples: 'image' uint8 `[n, height, width, channels]` and 'label' int32 `[n]`."""
        if self.images is not None and self.labels is not None:
            return {"image": self.images[indices], "label": self.labels[indices]}
        examples = [self.source[int(i)] for i in indices]
        images = np.stack([_resize(example["image"], self.image_shape) for example in examples])
        return {"image": images, "label": np.array([e["label"] for e in examples], np.int32)}


def load_split(
    name: str,
    split: str,
    *,
    data_dir: str | None = None,
    image_size: int = 0,
    max_bytes_in_memory: int = 4 << 30,
) -> Split:
    """Opens a split of any TFDS image-classification data set.

    Args:
      name: TFDS name; 'digits' is this package's own and is prepared on first use.
      split: TFDS split, slices included.
      data_dir: where TFDS keeps its data sets; default: TFDS's own.
      image_size: height and width to resize to on reading; 0 keeps the images as stored.
      max_bytes_in_memory: a split of more bytes stays on disk and is decoded as it is used.

    Returns:
      The `Split`.

    Raises:
      UserError: for an unknown or unprepared data set or split, one that is not image
        classification, or images of varying size without `image_size`.
    """
    builder = _prepared_builder(name, data_dir)
    features = builder.info.features
    keys = builder.info.supervised_keys
    if (
        not keys
        or len(keys) != 2
        or type(features[keys[0]]).__name__ != "Image"
        or type(features[keys[1]]).__name__ != "ClassLabel"
    ):
        raise UserError(
            f"Data set {name!r} is not an image-classification set: expected supervised keys "
            f"(image, label), got {keys}."
        )
    image_key, label_key = keys
    try:
        source = builder.as_data_source(split=split)
        num_examples = len(source)  # TFDS refuses an empty slice.
    except (ValueError, KeyError, AssertionError) as error:
        raise UserError(
            f"Data set {name!r} has no examples in split {split!r}; its splits are "
            f"{sorted(builder.info.splits)}, and slices of these like 'train[:90%]'."
        ) from error
    height, width, channels = features[image_key].shape
    if image_size:
        height = width = image_size
    if None in (height, width, channels):
        raise UserError(
            f"Data set {name!r} has images of varying shape {(height, width, channels)}; set "
            "dataset.image_size to resize them (the channels must be fixed)."
        )
    loaded = Split(
        name=split,
        source=_Renamed(source, image_key, label_key),
        image_shape=(height, width, channels),
        num_classes=features[label_key].num_classes,
    )
    if num_examples * height * width * channels > max_bytes_in_memory:
        return loaded
    with ThreadPoolExecutor() as pool:  # PNG decoding releases the interpreter lock.
        chunks = np.array_split(np.arange(num_examples), max(1, num_examples // 512))
        parts = list(pool.map(loaded.read, chunks))
    images, labels = (np.concatenate([part[key] for part in parts]) for key in ("image", "label"))
    if labels.min() < 0 or labels.max() >= loaded.num_classes:
        raise UserError(
            f"Split {split!r} of data set {name!r} has labels from {labels.min()} to "
            f"{labels.max()}, expected 0 to {loaded.num_classes - 1}."
        )
    return dataclasses.replace(loaded, images=images, labels=labels)


class _Renamed:
    """A data source whose examples call their image 'image' and their label 'label'."""

    def __init__(self, source, image_key: str, label_key: str):
        self._source, self._image_key, self._label_key = source, image_key, label_key

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        example = self._source[index]
        return {"image": example[self._image_key], "label": example[self._label_key]}


def _prepared_builder(name: str, data_dir: str | None):
    logging.getLogger("absl").addFilter(_is_worth_reading)
    tfds = importlib.import_module("tensorflow_datasets")
    importlib.import_module("mbn_jax.datasets.digits")  # Registers it.
    build = f"`tfds build {name} --file_format=array_record"
    build += f" --data_dir={data_dir}`" if data_dir else "`"

    def find():
        return tfds.builder(name, data_dir=data_dir, file_format="array_record")

    try:
        builder = find()
        if name == "digits" and not builder.is_prepared():
            tfds.disable_progress_bar()
            try:
                builder.download_and_prepare()
            except FileExistsError:  # Another process was faster.
                builder = find()
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        close = difflib.get_close_matches(name, known, n=3)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise UserError(f"TFDS has no data set {name!r}.{hint}") from error
    except (ValueError, AssertionError, ImportError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"Data set {name!r} cannot be opened ({reason}); it is read from array_record files, "
            f"as {build} writes them."
        ) from error
    if not builder.is_prepared():
        raise UserError(
            f"Data set {name!r} is not prepared in {builder.data_dir}; prepare it once, where "
            f"TensorFlow is installed (`pip install '.[prepare]'`), with {build}, or set "
            "dataset.data_dir to where it is."
        )
    return builder


def _is_worth_reading(record: logging.LogRecord) -> bool:
    """Drops TFDS's hints about what this package does on purpose."""
    message = record.getMessage()
    return "OpenCV is not installed" not in message and "no dataset_info.json" not in message


def _resize(image: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    if image.shape == shape:
        return image
    from PIL import Image

    height, width, channels = shape
    resized = Image.fromarray(image.squeeze(-1) if channels == 1 else image)
    return np.asarray(resized.resize((width, height), Image.Resampling.BILINEAR)).reshape(shape)
