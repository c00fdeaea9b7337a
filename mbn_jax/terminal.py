"""Lines for people on stderr: some stay, and on a terminal one is replaced again and again."""

import os
import sys

DEFAULT_WIDTH = 80


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
