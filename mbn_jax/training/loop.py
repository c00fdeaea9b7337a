"""The training run: from a configuration and a folder to a trained network and its curves."""

import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mbn_jax.errors import UserError
from mbn_jax.parallel.devices import check_alike, first_device, first_host_first, replicate
from mbn_jax.parallel.preemption import StopAsked, StoppedError
from mbn_jax.step.state import TrainState
from mbn_jax.training.checkpoints import Checkpoints
from mbn_jax.training.config import fields, steps_per_epoch, traced_values
from mbn_jax.training.divergence import DivergenceError, FiniteCheck, where_it_began
from mbn_jax.training.program import Program, Programs
from mbn_jax.training.reporting import Reporter, draw_curves, read_metrics
from mbn_jax.training.resuming import (
    Start,
    find_start,
    steps_per_checkpoint,
    whole_epoch,
)
from mbn_jax.training.workdir import (
    CHECKPOINTS,
    CONFIG,
    open_workdir,
    save_config,
    writing,
)

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
) -> dict[str, float]:
    """Trains as `config` says, or goes on where an earlier call in `workdir` stopped.

    Args:
      config: from `mbn_jax.training.config.default_config`, with changes.
      workdir: folder for the config, metrics, events, checkpoints and curves; made where missing.
      programs: the devices to run on and what is compiled for them, to share it with other runs;
        default: all devices, nothing compiled.
      on_record: called with the step and the values of each record, in place of the progress that
        is shown otherwise; what it raises ends the run. Such a run draws no curves.
      stop_asked: asked after every dispatch whether to save and stop there; alike on all hosts.

    Returns:
      The last values of 'train_loss', 'train_error', 'test_loss' and 'test_error', and 'step'; with
      `recalibrate_batches`, those of 'recalibrated_test_loss' and 'recalibrated_test_error' too.

    Raises:
      UserError: for a configuration or data that cannot work, a workdir of another config, or one
        that is damaged or cannot be written.
      DivergenceError: if training diverges.
      StoppedError: when `stop_asked` says so.
    """
    workdir = pathlib.Path(workdir)
    programs = programs or Programs()
    is_first = jax.process_index() == 0
    with first_host_first():  # One prepares folder and data for all.
        open_workdir(config, workdir)
        program = programs.get(config)
        if is_first:
            save_config(config, workdir)
        if not (workdir / CONFIG).exists():
            raise UserError(
                f"Host {jax.process_index()} does not find what the first host wrote to "
                f"--workdir={workdir}; give a folder that all hosts share."
            )

    experiment = program.experiment
    check_alike(training_examples=len(experiment.train), test_examples=len(experiment.test))
    start = find_start(program, config, workdir)
    with first_host_first():  # Where the first one cannot write, all end.
        reporter = Reporter(
            workdir,
            first_step=start.step,
            total_steps=experiment.total_steps,
            on_record=on_record,
            silent=not is_first,
        )
    if start.step:
        reporter.say(f"resumed from the checkpoint of step {start.step}")
    try:
        _train_from(start, program, config, workdir, reporter, stop_asked)
    except DivergenceError as error:
        began = where_it_began(program, config, find_start(program, config, workdir).state, error)
        raise DivergenceError(
            f"{error}; {began}; training stopped. {REMEDY}", error.step, error.after_update
        ) from error
    with first_host_first(), writing(workdir):
        if is_first and on_record is None:
            draw_curves(workdir, run_title(config))
    return last_values(workdir)


def _train_from(
    start: Start,
    program: Program,
    config: ConfigDict,
    workdir: pathlib.Path,
    reporter: Reporter,
    stop_asked: StopAsked | None,
) -> None:
    """Trains to the end, saving checkpoints; closes the reporter."""
    with writing(workdir):
        every = steps_per_checkpoint(program, config)
        checkpoints = Checkpoints(
            workdir / CHECKPOINTS,
            keep=config.keep_checkpoints,
            every=every,
            keep_best=config.keep_best,
        )
    local = program.experiment.local_statistics
    try:
        for state, pending, temporary in _run(start, program, config, reporter, stop_asked):
            notes = {
                "config": fields(config),
                "pending": pending,
                "records": reporter.sync(),
                "test_error": None if temporary else reporter.last.get("test_error"),
            }
            with writing(workdir):
                checkpoints.save(state, local_statistics=local, notes=notes, temporary=temporary)
    finally:
        try:
            reporter.close()
        finally:
            checkpoints.close()


