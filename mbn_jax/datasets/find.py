"""Finds and opens the data set that a config names."""

from typing import Any

from mbn_jax.datasets.own import load_own_split
from mbn_jax.datasets.split import Split
from mbn_jax.datasets.tfds_splits import load_split
from mbn_jax.names import is_import_path, named

DATASETS = {"digits": "mbn_jax.datasets.digits:Digits"}
"""Data sets of this package, by short name; any other short name is one of TFDS."""


def open_split(
    name: str,
    split: str,
    *,
    data_dir: str | None = None,
    image_size: int = 0,
    random_resized_crop: bool = False,
    max_bytes_in_memory: int = 4 << 30,
    kwargs: tuple[tuple[str, Any], ...] = (),
) -> Split:
    """Opens a split of a data set.

    Args:
      name: short name, TFDS name, or import path of a builder class or a function.
      split: TFDS split, slices included.
      data_dir: folder of data sets; default: that of TFDS.
      image_size: of TFDS data sets: height and width to resize images to; 0: as stored.
      random_resized_crop: of these: resize a part of each image, a random one in training and else
        the centre. Such a split stays on disk.
      max_bytes_in_memory: a split of more bytes stays on disk and is read as it is used.
      kwargs: further arguments of the builder class or the function, names and values.

    Raises:
      UserError: for what `load_split` and `load_own_split` refuse.
    """
    found = named(name, DATASETS, "dataset.name") if is_made_on_first_use(name) else None
    if found is None or _is_builder_class(found):
        return load_split(
            name,
            split,
            builder_class=found,
            builder_kwargs=dict(kwargs),
            data_dir=data_dir,
            image_size=image_size,
            random_resized_crop=random_resized_crop,
            max_bytes_in_memory=max_bytes_in_memory,
        )
    return load_own_split(
        name, found, split, dict(kwargs), data_dir, max_bytes_in_memory=max_bytes_in_memory
    )


def is_made_on_first_use(name: str) -> bool:
    """Returns whether opening a data set may write it; those of TFDS must be prepared before."""
    return name in DATASETS or is_import_path(name)


def _is_builder_class(found: Any) -> bool:
    bases = found.__mro__ if isinstance(found, type) else ()
    return any(base.__module__.startswith("tensorflow_datasets.") for base in bases)
