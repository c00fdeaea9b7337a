"""The training run: from a configuration and a folder to a trained network and its curves."""

import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mbn_jax.checkpoints import Checkpoints
from mbn_jax.config import steps_per_epoch, validate_devices
from mbn_jax.datasets.pipeline import training_batches
from mbn_jax.diagnostics import memory_distance
from mbn_jax.double_forward import TrainState
from mbn_jax.evaluation import Evaluator
from mbn_jax.experiment import Experiment, device_data
from mbn_jax.parallel import (
    distribute,
    first_device,
    first_host_first,
    map_over_devices,
    replicate,
    split_over_devices,
)
from mbn_jax.reporting import Reporter, draw_curves, read_metrics
from mbn_jax.workdir import CHECKPOINTS, CONFIG, open_workdir, save_config

DISPATCHES_IN_FLIGHT = 8


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


def train(config: ConfigDict, workdir: str | pathlib.Path) -> dict[str, float]:
    """Trains as `config` says, or goes on where an earlier call in `workdir` stopped.

    Args:
      config: from `mbn_jax.config.default_config`, with changes.
      workdir: folder for the config, metrics, events, checkpoints and curves; made where missing.

    Returns:
      The last values of 'train_loss', 'train_error', 'test_loss' and 'test_error', and 'step'.

    Raises:
      UserError: for a configuration or data that cannot work, or a workdir of another config.
      DivergenceError: if training diverges.
    """
    workdir = pathlib.Path(workdir)
    is_first = jax.process_index() == 0
    with first_host_first():  # One prepares folder and data for all.
        open_workdir(config, workdir)
        experiment = Experiment.build(config)
        validate_devices(config, jax.device_count())
        if is_first and not (workdir / CONFIG).exists():
            save_config(config, workdir)

    checkpoints = Checkpoints(workdir / CHECKPOINTS, keep=config.keep_checkpoints)
    local = experiment.local_statistics
    fresh = experiment.initial_state()
    restored = checkpoints.restore(fresh, local_statistics=local)
    checkpoints.discard_damaged()
    state = replicate(fresh) if restored is None else restored
    first_step = int(state.step[0])
    reporter = Reporter(
        workdir, first_step=first_step, total_steps=experiment.total_steps, silent=not is_first
    )
    if first_step:
        reporter.say(f"resumed from the checkpoint of step {first_step}")
    try:
        for saved in _run(experiment, state, reporter):
            checkpoints.save(saved, local_statistics=local)
    finally:
        reporter.close()
        checkpoints.close()
    with first_host_first():
        if is_first:
            draw_curves(workdir, run_title(config))
    return last_values(workdir)


def _run(experiment: Experiment, state: TrainState, reporter: Reporter) -> Iterator[TrainState]:
    """Trains to the end; yields the state wherever it is to be saved."""
    config = experiment.config
    stride = config.steps_per_dispatch
    total_steps = experiment.total_steps
    # To a whole number of dispatches.
    epoch = -(-steps_per_epoch(config, len(experiment.train)) // stride) * stride
    eval_every = config.eval_every_steps or epoch
    checkpoint_every = config.checkpoint_every_steps or epoch
    step = int(state.step[0])
    if step == total_steps:
        return
    batches = training_batches(
        experiment.train,
        seed=config.seed,
        batch_size=config.batch_size,
        first_step=step,
        num_steps=total_steps,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    data = device_data(experiment.train)
    evaluate = Evaluator(experiment, experiment.test)
    dispatch = map_over_devices(experiment.dispatch, runtime=config.runtime, donate_argnums=(0,))
    pending: list[Any] = []
    clock = time.monotonic()
    while step < total_steps:
        size = min(stride, total_steps - step)
        stack = [next(batches) for _ in range(size)]
        batch = {key: np.stack([one[key] for one in stack]) for key in stack[0]}
        batch = distribute(split_over_devices(batch, axis=1))
        # Nothing in the loop may wait for the device or copy to it unseen. (Over several hosts
        # pmap itself copies the random keys.)
        with jax.transfer_guard("disallow" if jax.process_count() == 1 else "allow"):
            state, metrics = dispatch(state, data, batch)
        pending.append(metrics)
        step += size
        if len(pending) > DISPATCHES_IN_FLIGHT:
            # Not the newest: the device stays busy, and batches do not pile up on it.
            jax.block_until_ready(pending[-DISPATCHES_IN_FLIGHT])

        last = step == total_steps
        evaluates = last or step % eval_every == 0
        saves = last or step % checkpoint_every == 0
        if not (evaluates or saves or step % config.log_every_steps == 0):
            continue
        values = _summarize(pending, step, experiment)
        images = sum(m["loss"].shape[1] for m in pending) * config.batch_size
        values["images_per_second"] = images / (time.monotonic() - clock)
        pending = []
        reporter.progress(step, values)
        if evaluates:
            values |= {f"test_{name}": value for name, value in evaluate(state).items()}
            _check_finite(values["test_loss"], "test loss after", step, experiment)
            reporter.say(
                f"step {step}/{total_steps}  test loss {values['test_loss']:.4f}  "
                f"test error {values['test_error']:.2%}"
            )
            if config.norm.name == "memorized":
                reporter.write(step, _distances(state, config), only_events=True)
        reporter.write(step, values)
        if saves:
            # The loss told of the parameters before the last update only.
            total = sum(float(jnp.sum(x[0])) for x in jax.tree.leaves(state.params))
            _check_finite(total, "sum of the parameters after", step, experiment)
            yield state
        clock = time.monotonic()


def _summarize(pending: list[Any], step: int, experiment: Experiment) -> dict[str, float]:
    """Averages the metrics of the steps since the last record, and checks that they are finite."""
    host = [first_device(metrics) for metrics in jax.device_get(pending)]
    losses = np.concatenate([metrics["loss"] for metrics in host])
    for at, loss in enumerate(losses, start=step - len(losses) + 1):
        _check_finite(loss, "loss of", at, experiment)
    values = {
        f"train_{name}": float(np.mean(np.concatenate([metrics[name] for metrics in host])))
        for name in host[0]
    }
    return values | {"learning_rate": float(experiment.schedule(step - 1))}


def _check_finite(value: float, what: str, step: int, experiment: Experiment) -> None:
    """Raises DivergenceError, naming the step and its learning rate."""
    if not np.isfinite(value):
        rate = float(experiment.schedule(step - 1))
        raise DivergenceError(
            f"The {what} step {step} is {value}, at learning rate {rate:.4g}; training stopped. "
            "Lower optimizer.learning_rate, or set gradient_clip_norm.",
            step,
        )


def _distances(state: TrainState, config: ConfigDict) -> dict[str, float]:
    stats = first_device(state.batch_stats)
    distances = memory_distance(stats, config.norm.memory_size, config.norm.decay)
    return {f"memory_distance/{path}": float(value) for path, value in distances.items()}


def run_title(config: ConfigDict) -> str:
    """Returns a run in a few words, for figures and summaries."""
    norm = config.norm.name
    if norm == "memorized":
        norm += f" (memory {config.norm.memory_size}, decay {config.norm.decay:g})"
    return (
        f"{config.dataset.name}, {config.model.name}, norm {norm}, batch size {config.batch_size}, "
        f"double forward {config.double_forward}, seed {config.seed}"
    )


def last_values(workdir: pathlib.Path) -> dict[str, float]:
    """Returns the last training and test values on record; empty where there is no record."""
    values: dict[str, float] = {}
    for record in read_metrics(workdir):
        values |= {k: v for k, v in record.items() if k.startswith(("step", "train_", "test_"))}
    return values
