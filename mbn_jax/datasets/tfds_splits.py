"""Opens splits of TFDS image-classification data sets, without TensorFlow."""

import dataclasses
import difflib
import importlib
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mbn_jax.command_line import expand_home
from mbn_jax.datasets.images import ImageReader, unreadable
from mbn_jax.datasets.split import ArraySpec, Split, StoredRange, in_memory_if_small
from mbn_jax.errors import UserError, one_line

DTYPES = ("uint8", "float32")
"""Image dtypes that TFDS decodes without OpenCV."""


def load_split(
    name: str,
    split: str,
    *,
    builder_class: type | None,
    builder_kwargs: Mapping[str, Any],
    data_dir: str | None,
    image_size: int,
    random_resized_crop: bool,
    max_bytes_in_memory: int,
) -> Split:
    """Opens a split of any TFDS image-classification data set, with arguments as `open_split`.

    A class of TFDS, `builder_class`, is prepared on first use; None: that of the name.

    Raises:
      UserError: for an unknown or unprepared data set or split, a data set that is not image
        classification, images of varying size without `image_size`, or, if the split is held in
        memory, examples that are damaged or not what the data set declares.
    """
    builder = _prepared_builder(name, builder_class, builder_kwargs, find_data_dir(data_dir))
    image_key, label_key = _supervised_keys(builder, name)
    features = builder.info.features
    tfds = importlib.import_module("tensorflow_datasets")
    try:
        undecoded = {image_key: tfds.decode.SkipDecoding()}
        source = builder.as_data_source(split=split, decoders=undecoded)
        len(source)  # TFDS refuses an empty slice.
    except (ValueError, KeyError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"Data set {name!r} has no examples in split {split!r}; its splits are "
            f"{sorted(builder.info.splits)}, and slices of these like 'train[:90%]'."
        ) from error
    num_classes = features[label_key].num_classes
    described = f"split {split!r} of data set {name!r}"
    feature = features[image_key]
    shape = _image_shape(feature.shape, image_size, name)
    loaded = Split(
        name=split,
        ranges=stored_ranges(split, builder.info.splits),
        source=_CheckedSource(source, described, image_key, label_key, num_classes),
        spec={
            "image": ArraySpec(shape, np.dtype(feature.np_dtype)),
            "label": ArraySpec((), np.dtype(np.int32)),
        },
        num_classes=num_classes,
        images=ImageReader(feature, shape, random_resized_crop, described),
    )
    return in_memory_if_small(loaded, max_bytes_in_memory)


def find_data_dir(data_dir: str | None) -> str | None:
    """Returns `dataset.data_dir` with `~` expanded, or None for TFDS's own folder.

    Raises:
      UserError: where that would be in a home folder that is not known.
    """
    if data_dir:
        return expand_home(data_dir, "dataset.data_dir")
    if not os.environ.get("TFDS_DATA_DIR") and os.path.expanduser("~").startswith("~"):
        raise UserError(
            "TFDS keeps its data sets in the home folder, which is not known; set dataset.data_dir "
            "to a folder for them."
        )
    return None


def _supervised_keys(builder: Any, name: str) -> tuple[str, str]:
    """Returns the names of image and label; raises UserError if the data set has other ones."""
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
    dtype = np.dtype(features[keys[0]].np_dtype)
    if dtype.name not in DTYPES:
        raise UserError(
            f"Data set {name!r} has images of {dtype}, expected one of "
            f"{', '.join(DTYPES)}; convert them when it is prepared."
        )
    return keys


def _image_shape(
    declared: tuple[int | None, ...], image_size: int, name: str
) -> tuple[int, int, int]:
    """Returns the shape of images after resizing; raises UserError if it varies."""
    height, width, channels = declared
    if image_size:
        height = width = image_size
    if height is None or width is None or channels is None:
        raise UserError(
            f"Data set {name!r} has images of varying shape {(height, width, channels)}; set "
            "dataset.image_size to resize them (the channels must be fixed)."
        )
    return height, width, channels


def stored_ranges(split: str, stored: Mapping[str, Any]) -> tuple[StoredRange, ...]:
    """Returns the stored examples that a TFDS split consists of.

    Args:
      split: names of stored splits, and slices and sums of these.
      stored: by name, what has the `num_examples` of a stored split.
    """
    tfds = importlib.import_module("tensorflow_datasets")
    parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(stored)
    return tuple(
        StoredRange(
            part.splitname,
            part.from_ or 0,
            stored[part.splitname].num_examples if part.to is None else part.to,
        )
        for part in parts
    )


@dataclasses.dataclass(frozen=True)
class _CheckedSource:
    """A TFDS source whose examples have 'image', encoded, and 'label', checked as it is read.

    Checking them all in advance would be a pass over the whole disk for a large data set.
    """

    source: Sequence[dict]
    name: str
    image_key: str
    label_key: str
    num_classes: int

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._read(index)
        image, label = example[self.image_key], example[self.label_key]
        if not 0 <= label < self.num_classes:
            raise UserError(
                f"Example {index} of {self.name} has label {label}, expected 0 to "
                f"{self.num_classes - 1}; use a split whose examples are all labelled."
            )
        return {"image": image, "label": label}

    def _read(self, index: int) -> dict:
        try:
            return self.source[index]
        except Exception as error:  # Readers fail in many ways on damaged bytes.
            raise unreadable(index, self.name, error) from error


def _prepared_builder(
    name: str, builder_class: type | None, kwargs: Mapping[str, Any], data_dir: str | None
) -> Any:
    tfds = importlib.import_module("tensorflow_datasets")
    build = f"`tfds build {name} --file_format=array_record"
    build += f" --data_dir={data_dir}`" if data_dir else "`"

    def find() -> Any:
        options = {"data_dir": data_dir, "file_format": "array_record", **kwargs}
        return builder_class(**options) if builder_class else tfds.builder(name, **options)

    try:
        builder = find()
        if builder_class and not builder.is_prepared():
            tfds.disable_progress_bar()
            try:
                builder.download_and_prepare()
            except FileExistsError:  # Another process prepared it meanwhile.
                builder = find()
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        close = difflib.get_close_matches(name, known, n=3)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise UserError(f"TFDS has no data set {name!r}.{hint}") from error
    except OSError as error:
        raise UserError(
            f"Data set {name!r} cannot be read or prepared in {data_dir or 'the folder of TFDS'} "
            f"({one_line(error)}); set dataset.data_dir to a folder that has it or can be written."
        ) from error
    except (ValueError, AssertionError, ImportError) as error:
        raise UserError(
            f"Data set {name!r} cannot be opened ({one_line(error)}); it is read from "
            f"array_record files, as {build} writes them."
        ) from error
    if not builder.is_prepared():
        raise UserError(
            f"Data set {name!r} is not prepared in {builder.data_dir}; prepare it once, where "
            f"TensorFlow is installed (`pip install '.[prepare]'`), with {build}, or set "
            "dataset.data_dir to where it is."
        )
    return builder


def _is_worth_reading(record: logging.LogRecord) -> bool:
    """Returns whether a message is not about something that this package does on purpose."""
    message = record.getMessage()
    return "no dataset_info.json" not in message


logging.getLogger("absl").addFilter(_is_worth_reading)  # In every process that decodes, too.
