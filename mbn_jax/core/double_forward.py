"""What a second forward does, and what the first forward of a step hands over to it.

A training step sends a batch forward twice. In the first forward each call of a layer records the
moments of its batch in the collection `BATCH_MOMENTS`. The second forward finds these records in
the read-only collection `FIRST_BATCH_MOMENTS`. No model has to pass anything on.
"""

import contextlib
import dataclasses
import math
from typing import NamedTuple

import jax

from mbn_jax.core.moments import Moments

DOUBLE_FORWARD = ("off", "rewrite", "transport")
"""Modes of the training step."""

BATCH_MOMENTS = "batch_moments"
"""Collection in which each call of a layer records the moments of its batch, if it is mutable."""

FIRST_BATCH_MOMENTS = "first_batch_moments"
"""Read-only collection with the `BATCH_MOMENTS` of the step's first forward.

Inside `forwards_of(second)` a layer that finds it does what `second` says; elsewhere it moves its
memory by the shift between the two forwards, as in 'transport'.
"""

RECORDS = "records"
"""Name in both collections: a tuple with one `Record` for each call of the layer."""

USED = "used"
"""Name in `BATCH_MOMENTS`: a tuple with one entry for each call that used a first record."""


class Record(NamedTuple):
    """What one call of a layer records in the first forward.

    Attributes:
      batch: moments of the whole batch, `[*F]`.
      part: moments of the examples that the second forward sees, `[*F]`; None: it sees all.
    """

    batch: Moments
    part: Moments | None


@dataclasses.dataclass(frozen=True)
class SecondForward:
    """What the second forward of a training step does.

    Attributes:
      double_forward: 'off', there is none; 'rewrite', it records the batch under the new
        parameters; 'transport', it also moves the memory by the shift that the update caused.
      fraction: share of the batch that it sees, in (0, 1].

    Raises:
      ValueError: for an unknown mode, an impossible fraction, or a fraction without second forward.

    >>> SecondForward('transport', 0.25).num_examples(8)
    2
    """

    double_forward: str = "rewrite"
    fraction: float = 1.0

    def __post_init__(self):
        if self.double_forward not in DOUBLE_FORWARD:
            raise ValueError(
                f"double_forward must be one of {DOUBLE_FORWARD}, got {self.double_forward!r}."
            )
        if not 0 < self.fraction <= 1:
            raise ValueError(f"double_forward_fraction must be in (0, 1], got {self.fraction}.")
        if self.double_forward == "off" and self.fraction != 1:
            raise ValueError(
                "double_forward_fraction needs a second forward, and double_forward is 'off'."
            )

    @property
    def moves_memory(self) -> bool:
        """Whether layers move their whole memory, not only the slot of this batch."""
        return self.double_forward == "transport"

    @property
    def is_partial(self) -> bool:
        """Whether it sees only the first examples of the batch."""
        return self.fraction < 1

    @property
    def needs_records(self) -> bool:
        """Whether layers need what the first forward recorded."""
        return self.moves_memory or self.is_partial

    def num_examples(self, batch_size: int) -> int:
        """Returns how many of `batch_size` examples it sees.

        Raises:
          ValueError: where that is not a whole number.
        """
        examples = round(batch_size * self.fraction)
        if examples < 1 or not math.isclose(examples, batch_size * self.fraction):
            raise ValueError(
                f"double_forward_fraction must leave whole examples, got {self.fraction:g} of "
                f"{batch_size} examples on a device."
            )
        return examples


class Forwards(NamedTuple):
    """The two forwards of one step, as the layers see them.

    Attributes:
      second: what the second forward does.
      batch_size: examples of the batch, in a first forward whose second one sees only a part of
        them; else 0.
    """

    second: SecondForward
    batch_size: int


# Not a plain context variable: JAX must not reuse for one step what it traced for another.
_forwards = jax.make_user_context(None)


def forwards_of(
    second: SecondForward, batch_size: int = 0
) -> contextlib.AbstractContextManager[None]:
    """Tells the layers, while a forward is traced, what the step's second forward does.

    Args:
      second: what the second forward does.
      batch_size: examples of the batch, in the first forward, where `second` is partial.
    """
    return _forwards(Forwards(second, batch_size if second.is_partial else 0))


def current_forwards() -> Forwards:
    """Returns the forwards being traced; outside of a step, those of 'transport'."""
    return _forwards.value or Forwards(SecondForward("transport"), 0)
