"""Opens the data set of a user: a function that returns a data source for a split."""

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mbn_jax.datasets.split import ArraySpec, Split, in_memory_if_small
from mbn_jax.datasets.tfds_splits import find_data_dir, stored_ranges
from mbn_jax.errors import UserError
from mbn_jax.names import reason

EXPECTED = "a data source with __len__ and __getitem__, which returns a dict of arrays"


def load_own_split(
    name: str,
    function: Callable[..., Any],
    split: str,
    kwargs: Mapping[str, Any],
    data_dir: str | None,
    *,
    max_bytes_in_memory: int,
) -> Split:
    """Opens a split of a data set that a function of the user's provides.

    Args:
      name: import path of the function, for messages.
      function: `function(split, data_dir, **kwargs)`, called with the name of a whole split; it
        returns a source of dicts of arrays, whose shapes and dtypes are those of the first one.
      split: names of splits, and slices and sums of these as in TFDS, 'train[:90%]'.
      kwargs: further arguments of the function.
      data_dir: the config's; None where it has none.
      max_bytes_in_memory: a split of more bytes is read as it is used.

    Raises:
      UserError: where the function fails or returns something else, and for the first example that
        is not like the first one, if the split is held in memory.
    """
    whole = _WholeSplits(name, function, kwargs, find_data_dir(data_dir) if data_dir else None)
    try:
        ranges = stored_ranges(split, whole)
    except UserError:
        raise
    except Exception as error:  # TFDS refuses in many ways what is no split.
        raise UserError(f"Data set {name!r} has no split {split!r} ({reason(error)}).") from error
    parts = [(whole[r.split].source, r.start, r.stop) for r in ranges]
    if not sum(stop - start for _, start, stop in parts):
        raise UserError(f"Data set {name!r} has no examples in split {split!r}.")
    source = _Parts(parts)
    spec = _spec_of(source[0], f"Example 0 of split {split!r} of data set {name!r}")
    num_classes = getattr(parts[0][0], "num_classes", None)
    checked = _CheckedSource(source, f"split {split!r} of data set {name!r}", spec, num_classes)
    return in_memory_if_small(Split(split, ranges, checked, spec, num_classes), max_bytes_in_memory)


class _Whole(NamedTuple):
    """A whole split, described to TFDS.

    Attributes:
      source: what the function returned.
      num_examples: its length.
    """

    source: Any
    num_examples: int


class _WholeSplits(dict):
    """The whole splits of a data set by name, opened as they are asked for."""

    def __init__(self, name: str, function: Callable, kwargs: Mapping, data_dir: str | None):
        self._name = name
        self._open = lambda split: function(split, data_dir, **kwargs)

    def __contains__(self, split: object) -> bool:
        return True

    def __missing__(self, split: str) -> _Whole:
        try:
            source = self._open(split)
            whole = _Whole(source, len(source))
            if whole.num_examples and not isinstance(source[0], Mapping):
                raise TypeError(f"its example 0 is of {type(source[0]).__name__}")
        except Exception as error:  # The function is the user's code: it may fail in any way.
            raise UserError(
                f"dataset.name={self._name!r} must be a function of (split, data_dir) that returns "
                f"{EXPECTED}; for split {split!r}: {reason(error)}"
            ) from error
        self[split] = whole
        return whole


class _Parts:
    """Ranges of sources, one after the other."""

    def __init__(self, parts: Sequence[tuple[Any, int, int]]):
        self._parts = parts
        self._ends = list(itertools.accumulate(stop - start for _, start, stop in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        part = bisect.bisect_right(self._ends, index)
        source, _, stop = self._parts[part]
        return source[stop - (self._ends[part] - index)]


def _dtype_on_device(array: np.ndarray) -> np.dtype | None:
    """Returns the dtype that JAX gives an array, 32 bits for 64; None if it holds no numbers."""
    return jax.dtypes.canonicalize_dtype(array.dtype) if array.dtype.kind in "biuf" else None


def _spec_of(example: Mapping[str, Any], what: str) -> dict[str, ArraySpec]:
    """Returns shapes and dtypes of an example's arrays; raises UserError for what is no array."""
    spec = {}
    for key, value in sorted(example.items()):
        array = np.asarray(value)
        dtype = _dtype_on_device(array)
        if not isinstance(key, str) or dtype is None:
            raise UserError(
                f"{what} has {key!r} of {array.dtype}, expected numbers under a text; leave it out."
            )
        spec[key] = ArraySpec(array.shape, dtype)
    if not spec:
        raise UserError(f"{what} is an empty dict, expected arrays by name.")
    return spec


@dataclasses.dataclass(frozen=True)
class _CheckedSource:
    """A source whose examples are checked as they are read: all must be like the first one."""

    source: _Parts
    name: str
    spec: Mapping[str, ArraySpec]
    num_classes: int | None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        try:
            example = dict(self.source[index])
        except Exception as error:  # The source is the user's code: it may fail in any way.
            raise UserError(
                f"Example {index} of {self.name} cannot be read: {reason(error)}"
            ) from error
        if sorted(example) != sorted(self.spec):
            raise UserError(
                f"Example {index} of {self.name} has {sorted(example)}, expected "
                f"{sorted(self.spec)} as example 0."
            )
        arrays = {}
        for key, (shape, dtype) in self.spec.items():
            array = np.asarray(example[key])
            own = _dtype_on_device(array)
            if array.shape != shape or own is None or not np.can_cast(own, dtype):
                raise UserError(
                    f"Example {index} of {self.name} has {key!r} of shape {array.shape} and "
                    f"{array.dtype}, expected {shape} and {dtype} as example 0."
                )
            with np.errstate(over="ignore"):  # What becomes infinite is told below.
                arrays[key] = array.astype(dtype)
            if array.dtype.kind == "f" and not np.isfinite(arrays[key]).all():
                raise UserError(
                    f"Example {index} of {self.name} has a {key!r} that is NaN or infinite in "
                    f"{dtype}."
                )
            is_narrowed = array.dtype != own  # 64 bits to 32: all other casts are exact.
            if is_narrowed and array.dtype.kind in "iu" and (arrays[key] != array).any():
                raise UserError(
                    f"Example {index} of {self.name} has a {key!r} beyond the numbers of {dtype}: "
                    f"{array.min()} to {array.max()}."
                )
        self._check_label(index, arrays)
        return arrays

    def _check_label(self, index: int, arrays: Mapping[str, np.ndarray]) -> None:
        label = arrays.get("label")
        if self.num_classes is None or label is None:
            return
        if label.size and not (label.min() >= 0 and label.max() < self.num_classes):
            wrong = label.min() if label.min() < 0 else label.max()
            raise UserError(
                f"Example {index} of {self.name} has label {wrong}, expected 0 to "
                f"{self.num_classes - 1}."
            )
