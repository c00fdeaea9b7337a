"""The weights that a new run starts from: those of another run."""

import pathlib
from typing import Any

import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from mbn_jax.command_line import expand_home
from mbn_jax.errors import UserError
from mbn_jax.step.state import TrainState
from mbn_jax.training import saved_statistics
from mbn_jax.training.checkpoints import Checkpoints
from mbn_jax.training.workdir import CHECKPOINTS

PyTree = Any


def with_weights_of(run: str, fresh: TrainState) -> TrainState:
    """Returns the state before the first step, with parameters and statistics of another run.

    Its newest sound checkpoint is read. Step, optimizer and random key are those of the new run.

    Args:
      run: workdir of the other run.
      fresh: state before the first step, without the device axis.

    Raises:
      UserError: where there is no such checkpoint, or it is of another model.
    """
    folder = pathlib.Path(expand_home(run, "init_from")) / CHECKPOINTS
    weights = None
    if folder.is_dir():
        checkpoints = Checkpoints(folder)
        try:
            weights = checkpoints.weights()
        finally:
            checkpoints.close()
    if weights is None:
        raise UserError(f"init_from={run} has no sound checkpoint; give the workdir of a run.")
    params, stats = weights
    if _shapes(fresh.batch_stats).keys() != _shapes(stats).keys():
        raise UserError(
            f"init_from={run} has statistics of other normalization layers; use a run of the same "
            "model and norm.name."
        )
    stats = saved_statistics.pooled(stats)
    found = {**_shapes(params), **_shapes(stats)}
    for name, shape in {**_shapes(fresh.params), **_shapes(fresh.batch_stats)}.items():
        if found.get(name) != shape:
            raise UserError(
                f"init_from={run} is a run of another model: {name} has shape {found.get(name)} "
                f"there, expected {shape}; use the same model and norm."
            )
    return fresh.replace(params=params, batch_stats=stats)


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    return {keystr(path): np.shape(x) for path, x in tree_flatten_with_path(tree)[0]}
