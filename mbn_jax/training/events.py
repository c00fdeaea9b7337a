"""Events for TensorBoard, written by the thread that calls: an error of the disk is the caller's.

`tensorboardX.SummaryWriter` writes in a thread of its own. Where that dies of a full disk, its
queue fills up, and the run would wait for it for ever.
"""

import itertools
import os
import pathlib
import socket
import time

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

FLUSH_SECONDS = 30.0

_files = itertools.count()


class Events:
    """A new event file in a folder."""

    def __init__(self, folder: pathlib.Path, *, first_step: int):
        """Opens it, to hide the events of earlier files from after `first_step` on."""
        # In the same second another may be made.
        name = f"{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{next(_files)}"
        self._file = RecordWriter(str(folder / f"events.out.tfevents.{name}"))
        self._first = [
            Event(file_version="brain.Event:2"),
            Event(step=first_step + 1, session_log=SessionLog(status=SessionLog.START)),
        ]
        self._next_flush = time.monotonic()

    def scalar(self, name: str, value: float, step: int) -> None:
        """Writes one value."""
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value)])
        for event in (*self._first, Event(step=step, summary=summary)):
            event.wall_time = time.time()
            self._file.write(event.SerializeToString())
        self._first = []

    def flush(self) -> None:
        """Brings to disk what was written, if that was not done just now."""
        if time.monotonic() >= self._next_flush:
            self._file.flush()
            self._next_flush = time.monotonic() + FLUSH_SECONDS

    def close(self) -> None:
        """Writes the rest."""
        self._file.close()
