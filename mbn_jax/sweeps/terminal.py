"""Lines for people, on any terminal, pipe or file; output that nobody can read stops no sweep."""

import os
import sys

DEFAULT_WIDTH = 80


def say(line: str) -> None:
    r"""Prints a line to stdout; characters that its encoding lacks as escapes like \xe9.

    Where the reader has gone (`| head`), this and all later lines are dropped.
    """
    stream = sys.stdout
    if stream is None:  # Closed from the start.
        return
    encoding = stream.encoding or "utf-8"
    try:
        print(line.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except BrokenPipeError:
        # As Python's documentation has it: or the flush at exit would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class StatusLine:
    """Lines on stderr: those that stay and, on a terminal, one at the end that is replaced."""

    def __init__(self):
        """Writes nothing yet."""
        self._stream = sys.stderr
        self._is_live = (
            self._stream is not None
            and self._stream.isatty()
            and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
        )
        self._shown = ""

    def show(self, text: str) -> None:
        """Replaces the line at the end, cut to the width of the terminal."""
        if self._is_live:
            text = text[: self._width() - 1]  # A line that wraps could not be replaced.
            if text != self._shown:
                self._write(f"\r\033[K{text}")
                self._shown = text

    def say(self, line: str) -> None:
        """Prints a line that stays."""
        self._write(f"\r\033[K{line}\n" if self._shown else f"{line}\n")
        self._shown = ""

    def close(self) -> None:
        """Leaves the line at the end as it is."""
        if self._shown:
            self._write("\n")
            self._shown = ""

    def _width(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or DEFAULT_WIDTH
        except OSError:
            return DEFAULT_WIDTH

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:  # The terminal or the reader of the pipe has gone.
            self._stream, self._is_live = None, False


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
