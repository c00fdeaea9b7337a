"""What one device computes for a task: initial state, training steps and evaluation steps.

Every function is pure and takes the task first. `mbn_jax.training.program.Program` compiles it for
all devices, with the named axis `AXIS_NAME`. Their common arguments are:

* state: `TrainState` before the next step; params and batch_stats are parts of one
* hparams: the run's `HParams`
* data: the whole split on the device; None for a split on disk, whose batches are `Examples`
* stack, batch: this device's part of the batches
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mbn_jax.core.batch_stats import inference_statistics, layers_with_statistics
from mbn_jax.core.moments import Moments
from mbn_jax.datasets.augmentation import augment, example_keys, look_up
from mbn_jax.datasets.batches import EvalBatch
from mbn_jax.datasets.split import Examples
from mbn_jax.parallel.devices import AXIS_NAME
from mbn_jax.statistics.recalibration import (
    add_moments,
    recalibrated,
    record_norm_inputs,
)
from mbn_jax.step.forward import BoundApply
from mbn_jax.step.state import TrainState
from mbn_jax.step.train_step import make_train_step
from mbn_jax.training.hparams import HParams
from mbn_jax.training.losses import masked_sums
from mbn_jax.training.task import EvalTotals, Task

PyTree = Any
Metrics = dict[str, jax.Array]


class BatchStack(NamedTuple):
    """The batches of successive training steps.

    Attributes:
      first_step: int32 scalar, the step of the first batch.
      batches: indices into the training split, int32 `[steps, batch]`, or `Examples`
        `[steps, batch, ...]` where the split is on disk.
    """

    first_step: Any
    batches: Any


def _random_keys(hparams: HParams) -> jax.Array:
    """Returns the keys of the first variables, of the run and of augmentation."""
    return jax.random.split(jax.random.key(hparams.seed), 3)


def init_state(task: Task, hparams: HParams) -> TrainState:
    """Returns the state before the first step, a function of the seed alone."""
    init_key, run_key, _ = _random_keys(hparams)
    variables, _ = task.init_variables(task.model(hparams), init_key)
    return TrainState.create(variables, task.optimizer(hparams), run_key)


def train_steps(
    task: Task,
    state: TrainState,
    hparams: HParams,
    data: Examples | None,
    stack: BatchStack,
    *,
    num_steps: int,
) -> tuple[TrainState, Metrics]:
    """Runs successive training steps.

    Returns:
      The state after `num_steps` steps, and metrics `[num_steps]`.
    """
    train_step = build_train_step(task, hparams)

    def one_step(state: TrainState, _) -> tuple[TrainState, Metrics]:
        return train_step(state, next_batch(task, state, hparams, data, stack))

    if num_steps > 1:
        # XLA's CPU compiler has fast kernels for the convolutions of a backward pass, but does not
        # find them inside a loop, where it is many times slower.
        unroll = jax.default_backend() == "cpu"
        return jax.lax.scan(one_step, state, length=num_steps, unroll=unroll)
    state, metrics = one_step(state, None)  # For the same reason not a loop of one step.
    return state, jax.tree.map(lambda x: x[None], metrics)


def build_train_step(
    task: Task, hparams: HParams
) -> Callable[[TrainState, Examples], tuple[TrainState, Metrics]]:
    """Returns the function that runs one training step on a batch as `next_batch` returns it."""
    return make_train_step(
        task.model(hparams).apply,
        task.optimizer(hparams),
        task.loss,
        double_forward=task.config.double_forward,
        double_forward_fraction=task.config.double_forward_fraction,
        axis_name=AXIS_NAME,
        local_statistics=task.local_statistics,
    )


def training_apply(task: Task, hparams: HParams, variables: PyTree, key: jax.Array) -> BoundApply:
    """Returns the network bound as the training step does it, its layers open to interception."""
    model = task.model(hparams, remat=False)
    return BoundApply(model.apply, variables, (), {"dropout": key}, records=True)


def next_batch(
    task: Task, state: TrainState, hparams: HParams, data: Examples | None, stack: BatchStack
) -> Examples:
    """Returns this device's part of the next step's batch, standardized and augmented."""
    at = state.step - stack.first_step
    batch = look_up(data, jax.tree.map(lambda x: x[at], stack.batches))
    return _augmented(task, hparams, batch, state.step)


def _augmented(task: Task, hparams: HParams, batch: Examples, step: jax.Array) -> Examples:
    """Standardizes and augments a batch; its random draws are functions of seed and `step`."""
    options = task.config.dataset
    size = jax.tree.leaves(batch)[0].shape[0]
    # Positions in the global batch, so that the draws do not depend on the number of devices.
    positions = jax.lax.axis_index(AXIS_NAME) * size + jnp.arange(size)
    _, _, augmentation_key = _random_keys(hparams)
    keys = example_keys(augmentation_key, step, positions)
    batch = task.prepared(batch)
    if not (options.crop_padding or options.flip):
        return batch
    images = augment(batch["image"], keys, crop_padding=options.crop_padding, flip=options.flip)
    return {**batch, "image": images}


def eval_step(
    task: Task,
    totals: tuple[jax.Array, EvalTotals],
    hparams: HParams,
    params: PyTree,
    batch_stats: PyTree,
    data: Examples | None,
    batch: EvalBatch,
) -> tuple[jax.Array, EvalTotals]:
    """Adds a batch, over all devices, to the number of examples so far and their totals."""
    examples = look_up(data, batch.examples)
    variables = {"params": params, "batch_stats": batch_stats}
    apply = functools.partial(task.model(hparams).apply, variables)
    found = task.loss.eval_metrics(apply, task.prepared(examples))
    sums = jnp.sum(batch.mask, dtype=jnp.int32), masked_sums(found, batch.mask)
    return jax.tree.map(jnp.add, totals, jax.lax.psum(sums, AXIS_NAME))


def moments_step(
    task: Task,
    totals: dict[str, Moments],
    hparams: HParams,
    params: PyTree,
    batch_stats: PyTree,
    data: Examples | None,
    batch: EvalBatch,
    number: jax.Array,
    *,
    recalibrate: bool,
) -> dict[str, Moments]:
    """Adds a batch, augmented but at inference, to the moments of the norm layers' inputs.

    Args, beside the common ones:
      totals: moments by layer over earlier batches, or empty.
      number: int32 scalar, number of the batch; its augmentation is a function of it.
      recalibrate: normalize by the batch's own statistics instead, over all devices, and record
        every layer that keeps statistics. Otherwise record the layers of `config.shift.layers`.

    Returns:
      Moments by layer, over all devices and batches so far.
    """
    examples = _augmented(task, hparams, look_up(data, batch.examples), number)
    variables = {"params": params, "batch_stats": batch_stats}
    with record_norm_inputs(
        task.norm_layers,
        "" if recalibrate else task.config.shift.layers,
        mask=batch.mask,
        axis_name=AXIS_NAME,
        normalize_by_them=recalibrate,
    ) as recorded:
        model = task.model(hparams, remat=False)

        def apply(*args: Any, **kwargs: Any) -> Any:
            if not recalibrate:
                return model.apply(variables, *args, **kwargs)
            return model.apply(variables, *args, mutable=["batch_stats"], **kwargs)[0]

        task.loss.eval_metrics(apply, examples)
    return add_moments(totals, recorded)


def replace_statistics(task: Task, batch_stats: PyTree, moments: dict[str, Moments]) -> PyTree:
    """Returns `batch_stats` with the statistics of the layers in `moments` replaced."""
    return recalibrated(batch_stats, moments)


def layer_statistics(batch_stats: PyTree) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Returns (mean, var) that each layer normalizes by at inference, by its path."""
    return {
        path: inference_statistics(stats)
        for path, stats in layers_with_statistics(batch_stats).items()
    }
