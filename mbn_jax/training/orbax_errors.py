"""Errors of the disk within Orbax: raised as OSError, and told once."""

import asyncio.log
import contextlib
import logging
import re
from collections.abc import Iterator

from absl import logging as absl_logging

OS_ERROR = re.compile(r"\[os_error_code='(\d+)'\]")
"""In TensorStore's ValueErrors that stand for an OSError."""


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Raises errors of the disk as OSError."""
    try:
        yield
    except ValueError as error:
        number = OS_ERROR.search(str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), str(error)) from error


def _is_of_something_else(record: logging.LogRecord) -> bool:
    """Whether a message tells of more than a write to the disk that failed.

    Orbax logs such errors and raises them too. Of the writes that fail after the one that is
    raised, asyncio tells at any time later.
    """
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, OSError) and OS_ERROR.search(str(error)) is None


for logger in (absl_logging.get_absl_logger(), asyncio.log.logger):
    logger.addFilter(_is_of_something_else)
