"""Checks of single config fields: what a value may be."""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Collection
from typing import Any

from mbn_jax.errors import UserError
from mbn_jax.names import FORM, is_import_path

MAX_MEMORY_SIZE = 1 << 16


@dataclasses.dataclass(frozen=True)
class Check:
    """What the value of a config field may be.

    Attributes:
      expected: what is allowed, to complete "FIELD must be ...".
      holds: whether a value is allowed.
      hint: a sentence that helps with a wrong value, or ''.
    """

    expected: str
    holds: Callable[[Any], bool]
    hint: Callable[[Any], str] = lambda value: ""

    def __call__(self, field: str, value: Any) -> None:
        """Raises UserError if the value of the field is not allowed."""
        if not self.holds(value):
            hint = self.hint(value)
            raise UserError(
                f"{field} must be {self.expected}, got {value!r}.{' ' if hint else ''}{hint}"
            )


def choice(names: Collection[str]) -> Check:
    """Allows one of some names; the message suggests the closest one.

    >>> choice(('memorized', 'batch')).holds('memorised')
    False
    """

    def closest(value: Any) -> str:
        close = difflib.get_close_matches(str(value), names, n=1)
        return f"Did you mean {close[0]!r}?" if close else ""

    return Check(f"one of {', '.join(names)}", lambda value: value in names, closest)


def name_of(names: Collection[str]) -> Check:
    """Allows one of some short names, or an import path.

    >>> name_of(('convnet',)).holds('my_models:UNet')
    True
    """
    known = choice(names)
    return Check(
        f"{known.expected}, or {FORM}",
        lambda value: known.holds(value) or is_import_path(value),
        known.hint,
    )


def number(expected: str, holds: Callable[[Any], bool]) -> Check:
    """Allows finite numbers for which `holds` is true."""

    def is_allowed(value: Any) -> bool:
        return isinstance(value, int | float) and math.isfinite(value) and holds(value)

    return Check(expected, is_allowed)


def at_least(least: int) -> Check:
    """Allows `least` and more."""
    return number(f"{least} or more", lambda value: value >= least)


ANY = Check("anything", lambda value: True)
POSITIVE = number("more than 0", lambda value: value > 0)
BELOW_ONE = number("in [0, 1)", lambda value: 0 <= value < 1)
UP_TO_ONE = number("in (0, 1]", lambda value: 0 < value <= 1)
SEED = number("0 or more and below 2^31", lambda value: 0 <= value < 2**31)
MEMORY_SIZE = number(
    f"at most {MAX_MEMORY_SIZE} and 0 or more", lambda value: 0 <= value <= MAX_MEMORY_SIZE
)

WIDTHS = Check(
    "whole numbers of 1 or more",
    lambda value: bool(value) and all(isinstance(x, int) and x >= 1 for x in value),
)


def _pattern_error(value: Any) -> str:
    try:
        re.compile(value)
    except re.error as error:
        return f"It has an error: {error}."
    return ""


PATTERN = Check("a regular expression", lambda value: not _pattern_error(value), _pattern_error)
