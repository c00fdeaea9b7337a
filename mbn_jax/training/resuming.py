"""Finds the state that a run starts from: its newest valid checkpoint, or the initial one."""

import dataclasses
import pathlib

import jax
import numpy as np
from ml_collections import ConfigDict

from mbn_jax.parallel.devices import first_device, first_host_first, replicate
from mbn_jax.step.state import TrainState
from mbn_jax.training.checkpoints import Checkpoints
from mbn_jax.training.initialization import with_weights_of
from mbn_jax.training.program import Program
from mbn_jax.training.reporting import check_records
from mbn_jax.training.workdir import CHECKPOINTS, check_checkpoint, writing


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
      state: arrays `[devices, ...]`.
      step: its step.
      pending: metrics of steps up to it that are not in a record yet, `[1, steps]`.
    """

    state: TrainState
    step: int
    pending: dict[str, np.ndarray]


def find_start(program: Program, config: ConfigDict, workdir: pathlib.Path) -> Start:
    """Reads the newest valid checkpoint, or makes the state before the first step.

    Args:
      program: program of the run.
      config: run configuration.
      workdir: folder of the run; checkpoints that are not valid are deleted.

    Raises:
      UserError: if the checkpoint is of another configuration, or the records do not fit it.
    """
    initial = program.init_state(config)
    with writing(workdir):
        checkpoints = Checkpoints(workdir / CHECKPOINTS)
        try:
            state = checkpoints.restore(
                initial,
                local_statistics=program.task.local_statistics,
                devices=program.devices,
            )
            notes = checkpoints.notes
            checkpoints.discard_damaged()
        finally:
            checkpoints.close()
    check_checkpoint(config, notes.get("config"), workdir)
    if state is None:
        if config.init_from:
            initial = with_weights_of(config.init_from, initial)
        state = replicate(initial, program.devices)
    step = int(first_device(state.step))
    with first_host_first():
        if jax.process_index() == 0:  # Other hosts may still see an older file.
            check_records(workdir, step, notes.get("records"))
    pending = {k: np.array([v], np.float32) for k, v in notes.get("pending", {}).items()}
    return Start(state, step, pending)