def _run(
    start: Start,
    program: Program,
    config: ConfigDict,
    reporter: Reporter,
    stop_asked: StopAsked | None,
) -> Iterator[tuple[TrainState, dict[str, list[float]], bool]]:
    """Trains to the end.

    Yields:
      The state, wherever it is to be saved; the metrics that are on no record yet; whether it is
      saved only because the run stops.
    """
    experiment = program.experiment
    schedule = experiment.schedule(config)
    check = FiniteCheck(schedule, goes_on=config.on_divergence == "continue", say=reporter.say)
    total_steps = experiment.total_steps
    eval_every = config.eval_every_steps or whole_epoch(program, config)
    checkpoint_every = steps_per_checkpoint(program, config)
    shift_every = config.shift.every_steps
    pending: list[Any] = [start.pending] if start.pending else []
    clock, clock_step, before = time.monotonic(), start.step, start.step
    # Nothing in the loop may wait for the device, but for a record.
    for step, state, metrics, block in program.dispatches(config, start.state, total_steps):
        pending.append(metrics)
        if len(pending) > DISPATCHES_IN_FLIGHT:
            # Not the newest: the device stays busy, and batches do not pile up on it.
            jax.block_until_ready(pending[-DISPATCHES_IN_FLIGHT])
        last = step == total_steps
        stops = stop_asked is not None and stop_asked(before + 1, step) and not last
        before = step
        evaluates = last or step % eval_every == 0
        saves = last or step % checkpoint_every == 0
        measures = shift_every and (last or step % shift_every == 0)
        records = evaluates or saves or measures or step % config.log_every_steps == 0
        if not (records or stops):
            continue
        found = _on_host(pending)
        check.losses(found["loss"], step)
        if records:
            values = {f"train_{name}": float(np.mean(x)) for name, x in found.items()}
            values["learning_rate"] = float(schedule(step - 1))
            images = (step - clock_step) * config.batch_size
            values["images_per_second"] = images / (time.monotonic() - clock)
            pending, found = [], {}
            reporter.progress(step, values)
        if evaluates:
            values |= {f"test_{k}": v for k, v in program.evaluate(config, state).items()}
            check(values["test_loss"], "test loss", step, after_update=True)
            reporter.say(
                f"step {step}/{total_steps}  test loss {values['test_loss']:.4f}  "
                f"test error {values['test_error']:.2%}"
            )
            if last and config.recalibrate_batches and state.batch_stats:
                fresh = program.recalibrate(config, state, config.recalibrate_batches)
                recalibrated = program.evaluate(config, fresh)
                values |= {f"recalibrated_test_{k}": v for k, v in recalibrated.items()}
        if measures:
            values |= program.shift.measure(config, state, block)
        if records:
            reporter.write(step, values)
        if saves or stops:
            check.params(state, step)
            yield state, {name: x.tolist() for name, x in found.items()}, not saves
        if stops:
            raise StoppedError(f"stopped after step {step}, which is saved")
        clock, clock_step = time.monotonic(), step


def _on_host(pending: list[Any]) -> dict[str, np.ndarray]:
    """Returns the metrics of the steps since the last record, `[steps]`."""
    host = [first_device(metrics) for metrics in jax.device_get(pending)]
    return {name: np.concatenate([metrics[name] for metrics in host]) for name in host[0]}


def estimate_seconds(program: Program, config: ConfigDict, seconds: float) -> float:
    """Estimates the time of a run from a short one, compilation and checkpoints apart.

    Args:
      program: that serves the config.
      config: of the run.
      seconds: how long to measure the step for.

    Returns:
      Seconds for its steps, evaluations and measurements of the shift.
    """
    experiment = program.experiment
    total_steps = experiment.total_steps
    values = replicate(traced_values(config), program.devices)
    state = replicate(program.initial_state(config), program.devices)
    data = program.data(experiment.train)
    stride = min(config.steps_per_dispatch, total_steps)
    dispatch = program.dispatch(stride)
    block, _ = next(program.blocks(config, 0))
    state, _ = dispatch(state, values, data, block)
    jax.block_until_ready(state)
    steps, begin = 0, time.monotonic()
    while time.monotonic() - begin < seconds:
        # The same batch again: the state is thrown away, and the cost is that of any other.
        state = state.replace(step=jnp.zeros_like(state.step))
        state, _ = dispatch(state, values, data, block)
        jax.block_until_ready(state)
        steps += stride
    total = (time.monotonic() - begin) / steps * total_steps

    def time_of_second(call: Callable[[], Any]) -> float:
        call()  # Compiles.
        begin = time.monotonic()
        call()
        return time.monotonic() - begin

    epoch = steps_per_epoch(config, len(experiment.train))
    evaluation = time_of_second(lambda: program.evaluate(config, state))
    total += evaluation * -(-total_steps // (config.eval_every_steps or epoch))
    if config.shift.every_steps:
        measurement = time_of_second(lambda: program.shift.measure(config, state, None))
        total += measurement * (total_steps // config.shift.every_steps)
    return total


def run_title(config: ConfigDict) -> str:
    """Returns a run in a few words, for figures and summaries."""
    norm = config.norm.name
    if norm == "memorized":
        norm += f" (memory {config.norm.memory_size}, decay {config.norm.decay:g})"
    double_forward = config.double_forward
    if config.double_forward_fraction < 1:
        double_forward += f" of {config.double_forward_fraction:g} of the batch"
    if config.double_forward_every > 1:
        double_forward += f" every {config.double_forward_every} steps"
    return (
        f"{config.dataset.name}, {config.model.name}, norm {norm}, batch size {config.batch_size}, "
        f"double forward {double_forward}, seed {config.seed}"
    )


def last_values(workdir: pathlib.Path) -> dict[str, float]:
    """Returns the last training and test values on record; empty where there is no record."""
    values: dict[str, float] = {}
    for record in read_metrics(workdir):
        values |= {k: v for k, v in record.items() if k.startswith(LAST_VALUES)}
    return values
