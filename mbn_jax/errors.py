"""The errors that a command reports in one sentence, and the statuses that commands exit with."""

import enum


class ExitStatus(enum.IntEnum):
    """What a command's exit status means."""

    DONE = 0
    FAILED = 1
    USER_MISTAKE = 2
    DIVERGED = 3
    STOPPED = 75
    """EX_TEMPFAIL of sysexits.h: schedulers can be told to run such a command again."""
    INTERRUPTED = 130


class UserError(ValueError):
    """Bad input: the message says what was expected, what came and what to do.

    Command lines print it as one sentence, without a traceback.
    """


class StoppedError(Exception):
    """A run stopped because it was asked to, and its state is saved."""


def one_line(error: BaseException) -> str:
    r"""Returns the message of an error in one line, or its type where it has none.

    >>> one_line(ValueError('no room\nleft')), one_line(MemoryError())
    ('no room left', 'MemoryError')
    """
    return " ".join(str(error).split()) or type(error).__name__
