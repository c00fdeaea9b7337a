"""The training run: from a configuration and a folder to a trained network and its curves."""

import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from mbn_jax.batch_stats import pool_batch_stats
from mbn_jax.checkpoints import Checkpoints
from mbn_jax.config import steps_per_epoch, traced_values
from mbn_jax.datasets.pipeline import training_blocks
from mbn_jax.diagnostics import memory_distance
from mbn_jax.double_forward import TrainState
from mbn_jax.errors import UserError
from mbn_jax.experiment import Batch
from mbn_jax.norms import memory_rule
from mbn_jax.parallel import (
    check_alike,
    distribute,
    first_device,
    first_host_first,
    replicate,
    split_over_devices,
)
from mbn_jax.program import Program, Programs
from mbn_jax.reporting import Reporter, draw_curves, read_metrics
from mbn_jax.workdir import CHECKPOINTS, CONFIG, open_workdir, save_config

LAST_VALUES = ("step", "train_", "test_", "recalibrated_test_")
DISPATCHES_IN_FLIGHT = 8
STEPS_PER_BLOCK = 1024
"""Of indices that go to the devices at once; some kilobytes, and no copy in most steps."""


class DivergenceError(Exception):
    """Training diverged.

    Attributes:
      step: the first step known to be affected.
    """

    def __init__(self, message: str, step: int):
        """Keeps both, so that the error survives a process boundary."""
        super().__init__(message, step)
        self.step = step

    def __str__(self) -> str:
        """Returns the message."""
        return self.args[0]


def train(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    *,
    programs: Programs | None = None,
    on_record: Callable[[int, dict[str, float]], None] | None = None,
) -> dict[str, float]:
    """Trains as `config` says, or goes on where an earlier call in `workdir` stopped.

    Args:
      config: from `mbn_jax.config.default_config`, with changes.
      workdir: folder for the config, metrics, events, checkpoints and curves; made where missing.
      programs: the devices to run on and what is compiled for them, to share it with other runs;
        default: all devices, nothing compiled.
      on_record: called with the step and the values of each record, in place of the progress that
        is shown otherwise; what it raises ends the run. Such a run draws no curves.

    Returns:
      The last values of 'train_loss', 'train_error', 'test_loss' and 'test_error', and 'step'; with
      `recalibrate_batches`, those of 'recalibrated_test_loss' and 'recalibrated_test_error' too.

    Raises:
      UserError: for a configuration or data that cannot work, or a workdir of another config.
      DivergenceError: if training diverges.
    """
    workdir = pathlib.Path(workdir)
    programs = programs or Programs()
    is_first = jax.process_index() == 0
    with first_host_first():  # One prepares folder and data for all.
        open_workdir(config, workdir)
        program = programs.get(config)
        if is_first and not (workdir / CONFIG).exists():
            save_config(config, workdir)
        if not (workdir / CONFIG).exists():
            raise UserError(
                f"Host {jax.process_index()} does not find what the first host wrote to "
                f"--workdir={workdir}; give a folder that all hosts share."
            )

    experiment = program.experiment
    check_alike(training_examples=len(experiment.train), test_examples=len(experiment.test))
    checkpoints = Checkpoints(workdir / CHECKPOINTS, keep=config.keep_checkpoints)
    local = experiment.local_statistics
    fresh = program.initial_state(config)
    restored = checkpoints.restore(fresh, local_statistics=local, devices=program.devices)
    checkpoints.discard_damaged()
    state = replicate(fresh, program.devices) if restored is None else restored
    first_step = int(first_device(state.step))
    reporter = Reporter(
        workdir,
        first_step=first_step,
        total_steps=experiment.total_steps,
        on_record=on_record,
        silent=not is_first,
    )
    if first_step:
        reporter.say(f"resumed from the checkpoint of step {first_step}")
    try:
        for saved in _run(program, config, state, reporter):
            checkpoints.save(saved, local_statistics=local)
    finally:
        reporter.close()
        checkpoints.close()
    with first_host_first():
        if is_first and on_record is None:
            draw_curves(workdir, run_title(config))
    return last_values(workdir)


