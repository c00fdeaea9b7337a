"""What people read: standard streams that cannot end a run, and a line that shows progress."""

import contextlib
import errno
import io
import os
import sys
from typing import TextIO

DEFAULT_WIDTH = 80


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


class StatusLine:
    """Lines that stay and, on a terminal, one at the end that is replaced."""

    def __init__(self):
        """Writes nothing yet."""
        dumb = os.environ.get("TERM", "dumb") in ("dumb", "unknown")
        self._is_live = sys.stderr.isatty() and not dumb
        self._shown = ""

    def show(self, text: str, *, everywhere: bool = False) -> None:
        """Replaces the line at the end, cut to the width of the terminal.

        Where no line can be replaced, in a file for example, it stays, or is left out unless
        `everywhere`.
        """
        if not self._is_live:
            if everywhere:
                self.say(text)
            return
        text = text[: _width() - 1]  # A line that wraps could not be replaced.
        if text != self._shown:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
            self._shown = text

    def say(self, line: str) -> None:
        """Prints a line that stays."""
        clear = "\r\033[K" if self._shown else ""
        print(f"{clear}{line}", file=sys.stderr, flush=True)
        self._shown = ""

    def close(self) -> None:
        """Leaves the line at the end as it is."""
        if self._shown:
            print(file=sys.stderr, flush=True)
            self._shown = ""


def _width() -> int:
    """Returns the width of the terminal that stderr is."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or DEFAULT_WIDTH
    except OSError:
        return DEFAULT_WIDTH


def duration(seconds: float) -> str:
    """Returns a time in two units.

    >>> duration(3723)
    '1 h 2 min'
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"
