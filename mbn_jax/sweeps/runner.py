"""Runs what is missing of a sweep: one member at a time on each device, until all are done."""

import contextlib
import dataclasses
import os
import pathlib
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import optuna
import sqlalchemy.exc
from ml_collections import ConfigDict
from optuna.trial import FrozenTrial, TrialState

from mbn_jax.errors import StoppedError, UserError
from mbn_jax.names import reason
from mbn_jax.sweeps import storage as store
from mbn_jax.sweeps.declaration import Member, Sweep
from mbn_jax.sweeps.progress import Progress
from mbn_jax.training.config import fields, program_key
from mbn_jax.training.config_files import with_fields
from mbn_jax.training.divergence import DivergenceError
from mbn_jax.training.loop import train
from mbn_jax.training.program import Programs
from mbn_jax.training.reporting import read_metrics, selection_metric
from mbn_jax.training.workdir import only_writer

MEMBERS = "members"
TRACEBACK = "traceback.txt"
POLL_SECONDS = 1.0

REQUEUED = (
    StoppedError,
    optuna.exceptions.UpdateFinishedTrialError,
    optuna.exceptions.StorageInternalError,
    sqlalchemy.exc.SQLAlchemyError,
)
"""Errors for which the member is not at fault: it is left to whoever comes next."""


