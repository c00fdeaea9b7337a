"""One writer a workdir, on this machine and, where the file system has locks, on all."""

import contextlib
import datetime
import errno
import fcntl
import os
import pathlib
import socket
import time
from collections.abc import Callable, Iterator
from typing import IO

from absl import logging

from mbn_jax.errors import UserError
from mbn_jax.training.workdir import writing

LOCK = "lock"
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def only_writer(workdir: pathlib.Path) -> Iterator[None]:
    """Holds the lock of a workdir, which exists.

    Raises:
      UserError: where another process holds it, saying which.
    """
    with _open_lock(workdir) as file:
        if not _try_to_lock(file):
            raise UserError(
                f"Another process writes to {workdir}: {_holder(workdir)}; wait for its end, stop "
                "it, or use another --workdir."
            )
        yield


@contextlib.contextmanager
def only_one(folder: pathlib.Path, give_up: Callable[[], bool]) -> Iterator[bool]:
    """Waits until no other process writes to a folder, and holds its lock.

    Heartbeats stop when a machine sleeps, and its members are requeued; when it wakes up,
    the folder of a run must still have one writer.

    Args:
      folder: of a run; made where it is missing.
      give_up: asked now and then whether to stop waiting.

    Yields:
      Whether this process is the only writer now; False after giving up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _open_lock(folder) as file:
        while not give_up():
            if _try_to_lock(file):
                yield True
                return
            time.sleep(0.5)
        yield False


def _open_lock(workdir: pathlib.Path) -> IO[str]:
    """Opens the file that is locked. Closing it, or the end of the process, releases the lock."""
    with writing(workdir):
        return (workdir / LOCK).open("a+")  # Another process may hold it: its text must stay.


def _try_to_lock(file: IO[str]) -> bool:
    """Locks the file and writes into it who holds it; returns False where another one does."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # Linux locks over NFS too by this.
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        logging.warning(
            "%s cannot be locked (%s): see to it that only one run writes to its folder.",
            file.name,
            os.strerror(error.errno),
        )
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
    with writing(pathlib.Path(file.name).parent):
        file.truncate(0)
        file.write(f"process {os.getpid()} on host {socket.gethostname()}, since {now}\n")
        file.flush()
    return True


def _holder(workdir: pathlib.Path) -> str:
    return (workdir / LOCK).read_text(errors="replace").strip() or "it has not said which"
