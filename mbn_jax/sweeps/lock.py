"""A lock on the folder of a run."""

import contextlib
import fcntl
import pathlib
import time
from collections.abc import Callable, Iterator

LOCK = "lock"
POLL_SECONDS = 0.5


@contextlib.contextmanager
def only_one(folder: pathlib.Path, give_up: Callable[[], bool]) -> Iterator[bool]:
    """Waits until no other process of this machine is in the block with this folder.

    Heartbeats stop when a machine sleeps, and its members are given to others; when it wakes up,
    the folder of a run must still have one writer.

    Args:
      folder: the run's; made where it is missing.
      give_up: asked now and then whether to stop waiting.

    Yields:
      Whether this process is alone now; False after giving up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:  # Closing it, or dying, lets it go.
        while not give_up():
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(POLL_SECONDS)
                continue
            yield True
            return
        yield False
