"""Stopping a run from outside, at a step that all hosts agree on."""

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental.multihost_utils import reached_preemption_sync_point

StopAsked = Callable[[int, int], bool]
"""Asked after every dispatch, with its first and last step: whether the run is to stop there."""


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[StopAsked]:
    """Lets SIGTERM ask the run within the block to stop, instead of ending the process.

    In the main thread only. Over several hosts a signal to one of them stops all, after the same
    step: each asks JAX's coordination service, which has caught it, about every step.

    Yields:
      Whether the run is to stop; costs no communication and no wait for the devices.
    """
    if jax.process_count() > 1:
        yield _reached_by_all_hosts
        return
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield lambda first, last: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


def _reached_by_all_hosts(first: int, last: int) -> bool:
    # The step agreed upon is one more than any host has asked about, and may be any of a dispatch:
    # every one is asked about, and by its number, as Orbax does too whenever it saves.
    reached = [reached_preemption_sync_point(step) for step in range(first, last + 1)]
    return any(reached)


# Orbax asks too when it saves, and says so several times on every host; the run says it once.
logging.getLogger("absl").addFilter(
    lambda record: "Reached preemption sync point" not in record.getMessage()
)
