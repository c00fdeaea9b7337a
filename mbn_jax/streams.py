"""Standard streams that never end a run: closed, a broken pipe, or an encoding without the text."""

import contextlib
import errno
import io
import os
import sys
from typing import TextIO


class _Unbreakable(io.FileIO):
    """A file that takes what is written, and drops it once nobody reads it.

    Args:
      fd: the file descriptor; it is left open.
      drops: the errors after which everything is dropped.
    """

    def __init__(self, fd: int, drops: tuple[int, ...] | None):
        super().__init__(fd, "w", closefd=False)
        self._drops = drops

    def write(self, data) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            if self._drops is not None and error.errno not in self._drops:
                raise
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self.fileno())
            os.close(nothing)
            return len(data)


def make_streams_unbreakable() -> None:
    """Replaces standard output and error by streams that cannot end a run.

    Where nobody reads any more (`| head`) or they were closed (`2>&-`), what is written is dropped.
    Standard error shows progress: there every failure to write is forgiven. Characters that the
    encoding lacks are escaped.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:  # Closed: the next file to be opened would take its place.
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = _unbreakable(sys.stdout, 1, (errno.EPIPE,))
    sys.stderr = _unbreakable(sys.stderr, 2, None)


def _unbreakable(stream: TextIO | None, fd: int, drops: tuple[int, ...] | None) -> TextIO:
    if stream is not None:
        with contextlib.suppress(BrokenPipeError):
            stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Unbreakable(fd, drops)),
        encoding=stream.encoding if stream is not None else "utf-8",
        errors="backslashreplace",
        line_buffering=True,
    )
