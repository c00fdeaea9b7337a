"""Checkpoints of a run: written by Orbax, sealed by checksums, restored only if sound.

Orbax restores an array file with a flipped bit without complaint, so every file's SHA-256 is kept
beside it. A checkpoint that is unfinished or does not match is named aloud and skipped.
"""

import contextlib
import functools
import hashlib
import json
import pathlib
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from mbn_jax.core.batch_stats import pool_batch_stats
from mbn_jax.errors import UserError
from mbn_jax.parallel.devices import (
    Devices,
    agree,
    distribute,
    first_device,
    first_host_first,
    gather_over_hosts,
    local_devices,
    replicate,
)
from mbn_jax.step.state import TrainState
from mbn_jax.training.workdir import replace

SEAL = "checksums.json"
UNFINISHED = "*.orbax-checkpoint-tmp*"


class Checkpoints:
    """The checkpoints in one folder, newest last.

    Saved are one copy of what all devices share, and the statistics of each group of devices that
    keeps its own (`[groups, ...]`, one group where they are synced).
    """

    def __init__(self, folder: pathlib.Path, *, keep: int | None = None, every: int = 1):
        """Opens `folder`, which is made where it is missing.

        Args:
          folder: of the checkpoints.
          keep: so many of the newest; None: all.
          every: how many steps there are between two; others are temporary.
        """
        self._folder = folder.absolute()
        self._keep = keep
        self._every = every
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, create=True)
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def save(
        self,
        state: TrainState,
        *,
        local_statistics: bool,
        notes: Mapping[str, Any] | None = None,
        temporary: bool = False,
    ) -> None:
        """Saves the state of the devices, and returns when it is on disk and sealed.

        Args:
          state: arrays `[devices, ...]`.
          local_statistics: whether devices keep statistics of their own.
          notes: of the run, as JSON has them; `notes` returns them.
          temporary: whether it is to go on from, until the next is there, which would be there
            without it too; it takes the place of no other.

        Raises:
          OSError: where the disk is full, or cannot be written.
        """
        host = jax.device_get(_without_key_type(first_device(state)))
        if local_statistics:
            stats = gather_over_hosts(state.batch_stats)
        else:
            stats = jax.tree.map(lambda x: x[:1], jax.device_get(state.batch_stats))
        groups = max((len(x) for x in jax.tree.leaves(stats)), default=1)
        step = int(host.step)
        tree = {"state": host.replace(batch_stats={}), "batch_stats": stats}
        layout = {"statistics_groups": groups, "notes": dict(notes or {})}
        try:
            with _errors_raised_only():
                saved = self._manager.save(
                    step,
                    args=ocp.args.Composite(
                        tree=ocp.args.StandardSave(tree), layout=ocp.args.JsonSave(layout)
                    ),
                )
        except ValueError as error:
            # TensorStore's way of an OSError.
            number = re.search(r"\[os_error_code='(\d+)'\]", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), str(error)) from error
        if not saved:
            raise RuntimeError(f"Orbax declined to save step {step} in {self._folder}.")
        self._manager.wait_until_finished()
        with first_host_first():
            if jax.process_index() == 0:
                folder = self._folder / str(step)
                replace(folder / SEAL, json.dumps(_checksums(folder), indent=1).encode())
        # Not by Orbax, which would drop the oldest before the newest is sealed.
        if self._keep and not temporary:
            steps = self._manager.all_steps()
            kept = sorted(s for s in steps if s % self._every == 0 or s == step)[-self._keep :]
            for old in sorted(set(steps) - set(kept)):
                self._manager.delete(old)

    def restore(
        self, state: TrainState, *, local_statistics: bool, devices: Devices = None
    ) -> TrainState | None:
        """Restores the newest sound checkpoint onto the devices.

        Args:
          state: of the same structure, without the device axis.
          local_statistics: whether devices keep statistics of their own. Where the checkpoint's
            groups are not these devices, theirs are pooled and every device starts from the pool.
          devices: some of this host's; default: all, of all hosts.

        Returns:
          Arrays `[devices, ...]`, or None where there is no sound checkpoint.
        """
        if not self._sound_steps:
            return None
        restored, stats = self._read(max(self._sound_steps), state)
        on_devices = replicate(restored.replace(batch_stats={}), devices)
        groups = {len(x) for x in jax.tree.leaves(stats)}
        if not local_statistics or groups != {len(devices or jax.devices())}:
            pooled = _in_groups_of(state.batch_stats, _pooled(stats))
            return on_devices.replace(batch_stats=replicate(pooled, devices))
        count = len(local_devices(devices))
        first = 0 if devices else jax.process_index() * count
        stats = jax.tree.map(lambda x: x[first : first + count], stats)
        return on_devices.replace(batch_stats=distribute(stats, devices))

    @property
    def notes(self) -> dict[str, Any]:
        """What was noted with the checkpoint that `restore` restores; `{}` without one."""
        return self._layout(max(self._sound_steps)).get("notes", {}) if self._sound_steps else {}

    def discard_damaged(self) -> None:
        """Deletes checkpoints that are not sound, so that the run can write these steps again."""
        with first_host_first():
            if jax.process_index() == 0:
                for folder in self._folder.glob(UNFINISHED):
                    shutil.rmtree(folder)
        for step in set(self._manager.all_steps()) - set(self._sound_steps):
            self._manager.delete(step)

    def go_back(self, not_to: int | None) -> int:
        """Deletes the checkpoints that a run which diverged must not go on from.

        Args:
          not_to: one that it went back to before, in vain.

        Returns:
          The step of the newest that is left; 0 where none is.
        """
        left = 0
        for step in sorted(self._manager.all_steps()):
            if step % self._every or step == not_to:
                self._manager.delete(step)
            else:
                left = step
        return left

    @functools.cached_property
    def _sound_steps(self) -> list[int]:
        """Steps that had a sound checkpoint when first asked, as the first host finds them."""
        steps = sorted(self._manager.all_steps())
        sound = np.zeros(len(steps), bool)
        if jax.process_index() == 0:
            damage = [_damage(self._folder / str(step)) for step in steps]
            for step, reason in zip(steps, damage, strict=True):
                if reason:
                    logging.warning("Skipped the checkpoint of step %d: %s.", step, reason)
            sound = np.array([reason is None for reason in damage], bool)
        return [step for step, is_sound in zip(steps, agree(sound), strict=True) if is_sound]

    def _layout(self, step: int) -> dict[str, Any]:
        args = ocp.args.Composite(layout=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args)["layout"]

    def _read(self, step: int, state: TrainState):
        groups = self._layout(step)["statistics_groups"]
        target = jax.tree.map(_as_numpy_target, _without_key_type(state))
        stats = jax.tree.map(lambda x: np.zeros((groups, *x.shape), x.dtype), target.batch_stats)
        try:
            tree = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    tree=ocp.args.StandardRestore(
                        {"state": target.replace(batch_stats={}), "batch_stats": stats}
                    )
                ),
            )["tree"]
        except (ValueError, KeyError, TypeError) as error:
            # Its checksums match: it is sound, but of another model.
            raise UserError(
                f"The checkpoint {self._folder / str(step)} does not fit the model of this "
                f"config ({str(error).splitlines()[0]}); use the config it was made with."
            ) from error
        key = jax.random.wrap_key_data(tree["state"].key)
        return tree["state"].replace(key=key), tree["batch_stats"]

    def close(self) -> None:
        """Releases Orbax's threads."""
        self._manager.close()


