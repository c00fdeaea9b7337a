"""The training run: from a configuration and a folder to a trained network and its curves."""

import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mbn_jax.checkpoints import Checkpoints
from mbn_jax.config import steps_per_epoch
from mbn_jax.datasets.pipeline import training_batches
from mbn_jax.diagnostics import memory_distance
from mbn_jax.double_forward import TrainState
from mbn_jax.errors import UserError
from mbn_jax.evaluation import Evaluator, device_data
from mbn_jax.experiment import Experiment
from mbn_jax.parallel import (
    distribute,
    first_device,
    first_host_first,
    map_over_devices,
    replicate,
    split_over_devices,
)
from mbn_jax.reporting import Reporter, SilentReporter, draw_curves, read_metrics

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"


class NonFiniteLossError(UserError):
    """Training diverged.

    Attributes:
      step: the first step whose loss was not finite.
    """

    def __init__(self, step: int, loss: float, learning_rate: float):
        """Names the step and what the rate was."""
        super().__init__(
            f"The loss of step {step} is {loss} at learning rate {learning_rate:.4g}; training "
            "stopped. Lower optimizer.learning_rate, or set gradient_clip_norm."
        )
        self.step = step


def train(config: ConfigDict, workdir: str | pathlib.Path) -> dict[str, float]:
    """Trains as `config` says, or goes on where an earlier call in `workdir` stopped.

    Args:
      config: from `mbn_jax.config.default_config`, with changes.
      workdir: folder for the config, metrics, events, checkpoints and curves; made where missing.

    Returns:
      The last values of 'train_loss', 'train_error', 'test_loss' and 'test_error', and 'step'.

    Raises:
      UserError: for a configuration or data that cannot work, or a workdir of another config.
      NonFiniteLossError: if training diverges.
    """
    workdir = pathlib.Path(workdir)
    open_workdir(config, workdir)
    with first_host_first():  # One prepares the data for all.
        experiment = Experiment.build(config)
        if jax.process_index() == 0:
            save_config(config, workdir)

    checkpoints = Checkpoints(workdir / CHECKPOINTS, keep=config.keep_checkpoints)
    local = experiment.local_statistics
    fresh = experiment.initial_state()
    restored = checkpoints.restore(fresh, local_statistics=local)
    checkpoints.discard_damaged()
    state = replicate(fresh) if restored is None else restored
    first_step = int(state.step[0])
    make_reporter = Reporter if jax.process_index() == 0 else SilentReporter
    reporter = make_reporter(workdir, first_step=first_step, total_steps=experiment.total_steps)
    if first_step:
        reporter.say(f"resumed from the checkpoint of step {first_step}")
    try:
        for saved in _run(experiment, state, reporter):
            checkpoints.save(saved, local_statistics=local)
    finally:
        reporter.close()
        checkpoints.close()
    if jax.process_index() == 0:
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
        # Nothing in the loop may wait for the device or copy to it unseen.
        with jax.transfer_guard("disallow"):
            state, metrics = dispatch(state, data, batch)
        pending.append(metrics)
        step += size

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
            reporter.say(
                f"step {step}/{total_steps}  test loss {values['test_loss']:.4f}  "
                f"test error {values['test_error']:.2%}"
            )
            if config.norm.name == "memorized":
                reporter.write(step, _distances(state, config), only_events=True)
        reporter.write(step, values)
        if saves:
            yield state
        clock = time.monotonic()


def _summarize(pending: list[Any], step: int, experiment: Experiment) -> dict[str, float]:
    """Averages the metrics of the steps since the last record, and checks that they are finite."""
    host = [first_device(metrics) for metrics in jax.device_get(pending)]
    losses = np.concatenate([metrics["loss"] for metrics in host])
    if not np.isfinite(losses).all():
        bad = int(np.argmin(np.isfinite(losses)))
        at = step - len(losses) + bad
        raise NonFiniteLossError(at + 1, losses[bad], float(experiment.schedule(at)))
    values = {
        f"train_{name}": float(np.mean(np.concatenate([metrics[name] for metrics in host])))
        for name in host[0]
    }
    return values | {"learning_rate": float(experiment.schedule(step - 1))}


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
    """Returns the last training and test values on record."""
    values: dict[str, float] = {}
    for record in read_metrics(workdir):
        values |= {k: v for k, v in record.items() if k == "step" or k[:5] in ("train", "test_")}
    return values


def open_workdir(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Makes `workdir`; raises UserError where it is a run of another config, naming the fields."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(workdir, error) from error
    try:
        saved = load_config(workdir)
    except FileNotFoundError:
        return
    before, now = _fields(saved), _fields(config)
    differing = sorted(k for k in before | now if before.get(k) != now.get(k))
    if differing:
        changes = ", ".join(f"{k} was {before.get(k)!r} and is {now.get(k)!r}" for k in differing)
        raise UserError(
            f"{workdir} is a run of another config ({changes}); use another --workdir, or the "
            "config it was started with."
        )


def save_config(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Writes the resolved configuration as `config.json`."""
    try:
        (workdir / CONFIG).write_text(config.to_json(indent=1) + "\n")
    except OSError as error:
        raise _cannot_write(workdir, error) from error


def _cannot_write(workdir: pathlib.Path, error: OSError) -> UserError:
    return UserError(f"Cannot write to --workdir={workdir}: {error.strerror}.")


def load_config(workdir: pathlib.Path) -> ConfigDict:
    """Reads the configuration of a run."""
    return ConfigDict(json.loads((workdir / CONFIG).read_text()))


def _fields(config: ConfigDict) -> dict[str, Any]:
    """Returns the leaves by dotted name, as JSON keeps them."""
    plain = json.loads(config.to_json())
    paths, _ = jax.tree_util.tree_flatten_with_path(
        plain, is_leaf=lambda x: not isinstance(x, dict)
    )
    return {".".join(key.key for key in path): value for path, value in paths}
