"""Which checkpoints of a run are kept."""

from collections.abc import Collection


def surplus(
    steps: Collection[int], *, newest: int, every: int, keep: int, best: int | None = None
) -> list[int]:
    """Returns the steps whose checkpoints are deleted once the newest is sealed.

    Args:
      steps: steps of all checkpoints.
      newest: the one that was just saved.
      every: steps between two checkpoints; others were saved where a run was stopped.
      keep: how many of the newest to keep.
      best: one that is kept beside them.

    >>> surplus([10, 13, 20, 30], newest=30, every=10, keep=2, best=10)
    [13]
    """
    regular = sorted(s for s in steps if s % every == 0 or s == newest)
    return sorted(set(steps) - set(regular[-keep:]) - {best})
