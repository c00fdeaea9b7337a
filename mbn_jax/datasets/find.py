"""Finds and opens the data set that a config names."""

from typing import Any

from mbn_jax.datasets.own import load_own_split
from mbn_jax.datasets.split import Split
from mbn_jax.datasets.tfds_splits import load_split
from mbn_jax.names import is_import_path, named

DATASETS = {"digits": "mbn_jax.datasets.digits:Digits"}
"""Data sets of this package, by short name; any other short name is one of TFDS."""


def find_dataset(name: str) -> Any:
    """Returns the TFDS builder class or the function that a name stands for.

    None for the name of a TFDS data set; raises UserError for an import path of nothing.
    """
    if name in DATASETS or is_import_path(name):
        return named(name, DATASETS, "dataset.name")
    return None


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
      data_dir: folder of data sets.
      image_size: as for `load_split`; of TFDS data sets.
      random_resized_crop: as for `load_split`; of TFDS data sets.
      max_bytes_in_memory: a split of more bytes is read as it is used.
      kwargs: further arguments of the builder class or the function, names and values.

    Raises:
      UserError: for what `load_split` and `load_own_split` refuse.
    """
    found = find_dataset(name)
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


def _is_builder_class(found: Any) -> bool:
    bases = found.__mro__ if isinstance(found, type) else ()
    return any(base.__module__.startswith("tensorflow_datasets.") for base in bases)
