"""Measures the distribution shift of a run: what an update does to the statistics of its norms."""

from typing import TYPE_CHECKING, Any

import jax
from ml_collections import ConfigDict

from mbn_jax.core.double_forward import BATCH_MOMENTS, FIRST_BATCH_MOMENTS
from mbn_jax.core.moments import Moments
from mbn_jax.parallel.devices import AXIS_NAME, first_device, replicate
from mbn_jax.statistics.recalibration import record_norm_inputs
from mbn_jax.step.state import TrainState
from mbn_jax.training import config as config_lib
from mbn_jax.training.diagnostics import statistics_error, update_shift
from mbn_jax.training.norms import LAYERS
from mbn_jax.training.task import Batch

if TYPE_CHECKING:
    from mbn_jax.training.program import Program

PyTree = Any


class ShiftMeter:
    """Measures states of the runs that one program serves."""

    def __init__(self, program: "Program"):
        """Compiles nothing yet."""
        self._program = program
        self._experiment = program.experiment
        self._update_shift = program.map_over_devices(self._device_update_shift)
        self._statistics_errors = program.map_over_devices(self._device_statistics_errors)

    def measure(
        self, config: ConfigDict, state: TrainState, block: Batch | None
    ) -> dict[str, float]:
        """Measures the next update's shift of the statistics, and the error that they have now.

        Args:
          config: of the run; `config.shift` says which layers, and which population.
          state: arrays `[devices, ...]`.
          block: on the devices, with the next batch; None at the end of a run, which has none.

        Returns:
          'shift_mean', 'shift_std' and 'shift_kl' of the next update (see
          `mbn_jax.training.diagnostics`), and 'error_mean' and 'error_log_variance' of the
          statistics for inference against those of the training split, augmented as in training
          (see `statistics_error`): the average over layers, and '/LAYER' for each. The shift is
          that of the whole batch, whatever part of it the run sends forward twice.
        """
        values = replicate(config_lib.traced_values(config), self._program.devices)
        split = self._experiment.train
        data = self._program.data(split)
        measured = []
        if block is not None:
            measured.append(("shift", self._update_shift(state, values, data, block)))
        batch_stats = self._program.inference_stats(state)
        if batch_stats:
            population = self._program.norm_inputs(
                config, state.params, batch_stats, config.shift.examples
            )
            errors = self._statistics_errors(population, values, batch_stats)
            measured.append(("error", errors))
        found = {}
        for kind, layers in measured:
            host = jax.device_get(first_device(layers))
            for name in {name: None for values in host.values() for name in values}:
                by_layer = {layer: float(values[name]) for layer, values in host.items()}
                found[f"{kind}_{name}"] = sum(by_layer.values()) / len(by_layer)
                found |= {f"{kind}_{name}/{layer}": value for layer, value in by_layer.items()}
        return found

    def _device_update_shift(
        self, state: TrainState, values: Batch, data: Batch, block: Batch
    ) -> dict[str, dict[str, jax.Array]]:
        """Measures what the next update does to the statistics of its own batch.

        Args:
          state: of the device, before the update; it stays as it is.
          values: of the run.
          data: the training split, or empty where batches come decoded.
          block: as `batch_of_step` takes it.

        Returns:
          `mbn_jax.training.diagnostics.update_shift` by layer; averaged over devices.
        """
        batch = self._experiment.batch_of_step(values, state, data, block)
        new, _ = self._experiment.step(values)(state, batch)
        synced = self._experiment.config.norm.sync == "sync"

        def inputs(params: PyTree, **collections: PyTree) -> tuple[dict[str, Moments], PyTree]:
            variables = {"params": params, "batch_stats": state.batch_stats, **collections}
            with record_norm_inputs(
                LAYERS,
                self._experiment.config.shift.layers,
                axis_name=AXIS_NAME if synced else None,
            ) as recorded:
                _, updates = self._experiment.model(values, remat=False).apply(
                    variables,
                    batch["image"],
                    train=True,
                    mutable=["batch_stats", BATCH_MOMENTS],
                    rngs={"dropout": state.key},  # The same draws before and after.
                )
            return recorded, updates.get(BATCH_MOMENTS, {})

        before, first = inputs(state.params)
        transports = self._experiment.config.double_forward == "transport"
        after, _ = inputs(new.params, **({FIRST_BATCH_MOMENTS: first} if transports else {}))
        stats = self._experiment.inference_statistics(state.batch_stats, values)
        shifts = {}
        for layer, moments_before in before.items():
            _, var = stats.get(layer, (None, moments_before.var))
            epsilon = self._experiment.config.norm.epsilon
            shifts[layer] = update_shift(moments_before, after[layer], var, epsilon)
        return jax.lax.pmean(shifts, AXIS_NAME)

    def _device_statistics_errors(
        self, population: dict[str, Moments], values: Batch, batch_stats: PyTree
    ) -> dict[str, dict[str, jax.Array]]:
        """Returns `statistics_error` for each layer that keeps statistics."""
        stats = self._experiment.inference_statistics(batch_stats, values)
        errors = {}
        for layer, moments in population.items():
            if layer in stats:
                mean, var = stats[layer]
                errors[layer] = statistics_error(
                    mean, var, moments, self._experiment.config.norm.epsilon
                )
        return errors
