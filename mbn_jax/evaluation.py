"""Exact evaluation on a split: every example counts once, the last batch is padded and masked."""

import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mbn_jax.checkpoints import Checkpoints
from mbn_jax.datasets.images import Split
from mbn_jax.datasets.pipeline import evaluation_batches, take
from mbn_jax.double_forward import TrainState
from mbn_jax.errors import UserError
from mbn_jax.experiment import Batch, Experiment, device_data, load_dataset_split
from mbn_jax.parallel import (
    AXIS_NAME,
    distribute,
    gather_over_hosts,
    map_over_devices,
    pool_over_devices,
    replicate,
    split_over_devices,
)
from mbn_jax.workdir import CHECKPOINTS, load_config

PyTree = Any


class Evaluator:
    """Evaluates states of one experiment on one split, with one compiled function."""

    def __init__(self, experiment: Experiment, split: Split):
        """Puts the split on the devices, where it is in memory."""
        self._experiment = experiment
        self._split = split
        devices = jax.device_count()
        wanted = min(experiment.config.eval_batch_size, len(split))
        self._batch_size = math.ceil(wanted / devices) * devices
        self._data = device_data(split)
        self._sums = map_over_devices(self._device_sums, runtime=experiment.config.runtime)

    def __call__(self, state: TrainState) -> dict[str, float]:
        """Evaluates by the statistics in the state, by the rule that training used.

        Args:
          state: arrays `[devices, ...]`; statistics that devices keep for themselves are pooled
            first.

        Returns:
          'loss', the mean cross-entropy, and 'error', the share of wrong predictions.
        """
        batch_stats = state.batch_stats
        if self._experiment.local_statistics:
            batch_stats = replicate(pool_over_devices(gather_over_hosts(batch_stats)))
        # Each batch adds to the sums of the one before: one runs after the other, nothing piles up.
        totals = replicate({"loss": np.float32(0), "wrong": np.int32(0), "count": np.int32(0)})
        batches = evaluation_batches(
            self._split,
            self._batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        for batch in batches:
            batch = distribute(split_over_devices(batch))
            totals = self._sums(totals, state.params, batch_stats, self._data, batch)
        sums = {name: float(value[0]) for name, value in jax.device_get(totals).items()}
        return {"loss": sums["loss"] / sums["count"], "error": sums["wrong"] / sums["count"]}

    def _device_sums(
        self, totals: Batch, params: PyTree, batch_stats: PyTree, data: Batch, batch: Batch
    ) -> Batch:
        batch = take(data, batch)
        variables = {"params": params, "batch_stats": batch_stats}
        images = self._experiment.images(batch)
        logits = jnp.asarray(self._experiment.model.apply(variables, images, train=False))
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        sums = {
            "loss": jnp.sum(jnp.where(batch["mask"], loss, 0)),
            "wrong": jnp.sum((logits.argmax(-1) != batch["label"]) & batch["mask"]),
            "count": jnp.sum(batch["mask"]),
        }
        return jax.tree.map(jnp.add, totals, jax.lax.psum(sums, AXIS_NAME))


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
    experiment = Experiment.build(load_config(workdir))
    checkpoints = Checkpoints(workdir / CHECKPOINTS)
    try:
        state = checkpoints.restore(
            experiment.initial_state(), local_statistics=experiment.local_statistics
        )
    finally:
        checkpoints.close()
    if state is None:
        raise UserError(f"{workdir} has no sound checkpoint to evaluate.")
    evaluated = load_dataset_split(experiment.config, split) if split else experiment.test
    values = Evaluator(experiment, evaluated)(state)
    return {"step": int(state.step[0]), "split": evaluated.name, **values}
