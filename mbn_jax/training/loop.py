"""The training run: from a configuration and a folder to a trained network and its curves."""

import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mbn_jax.command_line import is_bucket
from mbn_jax.datasets.find import is_made_on_first_use
from mbn_jax.errors import StoppedError, UserError, one_line
from mbn_jax.parallel.devices import check_alike, first_host_first
from mbn_jax.parallel.hosts import lost_host
from mbn_jax.parallel.preemption import StopAsked
from mbn_jax.step.state import TrainState
from mbn_jax.training.buckets import Bucket, local_copy
from mbn_jax.training.checkpoints import Checkpoints
from mbn_jax.training.config import fields
from mbn_jax.training.divergence import DivergenceError, FiniteCheck, find_layer
from mbn_jax.training.hparams import HParams
from mbn_jax.training.intervals import Intervals
from mbn_jax.training.norms import is_endless
from mbn_jax.training.overview import overview
from mbn_jax.training.passes import compile_start, evaluate, recalibrate, train_pass
from mbn_jax.training.presets import PRESETS, preset_of
from mbn_jax.training.program import Program, Programs
from mbn_jax.training.reporting import (
    METRICS,
    Reporter,
    draw_curves,
    of_split,
    read_metrics,
    selection_metric,
    shown,
)
from mbn_jax.training.shift import measure_shift
from mbn_jax.training.start import Start, find_start
from mbn_jax.training.startup import Startup
from mbn_jax.training.workdir import CHECKPOINTS, CONFIG, open_workdir, save_config, writing

LAST_VALUES = ("step", "train_", "test_", "recalibrated_test_")
DISPATCHES_IN_FLIGHT = 8
REMEDY = "Lower optimizer.learning_rate, or set gradient_clip_norm."


def train(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    *,
    programs: Programs | None = None,
    on_record: Callable[[int, dict[str, float]], None] | None = None,
    stop_asked: StopAsked | None = None,
    startup: Startup | None = None,
) -> dict[str, float]:
    """Trains, or continues where an earlier call with the same `workdir` stopped.

    Args:
      config: run configuration, from `mbn_jax.training.config.default_config` with changes.
      workdir: folder for config, metrics, events, checkpoints and curves, made where missing; or
        an address in a bucket, 'gs://BUCKET/PATH' or 's3://BUCKET/PATH'.
      programs: the devices to run on, and compiled programs to share with other runs; default: all
        devices, nothing compiled.
      on_record: called with the step and the values of each record, in place of the progress line;
        an exception from it ends the run. Such a run draws no curves.
      stop_asked: called after every dispatch; True saves and stops there. Its answers must be the
        same on all hosts.
      startup: the clock of what the caller did so far; the run tells its times at the first step.

    Returns:
      'step', and the last values of 'train_loss', 'test_loss', the same of each further metric of
      the loss ('error'), and with `recalibrate_batches` 'recalibrated_test_loss' and so on.

    Raises:
      UserError: for a configuration or data that cannot work, or a workdir that is of another
        configuration, damaged, or cannot be written.
      DivergenceError: if training diverges.
      StoppedError: if `stop_asked` says so.
    """
    call = functools.partial(_train, config, programs, on_record, stop_asked, startup)
    if is_bucket(workdir):
        with local_copy(str(workdir)) as bucket:
            return call(bucket.folder, bucket)
    return call(pathlib.Path(workdir), None)


def _train(
    config: ConfigDict,
    programs: Programs | None,
    on_record: Callable[[int, dict[str, float]], None] | None,
    stop_asked: StopAsked | None,
    startup: Startup | None,
    workdir: pathlib.Path,
    bucket: Bucket | None,
) -> dict[str, float]:
    """Trains in a folder, or in the local copy of a bucket."""
    clock = startup or Startup()
    program = _open(config, workdir, programs or Programs())
    clock.ends("data")
    if not config.init_from and not (workdir / CHECKPOINTS).exists():
        compile_start(program, config)
    start = find_start(program, config, workdir)
    _save_config(config, workdir, is_shared=bucket is None)
    with first_host_first():  # If the first host cannot write, all of them end.
        reporter = Reporter(
            workdir,
            first_step=start.step,
            total_steps=program.task.total_steps,
            on_record=on_record,
            silent=jax.process_index() > 0,
        )
    for line in overview(program.task, config):
        reporter.say(line)
    preset = preset_of(config)
    name = f"preset {preset}" if preset else f"no preset ({' or '.join(PRESETS)})"
    reporter.say(f"{name}: {norm_title(config)}")
    if start.step:
        reporter.say(f"resumed from the checkpoint of step {start.step}")
    run = Run(program, config, workdir, bucket, reporter, Intervals(program.task, config), startup)
    try:
        with _checkpoints_of(run) as checkpoints, contextlib.closing(reporter):
            clock.ends("state")
            _train_from(start, run, checkpoints, stop_asked)
    except DivergenceError as error:
        layer = _find_layer(run, error)
        message = f"{error}; {layer}; training stopped. {REMEDY}"
        raise DivergenceError(message, error.step, error.after_update) from error
    with first_host_first(), writing(workdir):
        if jax.process_index() == 0 and on_record is None:
            draw_curves(workdir, run_title(config))
        if bucket and jax.process_index() == 0:
            bucket.store()
        elif bucket:
            bucket.fetch([METRICS])
    return last_values(workdir)


