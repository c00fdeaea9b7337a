"""Exact evaluation on a split: every example counts once, the last batch is padded and masked."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mbn_jax.datasets.images import Split
from mbn_jax.datasets.pipeline import evaluation_batches, take
from mbn_jax.double_forward import TrainState
from mbn_jax.experiment import Batch, Experiment
from mbn_jax.parallel import (
    AXIS_NAME,
    distribute,
    gather_over_hosts,
    map_over_devices,
    pool_over_devices,
    replicate,
    split_over_devices,
)

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
        totals = []
        batches = evaluation_batches(
            self._split,
            self._batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        for batch in batches:
            batch = distribute(split_over_devices(batch))
            totals.append(self._sums(state.params, batch_stats, self._data, batch))
        # One wait, after all batches are under way.
        totals = jax.device_get(totals)
        loss, wrong, count = (
            sum(float(t[k][0]) for t in totals) for k in ("loss", "wrong", "count")
        )
        return {"loss": loss / count, "error": wrong / count}

    def _device_sums(self, params: PyTree, batch_stats: PyTree, data: Batch, batch: Batch) -> Batch:
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
        return jax.lax.psum(sums, AXIS_NAME)


def device_data(split: Split) -> Batch:
    """Returns the split's arrays on every device, or nothing where it is decoded as it is used."""
    if split.images is None:
        return {}
    return replicate({"image": split.images, "label": split.labels})
