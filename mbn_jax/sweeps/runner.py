"""Runs what is missing of a sweep: one member at a time on each device, until all are done."""

import pathlib
import resource
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import optuna
import sqlalchemy.exc
from ml_collections import ConfigDict
from optuna.trial import TrialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mbn_jax.errors import UserError
from mbn_jax.parallel.preemption import StoppedError
from mbn_jax.sweeps import storage as store
from mbn_jax.sweeps.declaration import Member, Sweep
from mbn_jax.training import config as config_lib
from mbn_jax.training.config_files import with_fields
from mbn_jax.training.divergence import DivergenceError
from mbn_jax.training.estimate import estimate_seconds
from mbn_jax.training.loop import train
from mbn_jax.training.program import Programs
from mbn_jax.training.reporting import read_metrics

MEMBERS = "members"
POLL_SECONDS = 1.0
ENDS = (store.FINISHED, store.DIVERGED, store.FAILED)


# The member is not at fault: it is left to whoever comes next.
_GIVES_BACK = (
    StoppedError,
    optuna.exceptions.UpdateFinishedTrialError,
    optuna.exceptions.StorageInternalError,
    sqlalchemy.exc.SQLAlchemyError,
)


class Runner:
    """One process's part in a sweep; any number of them share its members."""

    def __init__(
        self,
        sweep: Sweep,
        config: ConfigDict,
        workdir: pathlib.Path,
        devices: Sequence[jax.Device] | None = None,
    ):
        """Opens the data and checks every member; nothing compiles.

        Args:
          sweep: what to run.
          config: that all members share.
          workdir: where their runs are.
          devices: to run on, one member each; default: all of this host.

        Raises:
          UserError: for a member that cannot work.
        """
        self._members = {member.name: member for member in sweep.members()}
        self._config = config
        # The slots that the largest memory needs: all can share a program.
        norms = [member.config(config).norm for member in self.members]
        self._capacity = max(max(n.memory_size, n.memory_capacity) for n in norms)
        self._workdir = workdir
        self._study: optuna.Study
        self.devices = devices or jax.local_devices()
        self._programs = {device: Programs([device]) for device in self.devices}
        self._first = self._programs[self.devices[0]]
        folders = Counter(member.folder.casefold() for member in self.members)
        twice = [member.name for member in self.members if folders[member.folder.casefold()] > 1]
        if twice:
            raise UserError(f"these members have names too much alike for folders: {twice}")
        for member in self.members:
            self._first.task(self._config_of(member.fields))
        self._looking = threading.Lock()
        self._stop = threading.Event()
        self._errors: list[BaseException] = []

    def _config_of(self, fields) -> ConfigDict:
        capacity = {"norm.memory_capacity": self._capacity}
        return with_fields(self._config, {**capacity, **fields}, str(fields))

    @property
    def members(self) -> list[Member]:
        """All members, in the order in which they are enqueued."""
        return list(self._members.values())

    @property
    def num_programs(self) -> int:
        """How many different programs the members need: compilations, on one device."""
        return len({config_lib.program_key(self._config_of(m.fields)) for m in self.members})

    @property
    def step_compilations(self) -> int:
        """How often a training step was compiled so far, over all devices."""
        return sum(programs.step_compilations for programs in self._programs.values())

    def estimate_seconds(self, seconds: float = 1.0) -> float:
        """Estimates the time of the whole sweep, from nothing, by a short run of each program."""
        total, per_program = 0.0, {}
        for member in self.members:
            config = self._config_of(member.fields)
            key = config_lib.program_key(config)
            if key not in per_program:
                program = self._first.get(config)
                begin = time.monotonic()
                per_program[key] = estimate_seconds(program, config, seconds)
                total += time.monotonic() - begin  # Compilation, by and large.
            total += per_program[key] / len(self._programs)
        return total

    def run(self, study: optuna.Study) -> Counter:
        """Runs members until none is left, here or elsewhere; from the main thread.

        Args:
          study: that holds their state.

        Returns:
          How many ended how.

        Raises:
          KeyboardInterrupt: when interrupted, after the members in work were saved and given back.
          StoppedError: likewise, by SIGTERM.
        """
        self._study = study
        threads = [
            threading.Thread(target=self._work, args=(device,), daemon=True)
            for device in self.devices
        ]
        for thread in threads:
            thread.start()
        # Not by an exception, which may rise anywhere, where a library drops it too.
        signals: list[int] = []
        before: dict[int, Any] = {}

        def stop(number: int, _) -> None:
            signals.append(number)
            self._stop.set()
            signal.signal(number, before[number] or signal.SIG_DFL)  # The second is not patient.

        for caught in (signal.SIGINT, signal.SIGTERM):
            before[caught] = signal.signal(caught, stop)
        try:
            self._show_until_done(threads)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)
        if self._errors:
            raise self._errors[0]
        if signal.SIGTERM in signals:
            raise StoppedError("stopped; the members in work are saved")
        if signals:
            raise KeyboardInterrupt
        return self._outcomes()

    def _work(self, device: jax.Device) -> None:
        """Runs members on one device."""
        try:
            while not self._stop.is_set():
                with self._looking:
                    ran = self._run_next(device)
                if ran is None:
                    return
                if not ran:  # Others run elsewhere, and may yet be given up.
                    self._stop.wait(POLL_SECONDS)
        except BaseException as error:  # Shown by the main thread, which waits for this one.
            self._errors.append(error)
            self._stop.set()

    def _run_next(self, device: jax.Device) -> bool | None:
        """Runs one member; False if all are taken, None if all are done."""
        store.give_up_stale(self._study)
        store.enqueue_missing(self._study, self.members, self._capacity)
        states = Counter(t.state for t in self._study.get_trials(deepcopy=False))
        if not states[TrialState.WAITING]:
            return False if states[TrialState.RUNNING] else None
        numbers: list[int] = []
        try:
            self._study.optimize(
                lambda trial: self._run_member(trial, device, numbers),
                n_trials=1,
                catch=(Exception,),
            )
        except (ValueError, AssertionError, optuna.exceptions.UpdateFinishedTrialError):
            # Optuna cannot end a trial that others gave up meanwhile: they have the member now.
            trials = self._study.get_trials(deepcopy=False)
            if not numbers or trials[numbers[0]].state != TrialState.FAIL:
                raise
        return True

    def _run_member(self, trial: optuna.Trial, device: jax.Device, numbers: list[int]) -> float:
        """Runs one member while others look for theirs; notes the trial's number."""
        numbers.append(trial.number)
        self._looking.release()
        try:
            return self._train_member(trial, device)
        finally:
            self._looking.acquire()

    def _train_member(self, trial: optuna.Trial, device: jax.Device) -> float:
        """Trains one member, and records what became of it."""
        trial.set_user_attr(store.RUNNER, store.this_runner())
        name = trial.user_attrs.get(store.MEMBER)
        if name is None or store.is_duplicate(self._study, trial.number, name):
            trial.set_user_attr(store.OUTCOME, store.DUPLICATE)
            raise optuna.TrialPruned("another runner has this member")
        folder = self._workdir / MEMBERS / trial.user_attrs[store.FOLDER]
        with store.only_one(folder, give_up=self._stop.is_set) as alone:
            if not alone:
                raise StoppedError
            try:
                values = self._train(trial, device, folder)
            except DivergenceError as error:
                self._record(trial, folder, store.DIVERGED, reason=str(error), step=error.step)
                raise optuna.TrialPruned(str(error)) from error
            except _GIVES_BACK:
                raise
            except Exception as error:  # Whatever it is, the other members go on.
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                self._record(trial, folder, store.FAILED, reason=reason)
                raise
            self._record(trial, folder, store.FINISHED)
        return values["test_error"]

    def _train(self, trial: optuna.Trial, device: jax.Device, folder: pathlib.Path):
        programs = self._programs[device]
        config = self._config_of(trial.user_attrs[store.FIELDS])
        values = config_lib.fields(config)
        for field in trial.user_attrs[store.FIELDS]:  # So that a dashboard can plot by it.
            if isinstance(values[field], float):
                trial.suggest_float(field, values[field], values[field])
            elif isinstance(values[field], int) and not isinstance(values[field], bool):
                trial.suggest_int(field, values[field], values[field])

        def on_record(step: int, values: dict[str, float]) -> None:
            if "test_error" in values:
                trial.report(values["test_error"], step)

        def stop_asked(first_step: int, last_step: int) -> bool:
            return self._stop.is_set()

        begin, compiled = time.monotonic(), programs.step_compilations
        try:
            return train(
                config, folder, programs=programs, on_record=on_record, stop_asked=stop_asked
            )
        finally:
            cost = {
                "seconds": time.monotonic() - begin,
                "step_compilations": programs.step_compilations - compiled,
                "peak_bytes": _peak_bytes(device),
            }
            trial.set_user_attr(store.COST, cost)

    def _record(self, trial, folder, outcome: str, reason: str = "", step: int | None = None):
        """Writes down how a member ended; the outcome last, for it makes the rest count."""
        evaluations = [r for r in read_metrics(folder) if _is_evaluation(r)]
        trial.set_user_attr(store.RECORDS, evaluations)
        if reason:
            trial.set_user_attr(store.REASON, reason)
            trial.set_user_attr(store.STEP, step)
        trial.set_user_attr(store.OUTCOME, outcome)

    def _outcomes(self) -> Counter:
        return Counter(store.outcome(trial) for trial in self._trials().values())

    def _show_until_done(self, threads: Sequence[threading.Thread]) -> None:
        """Shows how many members are done, running and failed, and the time left."""
        console = Console(stderr=True)
        told = {n for n, t in self._trials().items() if store.outcome(t) in ENDS}
        progress = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[states]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            speed_estimate_period=3600,
        )
        with progress:
            task = progress.add_task("", total=len(self._members), completed=len(told), states="")
            while True:
                alive = any(thread.is_alive() for thread in threads)
                trials = self._trials()
                for name in [n for n in trials if n not in told]:
                    if store.outcome(trials[name]) in ENDS:
                        told.add(name)
                        count = f"{len(told)}/{len(self._members)}"
                        progress.console.print(
                            f"{count} {_told(name, trials[name])}",
                            highlight=False,
                            markup=False,
                            soft_wrap=True,
                        )
                counts = Counter(store.outcome(trial) for trial in trials.values())
                shown = ("running", store.DIVERGED, store.FAILED)
                states = ", ".join(f"{counts[s]} {s}" for s in shown if counts[s])
                if self._stop.is_set():
                    states += " (stopping at the next step of each)"
                total = max(len(trials), len(self._members))  # Another runner may know of more.
                progress.update(task, completed=len(told), total=total, states=states)
                if not alive:
                    return
                time.sleep(POLL_SECONDS / 2)

    def _trials(self):
        return store.trials_by_member(self._study)


def _is_evaluation(record: dict[str, float]) -> bool:
    return any(name.startswith(("test_", "shift_", "error_")) for name in record)


def _told(name: str, trial: optuna.trial.FrozenTrial) -> str:
    """Returns the line that says how a member ended."""
    outcome = store.outcome(trial)
    if outcome != store.FINISHED:
        return f"{name}: {outcome}: {trial.user_attrs[store.REASON]}"
    error = trial.user_attrs[store.RECORDS][-1]["test_error"]
    return f"{name}: test error {error:.2%} in {trial.user_attrs[store.COST]['seconds']:.1f} s"


def _peak_bytes(device: jax.Device) -> int:
    """Returns the device's peak memory, or the process's where the device keeps no account."""
    stats = device.memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
