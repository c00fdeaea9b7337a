"""Errors of the disk within Orbax: raised as OSError, and shown once."""

import asyncio.log
import contextlib
import logging
import re
import sys
from collections.abc import Iterator

from absl import logging as absl_logging

OS_ERROR = re.compile(r"\[os_error_code='(\d+)'\]")
"""In TensorStore's ValueErrors that stand for an OSError."""


@contextlib.contextmanager
def raised_once() -> Iterator[None]:
    """Raises errors of the disk as OSError, and silences what Orbax shows of them beside that.

    Orbax logs the errors of its threads and raises them too. TensorStore's other writes fail after
    the one that is raised, at any time: they stay silent.
    """
    logger, shown = absl_logging.get_absl_logger(), sys.unraisablehook
    logger.addFilter(_has_no_traceback)
    sys.unraisablehook = lambda unraisable: _show_unraisable(unraisable, shown)
    asyncio.log.logger.addFilter(_is_not_of_the_disk)
    try:
        yield
    except ValueError as error:
        number = OS_ERROR.search(str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), str(error)) from error
    else:
        sys.unraisablehook = shown
        asyncio.log.logger.removeFilter(_is_not_of_the_disk)
    finally:
        logger.removeFilter(_has_no_traceback)


def _has_no_traceback(record: logging.LogRecord) -> bool:
    return not record.exc_info


def _is_not_of_the_disk(record: logging.LogRecord) -> bool:
    """Whether asyncio has something else to say than that a write to the disk failed."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, OSError) or (error is not None and OS_ERROR.search(str(error))):
        return False
    return "was destroyed but it is pending" not in record.getMessage()


def _show_unraisable(unraisable, shown) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        shown(unraisable)