@contextlib.contextmanager
def _errors_raised_only() -> Iterator[None]:
    """Silences what Orbax shows of errors in its threads, for it raises them too."""

    def has_no_traceback(record) -> bool:
        return not record.exc_info

    def show(unraisable) -> None:
        # Of TensorStore's other writes, that ended after the one that was raised.
        if str(unraisable.exc_value) != "Event loop is closed":
            show_before(unraisable)

    logger, show_before = logging.get_absl_logger(), sys.unraisablehook
    logger.addFilter(has_no_traceback)
    sys.unraisablehook = show
    try:
        yield
        sys.unraisablehook = show_before  # After an error it stays: who knows when the others end.
    finally:
        logger.removeFilter(has_no_traceback)


def _pooled(stats):
    if any(len(x) > 1 for x in jax.tree.leaves(stats)):
        return jax.device_get(pool_batch_stats(stats))
    return jax.tree.map(lambda x: x[0], stats)


def _in_groups_of(like, stats):
    """Pools virtual batches where their number is another one now; each starts from the pool."""
    if jax.tree.map(np.shape, stats) == jax.tree.map(np.shape, like):
        return stats
    pooled = jax.device_get(pool_batch_stats(stats))
    return jax.tree.map(lambda x, y: np.broadcast_to(x, np.shape(y)), pooled, like)


def _without_key_type(state: TrainState) -> TrainState:
    return state.replace(key=jax.random.key_data(state.key))


def _as_numpy_target(x) -> np.ndarray:
    return np.zeros(x.shape, x.dtype)


def _checksums(folder: pathlib.Path) -> dict[str, str]:
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != SEAL)
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def _damage(folder: pathlib.Path) -> str | None:
    """Returns what is wrong with a checkpoint, or None."""
    try:
        expected = json.loads((folder / SEAL).read_text())
    except FileNotFoundError:
        return "it was not finished"
    except ValueError:
        return f"{SEAL} is damaged"
    found = _checksums(folder)
    for name in sorted(set(expected) | set(found)):
        if name not in found:
            return f"{name} is missing"
        if expected.get(name) != found[name]:
            return f"{name} is damaged"
    return None