def _run(
    program: Program, config: ConfigDict, state: TrainState, reporter: Reporter
) -> Iterator[TrainState]:
    """Trains to the end; yields the state wherever it is to be saved."""
    experiment = program.experiment
    schedule = experiment.schedule(config)
    stride = config.steps_per_dispatch
    total_steps = experiment.total_steps
    # To a whole number of dispatches.
    epoch = -(-steps_per_epoch(config, len(experiment.train)) // stride) * stride
    eval_every = config.eval_every_steps or epoch
    checkpoint_every = config.checkpoint_every_steps or epoch
    shift_every = config.shift.every_steps
    step = int(first_device(state.step))
    if step == total_steps:
        return
    blocks = _blocks(program, config, step)
    block, block_end = next(blocks)
    values_on_devices = replicate(traced_values(config), program.devices)
    data = program.data(experiment.train)
    pending: list[Any] = []
    clock = time.monotonic()
    while step < total_steps:
        size = min(stride, total_steps - step)
        dispatch = program.dispatch(size)
        # Nothing in the loop may wait for the device or copy to it unseen. (Over several hosts
        # pmap itself copies the random keys.)
        with jax.transfer_guard("disallow" if jax.process_count() == 1 else "allow"):
            state, metrics = dispatch(state, values_on_devices, data, block)
        pending.append(metrics)
        step += size
        last = step == total_steps
        if step == block_end and not last:
            block, block_end = next(blocks)
        if len(pending) > DISPATCHES_IN_FLIGHT:
            # Not the newest: the device stays busy, and batches do not pile up on it.
            jax.block_until_ready(pending[-DISPATCHES_IN_FLIGHT])

        evaluates = last or step % eval_every == 0
        saves = last or step % checkpoint_every == 0
        measures = shift_every and (last or step % shift_every == 0)
        if not (evaluates or saves or measures or step % config.log_every_steps == 0):
            continue
        values = _summarize(pending, step, schedule)
        images = sum(m["loss"].shape[1] for m in pending) * config.batch_size
        values["images_per_second"] = images / (time.monotonic() - clock)
        pending = []
        reporter.progress(step, values)
        if evaluates:
            values |= {f"test_{k}": v for k, v in program.evaluate(config, state).items()}
            _check_finite(values["test_loss"], "test loss after", step, schedule)
            reporter.say(
                f"step {step}/{total_steps}  test loss {values['test_loss']:.4f}  "
                f"test error {values['test_error']:.2%}"
            )
            if last and config.recalibrate_batches and state.batch_stats:
                fresh = program.recalibrate(config, state, config.recalibrate_batches)
                recalibrated = program.evaluate(config, fresh)
                values |= {f"recalibrated_test_{k}": v for k, v in recalibrated.items()}
            if config.norm.name == "memorized":
                reporter.write(step, _distances(program, config, state), only_events=True)
        if measures:
            values |= program.shift.measure(config, state, None if last else block)
        reporter.write(step, values)
        if saves:
            # The loss told of the parameters before the last update only.
            params = jax.tree.leaves(first_device(state.params))
            total = sum(float(jnp.sum(x)) for x in params)
            _check_finite(total, "sum of the parameters after", step, schedule)
            yield state
        clock = time.monotonic()


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
    block, _ = next(_blocks(program, config, 0))
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


def _blocks(program: Program, config: ConfigDict, first_step: int) -> Iterator[tuple[Batch, int]]:
    """Yields batches of several steps on the devices, and the step where they end."""
    experiment, stride = program.experiment, config.steps_per_dispatch
    in_memory = experiment.train.images is not None
    steps_per_block = max(1, STEPS_PER_BLOCK // stride) * stride if in_memory else stride
    blocks = training_blocks(
        experiment.train,
        experiment.order(config),
        first_step=first_step,
        num_steps=experiment.total_steps,
        steps_per_block=steps_per_block,
        num_workers=config.dataset.num_workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    step = first_step
    for block in blocks:
        on_devices = distribute(
            split_over_devices(block, axis=1, devices=program.devices), program.devices
        )
        first = replicate({"first_step": np.int32(step)}, program.devices)
        step += steps_per_block
        yield {**on_devices, **first}, step


def _summarize(pending: list[Any], step: int, schedule: optax.Schedule) -> dict[str, float]:
    """Averages the metrics of the steps since the last record, and checks that they are finite."""
    host = [first_device(metrics) for metrics in jax.device_get(pending)]
    losses = np.concatenate([metrics["loss"] for metrics in host])
    for at, loss in enumerate(losses, start=step - len(losses) + 1):
        _check_finite(loss, "loss of", at, schedule)
    values = {
        f"train_{name}": float(np.mean(np.concatenate([metrics[name] for metrics in host])))
        for name in host[0]
    }
    return values | {"learning_rate": float(schedule(step - 1))}


def _check_finite(value: float, what: str, step: int, schedule: optax.Schedule) -> None:
    """Raises DivergenceError, naming the step and its learning rate."""
    if not np.isfinite(value):
        rate = float(schedule(step - 1))
        raise DivergenceError(
            f"The {what} step {step} is {value}, at learning rate {rate:.4g}; training stopped. "
            "Lower optimizer.learning_rate, or set gradient_clip_norm.",
            step,
        )


def _distances(program: Program, config: ConfigDict, state: TrainState) -> dict[str, float]:
    stats = first_device(state.batch_stats)
    if config.norm.virtual_batch_size:
        stats = pool_batch_stats(stats)
    rule = memory_rule(config, program.experiment.total_steps)
    distances = memory_distance(stats, *rule)
    return {f"memory_distance/{path}": float(value) for path, value in distances.items()}


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
