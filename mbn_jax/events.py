"""Events for TensorBoard, written by the thread that calls: an error of the disk is the caller's.

`tensorboardX.SummaryWriter` writes in a thread of its own. Where that dies of a full disk, its
queue fills up, and the run would wait for it for ever.
"""

import itertools
import os
import pathlib
import time

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

FLUSH_SECONDS = 30.0

_files = itertools.count()


class Events:
    """A new event file in a folder."""

    def __init__(self, folder: pathlib.Path, *, first_step: int):
        """Opens it, and hides the events of earlier files from after `first_step` on."""
        # In the same second another file may be made.
        suffix = f".{os.getpid()}.{next(_files)}"
        self._writer = EventsWriter(str(folder / "events"), suffix)
        log = SessionLog(status=SessionLog.START)
        self._write(Event(step=first_step + 1, session_log=log))
        self._next_flush = time.monotonic()

    def scalar(self, name: str, value: float, step: int) -> None:
        """Writes one value."""
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value)])
        self._write(Event(step=step, summary=summary))

    def flush(self) -> None:
        """Brings to disk what was written, if that was not done just now."""
        if time.monotonic() >= self._next_flush:
            self._writer.flush()
            self._next_flush = time.monotonic() + FLUSH_SECONDS

    def close(self) -> None:
        """Brings all to disk."""
        self._writer.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)
