"""What the layers record in one forward of a batch, for the second forward of the same step."""

import contextlib
import math

import jax

BATCH_MOMENTS = "batch_moments"
"""Collection into which every call of a layer records the moments of its own batch, if mutable."""

FIRST_BATCH_MOMENTS = "first_batch_moments"
"""Read-only collection in which a forward finds what another recorded as BATCH_MOMENTS.

That other one saw the same batch under the parameters before the update. A layer finds, in the tree
of `batch_moments`, tuples with one entry a call:

* WHOLE, the moments of the whole batch. It moves its memory by what changed.
* WHOLE_TO_REWRITE, the same in its place. It leaves the memory where it is.
* PART, those of the examples that this forward sees, where it sees only the first of the batch.
  It pushes the moments of the whole batch then, moved by what changed for the part.
"""

WHOLE, WHOLE_TO_REWRITE, PART = "moments", "moments_to_rewrite", "moments_of_part"

FIRST_USED = "first_used"
"""Name in BATCH_MOMENTS by which every call of a layer says that it found FIRST_BATCH_MOMENTS."""

# Not a plain context variable: what is traced under one value must not be reused under another.
_part_to_record = jax.make_user_context(None)


def record_part(size: int, part: int) -> contextlib.AbstractContextManager:
    """Lets layers record the moments of the first examples too, while a forward is traced.

    Args:
      size: examples of the batch.
      part: how many of them.
    """
    return _part_to_record((size, part))


def part_to_record() -> tuple[int, int] | None:
    """Returns the size of the batch and of its part where `record_part` is around the forward."""
    return _part_to_record.value


def rows_of_part(size: int, fraction: float) -> int:
    """Returns how many examples a fraction of `size` is; raises ValueError where it is not whole.

    >>> rows_of_part(8, 0.25)
    2
    """
    rows = round(size * fraction)
    if rows < 1 or not math.isclose(rows, size * fraction):
        raise ValueError(
            f"double_forward_fraction must leave whole examples, got {fraction:g} of {size} "
            "examples on a device."
        )
    return rows