def _open(config: ConfigDict, workdir: pathlib.Path, programs: Programs) -> Program:
    """Opens folder and data, and checks them; raises UserError."""
    with first_host_first():
        open_workdir(config, workdir)
    # One host prepares data for all. What is prepared already all can read at the same time.
    with first_host_first(together=not is_made_on_first_use(config.dataset.name)):
        program = programs.get(config)
    task = program.task
    check_alike(training_examples=len(task.train), test_examples=len(task.test))
    return program


def _save_config(config: ConfigDict, workdir: pathlib.Path, *, is_shared: bool) -> None:
    """Writes config.json, on resuming too, where some fields may change; raises UserError."""
    with first_host_first():
        if jax.process_index() == 0 or not is_shared:
            save_config(config, workdir)
        if not (workdir / CONFIG).exists():
            raise UserError(
                f"Host {jax.process_index()} does not find what the first host wrote to "
                f"--workdir={workdir}; give a folder that all hosts share."
            )


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run works with, from its start to its end."""

    program: Program
    config: ConfigDict
    workdir: pathlib.Path
    bucket: Bucket | None
    reporter: Reporter
    intervals: Intervals
    startup: Startup | None


@contextlib.contextmanager
def _checkpoints_of(run: Run) -> Iterator[Checkpoints]:
    """Opens the checkpoints of a run; at its end, waits for the one that is being saved."""
    config, lost = run.config, False
    with writing(run.workdir):
        checkpoints = Checkpoints(
            run.workdir / CHECKPOINTS,
            keep=config.keep_checkpoints,
            keep_best=config.keep_best,
            on_sealed=run.bucket.store if run.bucket else None,
        )
    try:
        yield checkpoints
    except Exception as error:
        lost = lost_host(error) is not None
        raise
    finally:
        if not lost:  # The save would wait for that host.
            with writing(run.workdir):
                checkpoints.close()


def _train_from(
    start: Start, run: Run, checkpoints: Checkpoints, stop_asked: StopAsked | None
) -> None:
    """Trains to the end, with records and checkpoints on the way.

    It waits for the devices only where a record is due or the run stops, and for the disk only
    where the last save is not done when the next one is due.
    """
    program, config, reporter, due = run.program, run.config, run.reporter, run.intervals
    schedule = program.task.schedule(HParams.from_config(config))
    check = FiniteCheck(schedule)
    pending: list[Any] = [start.pending] if start.pending else []
    clock, clock_step, previous = time.monotonic(), start.step, start.step
    for step, state, metrics, upcoming in train_pass(program, config, start.state, due.total):
        pending.append(metrics)
        if run.startup and previous == start.step:
            jax.block_until_ready(metrics)  # Once, so that the time is that of the step.
            run.startup.ends("first step")
            reporter.say(str(run.startup))
        if len(pending) > DISPATCHES_IN_FLIGHT:
            # Waits for an older dispatch: the devices stay busy, and dispatches do not pile up.
            pending[-DISPATCHES_IN_FLIGHT]["loss"].block_until_ready()
        stops = stop_asked is not None and stop_asked(previous + 1, step) and step < due.total
        previous = step
        if not (due.logs_after(step) or stops):
            continue
        unlogged = _to_host(pending)
        check.losses(unlogged["loss"], step)
        if due.logs_after(step):
            values = {f"train_{name}": float(np.mean(x)) for name, x in unlogged.items()}
            values["learning_rate"] = float(schedule(step - 1))
            images = (step - clock_step) * config.batch_size
            values["images_per_second"] = images / (time.monotonic() - clock)
            pending, unlogged = [], {}
            reporter.progress(step, values)
            if due.evaluates_after(step):
                values |= _evaluate(run, state, step, check)
            if due.measures_after(step):
                values |= measure_shift(program, config, state, upcoming)
            reporter.write(step, values)
            with writing(run.workdir):
                checkpoints.check()
        if due.saves_after(step) or stops:
            check.params(state, step)
            _save(run, checkpoints, state, unlogged, temporary=not due.saves_after(step))
        if stops:
            break
        clock, clock_step = time.monotonic(), step
    with writing(run.workdir):
        checkpoints.wait()
    if previous < due.total:
        raise StoppedError(f"stopped after step {previous}, which is saved")


def _find_layer(run: Run, error: DivergenceError) -> str:
    """Returns a clause on the layer where a run diverged, whatever stands in the way of it."""
    if run.bucket and jax.process_count() > 1:
        return "its layer is looked for in a --workdir on a disk that hosts share, not in a bucket"
    try:
        last_saved = find_start(run.program, run.config, run.workdir).state
        return find_layer(run.program, run.config, last_saved, error)
    except Exception as failed:  # The divergence is what must be told.
        return f"its layer could not be found ({one_line(failed)})"


def _to_host(pending: list[Any]) -> dict[str, np.ndarray]:
    """Returns the metrics of several dispatches as `[steps]`."""
    if jax.default_backend() != "cpu":  # There it is what takes the time: nothing has to travel.
        for x in jax.tree.leaves(pending):
            if isinstance(x, jax.Array):
                x.copy_to_host_async()
    return {
        name: np.concatenate([np.asarray(metrics[name])[0] for metrics in pending])
        for name in pending[0]
    }


def _evaluate(run: Run, state: TrainState, step: int, check: FiniteCheck) -> dict[str, float]:
    """Returns the metrics of the test split, at the end by recalibrated statistics too."""
    program, config = run.program, run.config
    values = {f"test_{k}": v for k, v in evaluate(program, config, state).items()}
    check(values["test_loss"], "test loss", step, after_update=True)
    metrics = "  ".join(f"test {name} {shown(name, x)}" for name, x in of_split("test", values))
    count = f"{len(program.task.test):,} examples"
    run.reporter.say(f"step {step}/{run.intervals.total}  {metrics}  over {count}")
    if step == run.intervals.total and config.recalibrate_batches and state.batch_stats:
        fresh = recalibrate(program, config, state, config.recalibrate_batches)
        found = evaluate(program, config, fresh)
        values |= {f"recalibrated_test_{k}": v for k, v in found.items()}
    return values


def _save(
    run: Run,
    checkpoints: Checkpoints,
    state: TrainState,
    unlogged: dict[str, np.ndarray],
    *,
    temporary: bool,
) -> None:
    """Starts to save a checkpoint, after the records up to it are on disk."""
    notes = {
        "config": fields(run.config),
        "pending": {name: x.tolist() for name, x in unlogged.items()},
        "records": run.reporter.sync(),
        "test_error": None if temporary else selection_metric(run.reporter.last),
    }
    with writing(run.workdir):
        checkpoints.save(
            state,
            local_statistics=run.program.task.local_statistics,
            notes=notes,
            temporary=temporary,
        )


def run_title(config: ConfigDict) -> str:
    """Returns a run in a few words, for figures and summaries."""
    return f"{config.dataset.name}, {config.model.name}, {norm_title(config)}, seed {config.seed}"


def norm_title(config: ConfigDict) -> str:
    """Returns how a run normalizes, in a few words."""
    norm = config.norm.name
    if norm == "memorized":
        size = "endless" if is_endless(config) else config.norm.memory_size
        norm += f" (memory {size}, decay {config.norm.decay:g})"
    double_forward = config.double_forward
    if config.double_forward_fraction < 1:
        double_forward += f" of {config.double_forward_fraction:g} of the batch"
    return f"norm {norm}, batch size {config.batch_size}, double forward {double_forward}"


def last_values(workdir: pathlib.Path) -> dict[str, float]:
    """Returns the last training and test values on record; empty without a record."""
    values: dict[str, float] = {}
    for record in read_metrics(workdir):
        values |= {k: v for k, v in record.items() if k.startswith(LAST_VALUES)}
    return values
