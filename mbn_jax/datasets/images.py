"""Image-classification data sets, read through TFDS without TensorFlow."""

import dataclasses
import difflib
import functools
import importlib
import itertools
import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from mbn_jax.datasets.data_dir import find_data_dir
from mbn_jax.errors import UserError

DTYPES = ("uint8", "float32")
"""Of images: what is decoded without OpenCV."""


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
      encoded: the same with their images as they are stored, to read labels only.
      image_shape: (height, width, channels).
      num_classes: number of labels.
      images: `[examples, height, width, channels]`, uint8 or float32 as the set has them, or None
        where they stay on disk.
      labels: int32 `[examples]`, or None likewise.
      random_resized_crop: whether `read` crops, at random where it is given keys.
    """

    name: str
    source: "Source"
    encoded: "Source"
    image_shape: tuple[int, int, int]
    num_classes: int
    images: np.ndarray | None = None
    labels: np.ndarray | None = None
    random_resized_crop: bool = False

    def __len__(self) -> int:
        return len(self.source)

    def read(
        self, indices: np.ndarray, keys: Iterable[tuple[int, ...]] = ()
    ) -> dict[str, np.ndarray]:
        """Reads examples.

        Args:
          indices: of the examples.
          keys: what each one's random crop is drawn by, where there is one; without, the centre.

        Returns:
          'image' `[n, height, width, channels]` and 'label' int32 `[n]`.

        Raises:
          UserError: for the first example that is damaged or not what its data set declares.
        """
        if self.images is not None and self.labels is not None:
            return {"image": self.images[indices], "label": self.labels[indices]}
        examples = [self.source[int(i)] for i in indices]
        images = []
        for example, key in itertools.zip_longest(examples, keys):
            box = None
            if self.random_resized_crop:
                size = example["image"].shape[:2]
                box = center_box(size) if key is None else random_box(size, key)
            images.append(_resize(example["image"], self.image_shape, box))
        labels = np.array([example["label"] for example in examples], np.int32)
        return {"image": np.stack(images), "label": labels}

    def read_in_threads(
        self, indices: np.ndarray, keys: Sequence[tuple[int, ...]] = ()
    ) -> dict[str, np.ndarray]:
        """Reads many examples, as `read` does."""
        if self.images is not None:  # Nothing to decode.
            return self.read(indices)
        starts = range(0, len(indices), 64)
        chunks = [(indices[i : i + 64], keys[i : i + 64]) for i in starts]
        with ThreadPoolExecutor() as pool:  # PNG decoding releases the interpreter lock.
            parts = list(pool.map(self.read, *zip(*chunks, strict=True)))
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def read_labels(self) -> np.ndarray:
        """Returns the labels of all examples, int32; no image is decoded."""
        if self.labels is not None:
            return self.labels
        labels = [self.encoded[i]["label"] for i in range(len(self.encoded))]
        return np.array(labels, np.int32)


def load_split(
    name: str,
    split: str,
    *,
    data_dir: str | None = None,
    image_size: int = 0,
    random_resized_crop: bool = False,
    max_bytes_in_memory: int = 4 << 30,
) -> Split:
    """Opens a split of any TFDS image-classification data set.

    Args:
      name: TFDS name; 'digits' is this package's own and is prepared on first use.
      split: TFDS split, slices included.
      data_dir: where TFDS keeps its data sets; default: TFDS's own.
      image_size: height and width to resize to on reading; 0 keeps the images as stored.
      random_resized_crop: resize a part of the image, random in training and central else, for
        which it stays on disk.
      max_bytes_in_memory: a split of more bytes stays on disk and is decoded as it is used.

    Returns:
      The `Split`.

    Raises:
      UserError: for an unknown or unprepared data set or split, one that is not image
        classification, images of varying size without `image_size`, or, where they are in memory,
        examples that are damaged or not what the set declares.
    """
    tfds, builder = _prepared_builder(name, find_data_dir(data_dir))
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
    dtype, declared_shape = np.dtype(features[image_key].np_dtype), features[image_key].shape
    if dtype.name not in DTYPES:
        raise UserError(
            f"Data set {name!r} has images of {dtype}, expected one of "
            f"{', '.join(DTYPES)}; convert them when it is prepared."
        )
    try:
        source = builder.as_data_source(split=split)
        undecoded = {image_key: tfds.decode.SkipDecoding()}
        encoded = builder.as_data_source(split=split, decoders=undecoded)
        num_examples = len(source)  # TFDS refuses an empty slice.
    except (ValueError, KeyError, AssertionError) as error:
        raise UserError(
            f"Data set {name!r} has no examples in split {split!r}; its splits are "
            f"{sorted(builder.info.splits)}, and slices of these like 'train[:90%]'."
        ) from error
    height, width, channels = declared_shape
    if image_size:
        height = width = image_size
    if None in (height, width, channels):
        raise UserError(
            f"Data set {name!r} has images of varying shape {(height, width, channels)}; set "
            "dataset.image_size to resize them (the channels must be fixed)."
        )
    num_classes = features[label_key].num_classes
    checked = functools.partial(
        _Checked,
        name=f"split {split!r} of data set {name!r}",
        image_key=image_key,
        label_key=label_key,
        num_classes=num_classes,
    )
    loaded = Split(
        name=split,
        source=checked(source, image_shape=declared_shape),
        encoded=checked(encoded, image_shape=None),
        image_shape=(height, width, channels),
        num_classes=num_classes,
        random_resized_crop=random_resized_crop,
    )
    size = num_examples * height * width * channels * dtype.itemsize
    if random_resized_crop or size > max_bytes_in_memory:
        return loaded
    examples = loaded.read_in_threads(np.arange(num_examples))
    return dataclasses.replace(loaded, images=examples["image"], labels=examples["label"])


@dataclasses.dataclass(frozen=True)
class _Checked:
    """A TFDS source with examples called 'image' and 'label', each checked as it is read.

    Not before: for a set that does not fit in memory that would be a pass over the whole disk.
    """

    source: Sequence[dict]
    name: str
    image_key: str
    label_key: str
    num_classes: int
    image_shape: tuple[int | None, ...] | None  # None: images are left encoded.

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        example = self._read(index)
        image, label = example[self.image_key], example[self.label_key]
        if not 0 <= label < self.num_classes:
            raise UserError(
                f"Example {index} of {self.name} has label {label}, expected 0 to "
                f"{self.num_classes - 1}; use a split whose examples are all labelled."
            )
        if self.image_shape is not None:
            self._check_image(index, image)
        return {"image": image, "label": label}

    def _read(self, index: int) -> dict:
        try:
            return self.source[index]
        except Exception as error:  # Damaged bytes make decoders fail in many ways.
            raise UserError(
                f"Example {index} of {self.name} cannot be read ({_reason(error)}); its record "
                "files are damaged or not all there: prepare the data set anew."
            ) from error

    def _check_image(self, index: int, image: np.ndarray) -> None:
        shape = self.image_shape or ()
        if len(image.shape) != len(shape) or any(
            expected not in (None, found)
            for expected, found in zip(shape, image.shape, strict=True)
        ):
            raise UserError(
                f"Example {index} of {self.name} has an image of shape {image.shape}, expected "
                f"{shape} as the data set declares; prepare it anew with images that are alike."
            )
        if image.dtype == np.float32 and not np.isfinite(image).all():
            raise UserError(
                f"Example {index} of {self.name} has pixels that are NaN or infinite, expected "
                "finite ones; prepare the data set anew without them."
            )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


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
    except OSError as error:
        raise UserError(
            f"Data set {name!r} cannot be read or prepared in {data_dir or 'the folder of TFDS'} "
            f"({_reason(error)}); set dataset.data_dir to a folder that has it or can be written."
        ) from error
    except (ValueError, AssertionError, ImportError) as error:
        raise UserError(
            f"Data set {name!r} cannot be opened ({_reason(error)}); it is read from "
            f"array_record files, as {build} writes them."
        ) from error
    if not builder.is_prepared():
        raise UserError(
            f"Data set {name!r} is not prepared in {builder.data_dir}; prepare it once, where "
            f"TensorFlow is installed (`pip install '.[prepare]'`), with {build}, or set "
            "dataset.data_dir to where it is."
        )
    return tfds, builder


def _is_worth_reading(record: logging.LogRecord) -> bool:
    """Drops TFDS's hints about what this package does on purpose."""
    message = record.getMessage()
    return "OpenCV is not installed" not in message and "no dataset_info.json" not in message


