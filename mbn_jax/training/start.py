"""The state that a run starts from: its newest checkpoint, another run's weights, or new ones."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path
from ml_collections import ConfigDict

from mbn_jax.command_line import expand_home
from mbn_jax.core.batch_stats import layers_with_statistics, map_layers, overlay
from mbn_jax.errors import UserError
from mbn_jax.parallel.devices import first_device, first_host_first, replicate
from mbn_jax.statistics.batch_norm import from_batch_norm
from mbn_jax.step.state import TrainState
from mbn_jax.training import saved_statistics
from mbn_jax.training.checkpoints import Checkpoints
from mbn_jax.training.program import Program
from mbn_jax.training.reporting import check_records
from mbn_jax.training.workdir import CHECKPOINTS, check_checkpoint, writing

PyTree = Any

BATCH_NORM = {"mean", "var", "groups"}
COUNTERS = ("steps", "rule", "groups")


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

    Checkpoints that are not valid are deleted.

    Raises:
      UserError: if the checkpoint is of another configuration, or the records do not fit it.
    """
    initial = program.init_state(config)
    with (
        writing(workdir),
        contextlib.closing(Checkpoints(workdir / CHECKPOINTS)) as checkpoints,
    ):
        state = checkpoints.restore(
            initial, local_statistics=program.task.local_statistics, devices=program.devices
        )
        notes = checkpoints.notes
        checkpoints.discard_damaged()
    check_checkpoint(config, notes.get("config"), workdir)
    if state is None:
        if config.init_from:
            initial = with_weights_of(config.init_from, initial)
        state = replicate(initial, program.devices)
    step = int(first_device(jax.device_get(state.step)))  # On the host, without a program.
    with first_host_first():
        if jax.process_index() == 0:  # Other hosts may still see an older file.
            check_records(workdir, step, notes.get("records"))
    pending = {k: np.array([v], np.float32) for k, v in notes.get("pending", {}).items()}
    return Start(state, step, pending)


def with_weights_of(run: str, fresh: TrainState) -> TrainState:
    """Returns a fresh state, without the device axis, with parameters and statistics of a workdir.

    Its newest valid checkpoint is read. Step, optimizer and random key are those of the new run,
    and so are the counters and rules of its layers: their schedules start anew. Statistics of
    BatchNorm become the first batch of any other norm.

    Raises:
      UserError: where there is no such checkpoint, or it is of another model.
    """
    folder = pathlib.Path(expand_home(run, "init_from")) / CHECKPOINTS
    weights = None
    if folder.is_dir():
        with contextlib.closing(Checkpoints(folder)) as checkpoints:
            weights = checkpoints.weights()
    if weights is None:
        raise UserError(f"init_from={run} has no valid checkpoint; give the workdir of a run.")
    params, stats = weights[0], saved_statistics.pooled(weights[1])
    ours, theirs = layers_with_statistics(fresh.batch_stats), layers_with_statistics(stats)
    if _are_batch_norms(theirs) and not _are_batch_norms(ours):
        try:
            variables = from_batch_norm(
                {"params": params, "batch_stats": stats},
                {"params": fresh.params, "batch_stats": fresh.batch_stats},
            )
        except ValueError as error:
            raise UserError(f"init_from={run} cannot start this run: {error}") from error
        return fresh.replace(**variables)
    kept, found = _shapes(_moments(fresh.batch_stats)), _shapes(_moments(stats))
    if kept.keys() != found.keys():
        raise UserError(
            f"init_from={run} has statistics of other normalization layers; use a run of the same "
            "model and norm.name, or one of norm.name='batch'."
        )
    found |= _shapes(params)
    kept |= _shapes(fresh.params)
    for name in sorted(found | kept):
        if found.get(name) != kept.get(name):
            raise UserError(
                f"init_from={run} is a run of another model: {name} has shape "
                f"{found.get(name, 'none')} there, expected {kept.get(name, 'none')}; use the same "
                "model and norm."
            )
    stats = overlay(fresh.batch_stats, _moments(stats))
    return fresh.replace(params=params, batch_stats=stats)


def _are_batch_norms(layers: Mapping[str, PyTree]) -> bool:
    """Returns whether there are layers, and all keep what `flax.linen.BatchNorm` does."""
    return bool(layers) and all(layer.keys() <= BATCH_NORM for layer in layers.values())


def _moments(stats: PyTree) -> PyTree:
    """Returns statistics without the counters and rules of the layers."""
    return map_layers(
        lambda _, layer: {name: x for name, x in layer.items() if name not in COUNTERS}, stats
    )


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    return {keystr(path): np.shape(x) for path, x in tree_flatten_with_path(tree)[0]}
