"""Evaluation of a finished or interrupted run from its checkpoint."""

import pathlib

from mbn_jax.checkpoints import Checkpoints
from mbn_jax.errors import UserError
from mbn_jax.evaluation import Evaluator
from mbn_jax.experiment import Experiment, load_dataset_split
from mbn_jax.train import CHECKPOINTS, load_config


def evaluate_run(workdir: pathlib.Path, split: str | None = None) -> dict[str, float | str]:
    """Evaluates the newest sound checkpoint of a run on any split.

    Args:
      workdir: of the run.
      split: TFDS split; default: the run's test split.

    Returns:
      'step', 'split', 'loss' and 'error'.

    Raises:
      UserError: where there is no run or no sound checkpoint.
    """
    try:
        config = load_config(workdir)
    except FileNotFoundError as error:
        raise UserError(f"{workdir} is not the folder of a run: it has no config.json.") from error
    experiment = Experiment.build(config)
    checkpoints = Checkpoints(workdir / CHECKPOINTS)
    try:
        state = checkpoints.restore(
            experiment.initial_state(), local_statistics=experiment.local_statistics
        )
    finally:
        checkpoints.close()
    if state is None:
        raise UserError(f"{workdir} has no sound checkpoint to evaluate.")
    evaluated = load_dataset_split(config, split) if split else experiment.test
    values = Evaluator(experiment, evaluated)(state)
    return {"step": int(state.step[0]), "split": evaluated.name, **values}