Box = tuple[float, float, float, float]


def random_box(size: tuple[int, int], key: Sequence[int]) -> Box:
    """Draws a part of an image: 8 to 100 % of its area, its sides in a ratio of 3/4 to 4/3.

    Args:
      size: (height, width) of the image.
      key: what the draw is a function of.

    Returns:
      (left, upper, right, lower), in pixels.

    References:
      Szegedy et al., "Going deeper with convolutions", CVPR 2015, section 6.

    >>> random_box((100, 80), (0, 1)) == random_box((100, 80), (0, 1))
    True
    """
    height, width = size
    rng = np.random.default_rng((*key, 1))  # Not the stream of an epoch's order.
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1.0)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return float(left), float(upper), float(left + w), float(upper + h)
    return center_box(size)


def center_box(size: tuple[int, int]) -> Box:
    """Returns the central square of an image, 7/8 of its shorter side: 224 of 256 pixels.

    >>> center_box((256, 320))
    (48.0, 16.0, 272.0, 240.0)
    """
    height, width = size
    side = min(size) * 7 / 8
    left, upper = (width - side) / 2, (height - side) / 2
    return left, upper, left + side, upper + side


def _resize(image: np.ndarray, shape: tuple[int, int, int], box: Box | None) -> np.ndarray:
    if image.shape == shape and box is None:
        return image
    from PIL import Image

    height, width, channels = shape
    resized = Image.fromarray(image.squeeze(-1) if channels == 1 else image)
    resized = resized.resize((width, height), Image.Resampling.BILINEAR, box=box)
    return np.asarray(resized).reshape(shape)