class Runner:
    """One process's part in a sweep; any number of them share its members.

    Attributes:
      members: all of the sweep, in the order in which they are enqueued, with the fields that they
        run with.
      devices: on which members run, one at a time on each.
    """

    def __init__(
        self,
        sweep: Sweep,
        config: ConfigDict,
        workdir: pathlib.Path,
        devices: Sequence[jax.Device] | None = None,
    ):
        """Opens the data and checks every member; nothing compiles.

        `config` is what all members share; `devices` are all of this host by default. Raises
        UserError for a member that cannot work.
        """
        self.members = with_room(sweep.members(), config)
        self.devices = devices or jax.local_devices()
        self._config = config
        self._workdir = workdir
        self._study: optuna.Study
        self._programs = {device: Programs([device]) for device in self.devices}
        self._claiming = threading.Lock()
        self._stop = threading.Event()
        self._errors: list[BaseException] = []
        folders = Counter(member.folder.casefold() for member in self.members)
        twice = [member.name for member in self.members if folders[member.folder.casefold()] > 1]
        if twice:
            raise UserError(f"these members have names too much alike for folders: {twice}")
        for member in self.members:
            self._programs[self.devices[0]].task(member.config(config))

    @property
    def num_programs(self) -> int:
        """How many different programs the members need: compilations, on one device."""
        return len({program_key(member.config(self._config)) for member in self.members})

    @property
    def step_compilations(self) -> int:
        """How often a training step was compiled so far, over all devices."""
        return sum(programs.step_compilations for programs in self._programs.values())

    def run(self, study: optuna.Study) -> Counter:
        """Runs members until none is left, here or elsewhere; counts them by outcome.

        Call it from the main thread.

        Raises:
          KeyboardInterrupt: when interrupted, after the members in work were saved and requeued.
          StoppedError: likewise, by SIGTERM.
        """
        self._study = study
        threads = [
            threading.Thread(target=self._work, args=(device,), daemon=True)
            for device in self.devices
        ]
        for thread in threads:
            thread.start()
        with _signals_set(self._stop) as signals:
            self._show_until_done(threads)
        if self._errors:
            raise self._errors[0]
        if signal.SIGTERM in signals:
            raise StoppedError("stopped; the members in work are saved")
        if signals:
            raise KeyboardInterrupt
        return Counter(store.outcome(trial) for trial in self._trials().values())

    def _trials(self) -> dict[str, FrozenTrial]:
        return store.trials_by_member(self._study)

    def _show_until_done(self, threads: Sequence[threading.Thread]) -> None:
        progress = Progress(len(self.members), self._trials())
        try:
            alive = True
            while alive:
                alive = any(thread.is_alive() for thread in threads)
                progress.update(self._trials(), stopping=self._stop.is_set())
                if alive:
                    time.sleep(POLL_SECONDS / 2)
        finally:
            progress.close()

    def _work(self, device: jax.Device) -> None:
        """Runs members on one device, until all are done or this process is to stop."""
        try:
            while not self._stop.is_set():
                with self._claiming:
                    states = self._states()
                    if states[TrialState.WAITING]:
                        self._run_next(device)
                        continue
                if not states[TrialState.RUNNING]:
                    return
                self._stop.wait(POLL_SECONDS)  # Others run elsewhere, and may yet be abandoned.
        except BaseException as error:  # Shown by the main thread, which waits for this one.
            self._errors.append(error)
            self._stop.set()

    def _states(self) -> Counter:
        """Enqueues what is missing or abandoned; returns how many trials are in each state."""
        store.abandon_stale(self._study)
        store.enqueue_missing(self._study, self.members)
        return Counter(trial.state for trial in self._study.get_trials(deepcopy=False))

    def _run_next(self, device: jax.Device) -> None:
        """Claims and runs one member; holds `_claiming`, apart from the training itself."""
        numbers: list[int] = []

        def objective(trial: optuna.Trial) -> float:
            numbers.append(trial.number)
            self._claiming.release()
            try:
                return self._run_member(trial, device)
            finally:
                self._claiming.acquire()

        try:
            self._study.optimize(objective, n_trials=1, catch=(Exception,))
        except (ValueError, AssertionError, optuna.exceptions.UpdateFinishedTrialError):
            # Optuna cannot end a trial that others gave up meanwhile: they have the member now.
            trials = self._study.get_trials(deepcopy=False)
            if not numbers or trials[numbers[0]].state != TrialState.FAIL:
                raise

    def _run_member(self, trial: optuna.Trial, device: jax.Device) -> float:
        """Runs one member, and records how it ended; returns its test error, or its test loss."""
        trial.set_user_attr(store.RUNNER, f"process {os.getpid()} on {socket.gethostname()}")
        name = trial.user_attrs.get(store.MEMBER)
        if name is None or store.is_duplicate(self._study, trial.number, name):
            trial.set_user_attr(store.OUTCOME, store.DUPLICATE)
            raise optuna.TrialPruned("another runner has this member")
        folder = self._workdir / MEMBERS / trial.user_attrs[store.FOLDER]
        with self._holding(folder):
            try:
                values = self._train(trial, device, folder)
            except DivergenceError as error:
                _record_end(trial, folder, store.DIVERGED, reason=str(error), step=error.step)
                raise optuna.TrialPruned(str(error)) from error
            except REQUEUED:
                raise
            except Exception as error:  # Whatever it is, the other members go on.
                told = reason(error)
                if not isinstance(error, UserError):
                    (folder / TRACEBACK).write_text(traceback.format_exc())
                    told += f"; see {TRACEBACK} in its folder"
                _record_end(trial, folder, store.FAILED, reason=told)
                raise
            _record_end(trial, folder, store.FINISHED)
        return values["test_error"] if "test_error" in values else values["test_loss"]

    @contextlib.contextmanager
    def _holding(self, folder: pathlib.Path) -> Iterator[None]:
        """Makes and locks the folder of a member; ends this runner where that fails.

        Heartbeats stop while a machine sleeps, and another runner takes its member over: when it
        wakes up, the folder must still have one writer.
        """
        with contextlib.ExitStack() as stack:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(only_writer(folder, waits=lambda: not self._stop.is_set()))
            except (OSError, UserError) as error:
                if not self._stop.is_set():  # The member is not at fault, and stays to be run.
                    if isinstance(error, OSError):
                        told = f"The folder {folder} cannot be made: {error.strerror}."
                        error = UserError(told)
                    self._errors.append(error)
                    self._stop.set()
                raise
            yield

    def _train(
        self, trial: optuna.Trial, device: jax.Device, folder: pathlib.Path
    ) -> dict[str, float]:
        """Trains one member, and records what that cost."""
        programs = self._programs[device]
        config = with_fields(self._config, trial.user_attrs[store.FIELDS], str(folder))
        _show_on_dashboard(trial, config)

        member = trial.user_attrs[store.MEMBER]
        earlier = store.seconds_before(self._study, trial.number, member)
        begin, compiled = time.monotonic(), programs.step_compilations

        def note_cost() -> None:
            cost = {
                "seconds": earlier + time.monotonic() - begin,
                "step_compilations": programs.step_compilations - compiled,
                "peak_bytes": _peak_bytes(device),
            }
            trial.set_user_attr(store.COST, cost)

        def on_record(step: int, values: dict[str, float]) -> None:
            if (value := selection_metric(values)) is not None:
                trial.report(value, step)
                note_cost()  # This process may be killed.

        def stop_asked(first_step: int, last_step: int) -> bool:
            return self._stop.is_set()

        try:
            return train(
                config, folder, programs=programs, on_record=on_record, stop_asked=stop_asked
            )
        finally:
            note_cost()


