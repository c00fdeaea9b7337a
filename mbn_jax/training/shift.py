"""Distribution shift: what an update does to the statistics of the normalization layers."""

from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mbn_jax.core.double_forward import BATCH_MOMENTS, FIRST_BATCH_MOMENTS
from mbn_jax.core.moments import Array, Moments, abs_sq
from mbn_jax.datasets.split import Examples
from mbn_jax.parallel.devices import AXIS_NAME, first_device
from mbn_jax.statistics.recalibration import record_norm_inputs
from mbn_jax.step.state import TrainState
from mbn_jax.training.hparams import HParams
from mbn_jax.training.passes import input_moments, shared_batch_stats
from mbn_jax.training.program import Program
from mbn_jax.training.steps import (
    BatchStack,
    build_train_step,
    layer_statistics,
    next_batch,
    training_apply,
)
from mbn_jax.training.task import Task

PyTree = Any
LayerValues = dict[str, dict[str, Array]]


def measure_shift(
    program: Program, config: ConfigDict, state: TrainState, upcoming: BatchStack | None
) -> dict[str, float]:
    """Measures the next update's shift of the statistics, and the error that they have now.

    The shift is that of the whole batch, whatever part of it the run sends forward twice.

    `config.shift` says which layers and which population; `upcoming` is the stack with the next
    batch, None at the end of a run.

    Returns:
      'shift_mean', 'shift_std' and 'shift_kl' of the next update (see `moments_shift`), and
      'error_mean' and 'error_log_variance' of the statistics for inference against those of the
      training split, augmented as in training (see `statistics_error`): the average over layers,
      and with '/LAYER' appended that of each layer.
    """
    hparams = program.hparams(config)
    values: dict[str, float] = {}
    if upcoming is not None:
        step = program.compiled(shift_step)
        data = program.data(program.task.train)
        values |= _flat("shift", step(state, hparams, data, upcoming))
    batch_stats = shared_batch_stats(program, state)
    if batch_stats:
        population = input_moments(
            program, config, state.params, batch_stats, config.shift.examples
        )
        errors = program.compiled(statistics_errors)(population, hparams, batch_stats)
        values |= _flat("error", errors)
    return values


def _flat(kind: str, by_layer: LayerValues) -> dict[str, float]:
    """Returns values of the first device as 'KIND_NAME/LAYER', and averages as 'KIND_NAME'."""
    host = jax.device_get(first_device(by_layer))
    flat = {}
    for name in {name: None for values in host.values() for name in values}:
        layers = {layer: float(values[name]) for layer, values in host.items()}
        flat[f"{kind}_{name}"] = sum(layers.values()) / len(layers)
        flat |= {f"{kind}_{name}/{layer}": value for layer, value in layers.items()}
    return flat


def shift_step(
    task: Task, state: TrainState, hparams: HParams, data: Examples | None, stack: BatchStack
) -> LayerValues:
    """Measures what the next update does to the statistics of its own batch.

    For the arguments see `mbn_jax.training.steps`.

    Returns:
      `moments_shift` by layer, averaged over devices.
    """
    config = task.config
    batch = next_batch(task, state, hparams, data, stack)
    new, _ = build_train_step(task, hparams)(state, batch)
    axis_name = None if task.local_statistics else AXIS_NAME

    def inputs(params: PyTree, **collections: PyTree) -> tuple[dict[str, Moments], PyTree]:
        variables = {"params": params, "batch_stats": state.batch_stats, **collections}
        # The same draws before and after the update.
        apply = training_apply(task, hparams, variables, state.key)
        layers = task.norm_layers
        with record_norm_inputs(layers, config.shift.layers, axis_name=axis_name) as recorded:
            _, (_, updates) = task.loss(apply, batch)
        return recorded, updates.get(BATCH_MOMENTS, {})

    before, first = inputs(state.params)
    transports = config.double_forward == "transport"
    after, _ = inputs(new.params, **({FIRST_BATCH_MOMENTS: first} if transports else {}))
    stats = layer_statistics(state.batch_stats)
    shifts = {}
    for layer, moments in before.items():
        _, var = stats.get(layer, (None, moments.var))
        shifts[layer] = moments_shift(moments, after[layer], var, config.norm.epsilon)
    return jax.lax.pmean(shifts, AXIS_NAME)


def statistics_errors(
    task: Task, population: dict[str, Moments], hparams: HParams, batch_stats: PyTree
) -> LayerValues:
    """Returns `statistics_error` of each layer that keeps statistics."""
    stats = layer_statistics(batch_stats)
    return {
        layer: statistics_error(*stats[layer], moments, task.config.norm.epsilon)
        for layer, moments in population.items()
        if layer in stats
    }


def moments_shift(before: Moments, after: Moments, var: Array, epsilon: float) -> dict[str, Array]:
    """Measures how far an update moved the moments of one batch, averaged over features.

        mean = sqrt(E[|m' - m|^2 / s^2])    std = sqrt(E[(s_B' - s_B)^2 / s^2])
        kl = E[KL(N(m', v') || N(m, v))],    s^2 = var + epsilon, and epsilon added to v and v'

    Args:
      before: moments of the batch under the parameters before the update, `[*F]`.
      after: moments of the same batch under those after it, `[*F]`.
      var: `[*F]`, variance whose square root is the unit of 'mean' and 'std'.
      epsilon: added to variances.

    Returns:
      'mean' and 'std', in standard deviations, and 'kl', in nats: the cost of describing the batch
      by its moments from before the update.

    >>> moments = Moments(jnp.array([0.0]), jnp.array([1.0]), jnp.array([8.0]))
    >>> moved = Moments(jnp.array([0.5]), jnp.array([1.0]), jnp.array([8.0]))
    >>> shift = moments_shift(moments, moved, jnp.array([1.0]), 0.0)
    >>> {name: float(value) for name, value in shift.items()}
    {'mean': 0.5, 'std': 0.0, 'kl': 0.125}
    """
    v, v_after, unit = before.var + epsilon, after.var + epsilon, var + epsilon
    moved = abs_sq(after.mean - before.mean)
    kl = 0.5 * (jnp.log(v / v_after) + (v_after + moved) / v - 1)
    return {
        "mean": jnp.sqrt((moved / unit).mean()),
        "std": jnp.sqrt((jnp.square(jnp.sqrt(v_after) - jnp.sqrt(v)) / unit).mean()),
        "kl": kl.mean(),
    }


def statistics_error(
    mean: Array, var: Array, population: Moments, epsilon: float
) -> dict[str, Array]:
    """Measures the error of a layer's statistics against the population's, over its features.

        mean = sqrt(E[|mean - m|^2 / (v + epsilon)])
        log_variance = sqrt(E[log((var + epsilon) / (v + epsilon))^2])

    Args:
      mean: `[*F]`, mean that the layer normalizes by at inference.
      var: `[*F]`, variance that it normalizes by at inference.
      population: moments m, v of the layer's inputs over the population, `[*F]`.
      epsilon: added to variances.

    Returns:
      'mean', in the population's standard deviations, and 'log_variance'.

    >>> population = Moments(jnp.array([1.0]), jnp.array([4.0]), jnp.array([8.0]))
    >>> error = statistics_error(jnp.array([2.0]), jnp.array([4.0]), population, 0.0)
    >>> {name: float(value) for name, value in error.items()}
    {'mean': 0.5, 'log_variance': 0.0}
    """
    v = population.var + epsilon
    return {
        "mean": jnp.sqrt((abs_sq(mean - population.mean) / v).mean()),
        "log_variance": jnp.sqrt(jnp.square(jnp.log((var + epsilon) / v)).mean()),
    }
