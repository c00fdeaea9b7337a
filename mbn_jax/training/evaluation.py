"""Evaluation of a run that is on disk."""

import contextlib
import pathlib

import jax
from ml_collections import ConfigDict

from mbn_jax.errors import UserError
from mbn_jax.parallel.devices import Devices, first_device
from mbn_jax.training.checkpoints import Checkpoints
from mbn_jax.training.checks import validate_devices
from mbn_jax.training.passes import evaluate, recalibrate
from mbn_jax.training.program import Programs
from mbn_jax.training.task import load_dataset_split
from mbn_jax.training.workdir import CHECKPOINTS, check_checkpoint, load_config


def evaluate_run(
    workdir: pathlib.Path,
    split: str | None = None,
    *,
    recalibrate_batches: int = 0,
    best: bool = False,
) -> dict[str, float | str]:
    """Evaluates the newest valid checkpoint of a run on any split.

    Args:
      workdir: folder of the run.
      split: TFDS split; default: the run's test split.
      recalibrate_batches: number of batches of training examples to compute the statistics anew
        from; 0: use those of the run.
      best: evaluate the valid checkpoint of the lowest test error instead.

    Returns:
      'step', 'split', the number of 'examples', and the metrics of the loss ('loss', 'error').

    Raises:
      UserError: where there is no run or no valid checkpoint, or its config is another.
    """
    config = load_config(workdir)
    program = Programs(_devices_that_fit(config)).get(config)
    with contextlib.closing(Checkpoints(workdir / CHECKPOINTS)) as checkpoints:
        state = checkpoints.restore(
            program.init_state(config),
            local_statistics=program.task.local_statistics,
            devices=program.devices,
            best=best,
        )
        noted = checkpoints.notes.get("config")
    check_checkpoint(config, noted, workdir)
    if state is None:
        of_which = " that notes its test error" if best else ""
        raise UserError(f"{workdir} has no valid checkpoint{of_which} to evaluate.")
    if recalibrate_batches:
        if not state.batch_stats:
            raise UserError(
                f"The network of {workdir} keeps no statistics (norm {config.norm.name!r}), there "
                "is nothing to recalibrate; leave recalibrate_batches out."
            )
        state = recalibrate(program, config, state, recalibrate_batches)
    evaluated = load_dataset_split(config, split) if split else program.task.test
    values = evaluate(program, config, state, evaluated)
    step = int(first_device(state.step))
    return {"step": step, "split": evaluated.name, "examples": len(evaluated), **values}


def _devices_that_fit(config: ConfigDict) -> Devices:
    """Returns all devices, or as many of this host's as the run could have been made on."""
    counts = range(jax.local_device_count(), 0, -1)
    for count in (jax.device_count(), *counts):
        try:
            validate_devices(config, count)
        except UserError:
            continue
        return None if count == jax.device_count() else jax.local_devices()[:count]
    validate_devices(config, jax.device_count())
    return None