def with_room(members: Sequence[Member], config: ConfigDict) -> list[Member]:
    """Returns the members with room for the largest memory of all, so that they share a program.

    An endless memory (`norm.memory_size=0`) has no slots. A member that sets the capacity itself
    keeps it.
    """
    norms = [member.config(config).norm for member in members]
    slots = [max(norm.memory_size, norm.memory_capacity) for norm in norms if norm.memory_size]
    capacity = max(slots, default=0)
    return [
        dataclasses.replace(
            member, fields={store.CAPACITY: capacity if norm.memory_size else 0, **member.fields}
        )
        for member, norm in zip(members, norms, strict=True)
    ]


@contextlib.contextmanager
def _signals_set(event: threading.Event) -> Iterator[list[int]]:
    """Sets an event on SIGINT and SIGTERM, in place of an exception, which a library may drop.

    Yields:
      The signals that came.
    """
    signals: list[int] = []
    before: dict[int, Any] = {}

    def stop(number: int, _) -> None:
        signals.append(number)
        event.set()
        # A second signal gets the previous handler.
        signal.signal(number, before[number] or signal.SIG_DFL)

    for caught in (signal.SIGINT, signal.SIGTERM):
        before[caught] = signal.signal(caught, stop)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _show_on_dashboard(trial: optuna.Trial, config: ConfigDict) -> None:
    """Makes the fields that are numbers parameters of the trial, to plot by."""
    values: Mapping[str, Any] = fields(config)
    for field in trial.user_attrs[store.FIELDS]:
        value = values.get(field)
        if isinstance(value, float):
            trial.suggest_float(field, value, value)
        elif isinstance(value, int) and not isinstance(value, bool):
            trial.suggest_int(field, value, value)


def _record_end(
    trial: optuna.Trial,
    folder: pathlib.Path,
    outcome: str,
    *,
    reason: str = "",
    step: int | None = None,
) -> None:
    """Records how a member ended; the outcome last, for it makes the rest count."""
    evaluations = [record for record in read_metrics(folder) if _is_evaluation(record)]
    trial.set_user_attr(store.RECORDS, evaluations)
    if reason:
        trial.set_user_attr(store.REASON, reason)
        trial.set_user_attr(store.STEP, step)
    trial.set_user_attr(store.OUTCOME, outcome)


def _is_evaluation(record: Mapping[str, float]) -> bool:
    return any(name.startswith(("test_", "shift_", "error_")) for name in record)


def _peak_bytes(device: jax.Device) -> int:
    """Returns the device's peak memory, or the process's where the device keeps no account."""
    stats = device.memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
