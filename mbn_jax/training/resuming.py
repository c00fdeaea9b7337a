"""Where a run starts: at its newest sound checkpoint, or before the first step."""

import dataclasses
import pathlib

import jax
import numpy as np
from ml_collections import ConfigDict

from mbn_jax.parallel.devices import first_device, first_host_first, replicate
from mbn_jax.step.state import TrainState
from mbn_jax.training.checkpoints import Checkpoints
from mbn_jax.training.config import steps_per_epoch
from mbn_jax.training.initialization import with_weights_of
from mbn_jax.training.program import Program
from mbn_jax.training.reporting import check_records
from mbn_jax.training.workdir import CHECKPOINTS, check_checkpoint, writing


@dataclasses.dataclass
class Start:
    """What a run starts from.

    Attributes:
      state: arrays `[devices, ...]`.
      step: of it.
      pending: metrics of steps before it that are on no record yet, `[1, steps]`.
    """

    state: TrainState
    step: int
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
    if state is None:
        if config.init_from:
            fresh = with_weights_of(config.init_from, fresh)
        state = replicate(fresh, program.devices)
    step = int(first_device(state.step))
    with first_host_first():
        if jax.process_index() == 0:  # The others may see an older file.
            check_records(workdir, step, notes.get("records"))
    pending = {k: np.array([v], np.float32) for k, v in notes.get("pending", {}).items()}
    return Start(state, step, pending)


def whole_epoch(program: Program, config: ConfigDict) -> int:
    """Returns the steps of an epoch, to a whole number of dispatches."""
    stride = config.steps_per_dispatch
    return -(-steps_per_epoch(config, len(program.experiment.train)) // stride) * stride


def steps_per_checkpoint(program: Program, config: ConfigDict) -> int:
    """Returns how many steps there are between two checkpoints."""
    return config.checkpoint_every_steps or whole_epoch(program, config)
