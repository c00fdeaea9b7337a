"""The processes that decode images: they end with the process that they serve, and by no signal."""

import multiprocessing
import os
import signal
import threading
from multiprocessing.process import BaseProcess


def begin_worker(index: int, count: int) -> None:
    """Prepares a process that Grain has started, number `index` of `count`."""
    # Schedulers send SIGTERM, and terminals SIGINT, to the run and its workers alike. The run needs
    # them up to the step that it stops at.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    served = multiprocessing.parent_process()
    assert served is not None  # A worker is started by `multiprocessing`.
    threading.Thread(target=_end_with, args=(served,), daemon=True).start()


def _end_with(served: BaseProcess) -> None:
    """Ends this process at once when that one has: killed, it cannot tell its workers."""
    served.join()
    os._exit(1)
