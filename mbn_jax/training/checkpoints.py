"""Checkpoints of a run: written by Orbax, sealed by checksums, restored only if valid.

Orbax restores an array file with a flipped bit without complaint. So a seal beside the files has
the SHA-256 of each; a checkpoint that is unfinished or does not match its seal is named aloud and
skipped. Training waits until a state is copied to the host: a thread writes and seals it.
"""

import asyncio.log
import concurrent.futures
import contextlib
import functools
import json
import logging as standard_logging
import pathlib
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from mbn_jax.errors import UserError
from mbn_jax.parallel.devices import Devices, agree, check_alike, first_host_first, replicate
from mbn_jax.step.state import TrainState
from mbn_jax.training import saved_statistics
from mbn_jax.training.seal import damage, seal

PyTree = Any
Together = Callable[[], contextlib.AbstractContextManager[None]]

UNFINISHED = "*.orbax-checkpoint-tmp*"
OS_ERROR = re.compile(r"\[os_error_code='(\d+)'\]")
"""In TensorStore's ValueErrors that stand for an OSError."""

ONE_STARTS = threading.Lock()
"""Held to start a save: Orbax numbers those of all threads of a process by one global."""


class Checkpoints:
    """The checkpoints in one folder, newest last.

    Saved are one copy of what all devices share, and the statistics of each group of devices that
    keeps its own.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        keep: int | None = None,
        keep_best: bool = False,
        on_sealed: Callable[[int], None] | None = None,
    ):
        """Opens `folder`, which is made where it is missing.

        Args:
          folder: folder of the checkpoints.
          keep: how many of the newest to keep; None: all.
          keep_best: whether to keep the one of the lowest `notes['test_error']` beside them.
          on_sealed: called with the step of each sealed checkpoint, by a thread of the first host.
        """
        self._folder = folder.absolute()
        self._keep = keep
        self._keep_best = keep_best
        self._on_sealed = on_sealed
        # Where a folder cannot be made in the background, Orbax's threads wait for it for minutes.
        ahead = ocp.AsyncOptions(create_directories_asynchronously=False)
        options = ocp.CheckpointManagerOptions(create=True, async_options=ahead)
        self._manager = ocp.CheckpointManager(self._folder, options=options)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "seal")
        self._unfinished: concurrent.futures.Future[None] | None = None

    def save(
        self,
        state: TrainState,
        *,
        local_statistics: bool,
        notes: Mapping[str, Any] | None = None,
        temporary: bool = False,
    ) -> None:
        """Starts to save the state of the devices, and returns when it is copied.

        Waits for the save before this one, and raises its error. The arrays may be donated after.

        Args:
          state: arrays `[devices, ...]`.
          local_statistics: whether devices keep statistics of their own.
          notes: JSON values, for `Checkpoints.notes`.
          temporary: whether the checkpoint serves only to resume from, until the next regular one;
            it takes the place of no other.

        Raises:
          OSError: where the disk is full, or cannot be written.
        """
        self.wait()
        stats = saved_statistics.groups_of(state.batch_stats, local_statistics=local_statistics)
        layout: dict[str, Any] = {
            "key_impl": str(jax.random.key_impl(state.key)),
            "notes": dict(notes or {}),
            "temporary": temporary,
            "statistics_groups": saved_statistics.num_groups(stats),
        }
        json.dumps(layout)  # An error of this is the caller's.
        host = _on_host(state.replace(batch_stats={}))
        tree = {"state": host, "batch_stats": stats}
        args = ocp.args.Composite(
            tree=ocp.args.StandardSave(tree), layout=ocp.args.JsonSave(layout)
        )
        step = int(host.step)
        layouts = self._layouts if self._keep else {}
        with disk_errors(), ONE_STARTS:
            saved = self._manager.save(step, args=args)  # Copies the arrays, views as they may be.
        if not saved:
            raise RuntimeError(f"Orbax declined to save step {step} in {self._folder}.")
        layouts[step] = layout
        old = self._take_old(self._keep) if self._keep and not temporary else []
        self._unfinished = self._thread.submit(self._finish, step, old)

    def _finish(self, step: int, old: list[int]) -> None:
        """Seals a checkpoint when it is written, then deletes old ones; in a thread.

        It talks to no other host: that would mix with what training says to them.
        """
        self._manager.wait_until_finished()
        if jax.process_index() == 0:
            seal(self._folder / str(step))
            # Not by Orbax, which would delete the oldest before the newest is sealed.
            for other in old:
                _delete(self._folder / str(other))
            if self._on_sealed:
                self._on_sealed(step)

    def wait(self) -> None:
        """Returns when all is on disk and sealed, on every host; raises the error of the save."""
        self._join(first_host_first)

    def check(self) -> None:
        """Raises the error of a save that failed meanwhile; does not wait.

        Over several hosts `wait` raises it, on all of them: here one host alone would end.
        """
        if jax.process_count() > 1:
            return
        if self._unfinished and self._unfinished.done() and self._unfinished.exception():
            self._join()

    def _join(self, together: Together = contextlib.nullcontext) -> None:
        """Waits for the save that goes on, and raises its error once."""
        unfinished, self._unfinished = self._unfinished, None
        if unfinished:
            with disk_errors(), together():
                self._manager.wait_until_finished()
                unfinished.result()

    def _take_old(self, keep: int) -> list[int]:
        """Returns the steps not to keep, and forgets them."""
        regular = sorted(step for step, x in self._layouts.items() if not x["temporary"])
        best = {_best(self._layouts)} if self._keep_best else set()
        old = sorted(self._layouts.keys() - set(regular[-keep:]) - best)
        for step in old:
            del self._layouts[step]
        return old

    @functools.cached_property
    def _layouts(self) -> dict[int, dict[str, Any]]:
        """What is known of each checkpoint, by step; it is read once."""
        return {step: self._layout(step) for step in self._manager.all_steps()}

    def restore(
        self,
        state: TrainState,
        *,
        local_statistics: bool,
        devices: Devices = None,
        best: bool = False,
    ) -> TrainState | None:
        """Restores the newest valid checkpoint onto the devices.

        Args:
          state: a state of the same structure, without the device axis.
          local_statistics: whether devices keep statistics of their own. Where the checkpoint's
            groups are not these devices, theirs are pooled and every device starts from the pool.
          devices: some of this host's; default: all, of all hosts.
          best: restore the one of the lowest noted test error instead.

        Returns:
          Arrays `[devices, ...]`, or None where there is no such checkpoint.
        """
        step = max(self._valid_steps, default=None)
        if best:
            step = _best({step: self._layout(step) for step in self._valid_steps})
        if step is None:
            return None
        restored, stats = self._read(step, state)
        stats = saved_statistics.on_devices(
            stats, state.batch_stats, local_statistics=local_statistics, devices=devices
        )
        on_devices = replicate(restored.replace(batch_stats={}), devices)
        return on_devices.replace(batch_stats=stats)

    def weights(self) -> tuple[PyTree, PyTree] | None:
        """Returns the parameters of the newest valid checkpoint, and its statistics by group."""
        if not self._valid_steps:
            return None
        args = ocp.args.Composite(tree=ocp.args.StandardRestore())
        tree = self._manager.restore(max(self._valid_steps), args=args)["tree"]
        return tree["state"]["params"], tree["batch_stats"] or {}

    @property
    def notes(self) -> dict[str, Any]:
        """The notes of the newest valid checkpoint; `{}` without one."""
        return self._layout(max(self._valid_steps))["notes"] if self._valid_steps else {}

    def discard_damaged(self) -> None:
        """Deletes checkpoints that are not valid, so that the run can write these steps again."""
        damaged = sorted(set(self._manager.all_steps()) - set(self._valid_steps))
        for step in damaged:
            self._manager.delete(step)  # By the first host.
        with first_host_first():  # The others may have folders of their own, copies of a bucket.
            folders = [*self._folder.glob(UNFINISHED), *(self._folder / str(x) for x in damaged)]
            for folder in filter(pathlib.Path.exists, folders):
                shutil.rmtree(folder)

    @functools.cached_property
    def _valid_steps(self) -> list[int]:
        """Steps that had a valid checkpoint when first asked, as the first host finds them."""
        self.wait()
        steps = sorted(self._manager.all_steps())
        check_alike(checkpoints=len(steps))
        valid = np.zeros(len(steps), bool)
        if jax.process_index() == 0:
            reasons = [damage(self._folder / str(step)) for step in steps]
            for step, reason in zip(steps, reasons, strict=True):
                if reason:
                    logging.warning("Skipped the checkpoint of step %d: %s.", step, reason)
            valid = np.array([reason is None for reason in reasons], bool)
        return [step for step, is_valid in zip(steps, agree(valid), strict=True) if is_valid]

    def _layout(self, step: int) -> dict[str, Any]:
        args = ocp.args.Composite(layout=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args)["layout"]

    def _read(self, step: int, state: TrainState) -> tuple[TrainState, PyTree]:
        """Returns the state of a checkpoint without its statistics, and these by group."""
        layout = self._layout(step)
        try:
            # The key is restored as it was saved, whatever JAX's default is now.
            key_impl, groups = layout["key_impl"], layout["statistics_groups"]
            state = state.replace(key=jax.random.key(0, impl=key_impl))
            target = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), _with_key_data(state))
            stats = jax.tree.map(lambda x: np.stack([np.asarray(x)] * groups), state.batch_stats)
            tree = {"state": target.replace(batch_stats={}), "batch_stats": stats}
            args = ocp.args.Composite(tree=ocp.args.StandardRestore(tree))
            tree = self._manager.restore(step, args=args)["tree"]
        except (ValueError, KeyError, TypeError) as error:
            # Its checksums match: it is valid, but of another model, or of another version.
            raise UserError(
                f"The checkpoint {self._folder / str(step)} does not fit the model of this "
                f"config ({str(error).splitlines()[0]}); use the config it was made with."
            ) from error
        key = jax.random.wrap_key_data(tree["state"].key, impl=key_impl)
        return tree["state"].replace(key=key), tree["batch_stats"]

    def close(self) -> None:
        """Waits, on this host only, for what is being saved; raises its error; ends the threads."""
        try:
            self._join()
        finally:
            self._manager.close()
            self._thread.shutdown()


def _delete(folder: pathlib.Path) -> None:
    """Deletes an old checkpoint, as far as others let it: the newer one is sealed already."""
    try:
        shutil.rmtree(folder)
    except OSError as error:  # Deleted by a person, or read by another host.
        logging.warning("The old checkpoint %s could not be deleted: %s.", folder, error)


def _best(layouts: Mapping[int, Mapping[str, Any]]) -> int | None:
    """Returns the newest step of the lowest test error, of those that note one."""
    errors = {step: layout["notes"].get("test_error") for step, layout in layouts.items()}
    known = [(error, -step) for step, error in errors.items() if error is not None]
    return -min(known)[1] if known else None


def _with_key_data(state: TrainState) -> TrainState:
    return state.replace(key=jax.random.key_data(state.key))


def _on_host(state: TrainState) -> TrainState:
    """Returns the first device's entry of every array: a copy, or on CPU a view of it."""
    shards = jax.tree.map(lambda x: x.addressable_data(0), _with_key_data(state))
    return jax.tree.map(lambda x: x.reshape(x.shape[1:]), jax.device_get(shards))


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Raises errors of the disk within Orbax as OSError."""
    try:
        yield
    except ValueError as error:
        number = OS_ERROR.search(str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), str(error)) from error


def _is_of_something_else(record: standard_logging.LogRecord) -> bool:
    """Whether a message tells of more than a write to the disk that failed.

    Orbax logs such errors and raises them too. Of the writes that fail after the one that is
    raised, asyncio tells at any time later.
    """
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, OSError) and OS_ERROR.search(str(error)) is None


for logger in (logging.get_absl_logger(), asyncio.log.logger):
    logger.addFilter(_is_of_something_else)
