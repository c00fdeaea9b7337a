"""Where a run goes on: at the newest sound checkpoint, or, after divergence, at one before."""

import dataclasses
import pathlib

import jax
import numpy as np
from ml_collections import ConfigDict

from mbn_jax.parallel.devices import first_device, first_host_first, replicate
from mbn_jax.step.state import TrainState
from mbn_jax.training.checkpoints import Checkpoints
from mbn_jax.training.config import steps_per_epoch
from mbn_jax.training.config_files import with_fields
from mbn_jax.training.program import Program
from mbn_jax.training.reporting import check_records
from mbn_jax.training.workdir import CHECKPOINTS, check_checkpoint, writing

RATE_OF_RESTORED = 0.5
"""Learning rate after going back to a checkpoint, as a share of that which diverged."""


@dataclasses.dataclass
class Start:
    """What a run starts from.

    Attributes:
      state: arrays `[devices, ...]`.
      step: of it.
      restores: times that the run went back to a checkpoint before.
      went_back_to: the step of it, the last time.
      pending: metrics of steps before it that are on no record yet, `[1, steps]`.
    """

    state: TrainState
    step: int
    restores: int
    went_back_to: int | None
    pending: dict[str, np.ndarray]


def find_start(program: Program, config: ConfigDict, workdir: pathlib.Path) -> Start:
    """Reads the newest sound checkpoint, or makes the state before the first step.

    Args:
      program: that serves the run.
      config: of the run.
      workdir: of the run; checkpoints that are not sound are deleted.

    Raises:
      UserError: where config or records are not those of the checkpoint.
    """
    fresh = program.initial_state(config)
    with writing(workdir):
        checkpoints = Checkpoints(workdir / CHECKPOINTS)
        try:
            local = program.experiment.local_statistics
            state = checkpoints.restore(fresh, local_statistics=local, devices=program.devices)
            notes = checkpoints.notes
            checkpoints.discard_damaged()
        finally:
            checkpoints.close()
    check_checkpoint(config, notes.get("config"), workdir)
    state = replicate(fresh, program.devices) if state is None else state
    step = int(first_device(state.step))
    with first_host_first():
        if jax.process_index() == 0:  # The others may see an older file.
            check_records(workdir, step, notes.get("records"))
    pending = {k: np.array([v], np.float32) for k, v in notes.get("pending", {}).items()}
    return Start(state, step, notes.get("restores", 0), notes.get("went_back_to"), pending)


def go_back(program: Program, config: ConfigDict, workdir: pathlib.Path, not_to: int | None) -> int:
    """Leaves the checkpoint to go back to after divergence as the newest.

    That is the same one whether or not the run was stopped and saved in between.

    Args:
      program: that serves the run.
      config: of the run.
      workdir: of the run.
      not_to: the step that it went back to before, in vain.

    Returns:
      The step of it; 0 where there is none.
    """
    with writing(workdir):
        every = steps_per_checkpoint(program, config)
        checkpoints = Checkpoints(workdir / CHECKPOINTS, every=every)
        try:
            return checkpoints.go_back(not_to)
        finally:
            checkpoints.close()


def slowed(config: ConfigDict, restores: int) -> ConfigDict:
    """Returns the config with the learning rate after so many restores."""
    rate = config.optimizer.learning_rate * RATE_OF_RESTORED**restores
    return with_fields(config, {"optimizer.learning_rate": rate}, "on_divergence")


def whole_epoch(program: Program, config: ConfigDict) -> int:
    """Returns the steps of an epoch, to a whole number of dispatches."""
    stride = config.steps_per_dispatch
    return -(-steps_per_epoch(config, len(program.experiment.train)) // stride) * stride


def steps_per_checkpoint(program: Program, config: ConfigDict) -> int:
    """Returns how many steps there are between two checkpoints."""
    return config.checkpoint_every_steps or whole_epoch(program, config)
