"""Divergence: notices numbers that are not finite, and finds the layer where they began."""

from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from mbn_jax.datasets.split import Examples
from mbn_jax.parallel.devices import AXIS_NAME, first_device
from mbn_jax.statistics.recalibration import record_norm_inputs
from mbn_jax.step.state import TrainState
from mbn_jax.training.hparams import HParams
from mbn_jax.training.passes import batch_stacks, train_pass
from mbn_jax.training.program import Program
from mbn_jax.training.steps import (
    BatchStack,
    build_train_step,
    layer_statistics,
    next_batch,
    training_apply,
)
from mbn_jax.training.task import Task

MAX_REPLAYED_STEPS = 10_000
"""Most steps that are trained again to find the layer."""


class DivergenceError(Exception):
    """Training diverged.

    Attributes:
      step: the first step known to be affected.
      after_update: whether the parameters after that step's update are affected, and its loss is
        not known to be.
    """

    def __init__(self, message: str, step: int, after_update: bool = False):
        """Passes all arguments on, so that the error can be pickled."""
        super().__init__(message, step, after_update)
        self.step = step
        self.after_update = after_update

    def __str__(self) -> str:
        """Returns the message."""
        return self.args[0]


class FiniteCheck:
    """Checks numbers that the host reads from the devices anyway."""

    def __init__(self, schedule: optax.Schedule):
        """Keeps the learning rate by step, for the message."""
        self._schedule = schedule

    def __call__(self, value: float, what: str, step: int, *, after_update: bool = False) -> None:
        """Checks a number of a step, called `what`, which may depend on the step's update.

        Raises:
          DivergenceError: naming the number, the step and its learning rate.
        """
        if np.isfinite(value):
            return
        rate = float(self._schedule(step - 1))
        when = "after" if after_update else "of"
        raise DivergenceError(
            f"The {what} {when} step {step} is {value}, at learning rate {rate:.4g}",
            step,
            after_update,
        )

    def losses(self, losses: np.ndarray, step: int) -> None:
        """Checks the losses of the steps up to `step`; raises DivergenceError."""
        for at, loss in enumerate(losses, start=step - len(losses) + 1):
            self(loss, "loss", at)

    def params(self, state: TrainState, step: int) -> None:
        """Checks the parameters after the update of `step`, which no loss has seen yet."""
        params = jax.tree.leaves(first_device(state.params))
        total = sum(float(jnp.sum(x)) for x in params)
        self(total, "sum of the parameters", step, after_update=True)


def find_layer(
    program: Program, config: ConfigDict, state: TrainState, error: DivergenceError
) -> str:
    """Finds the first layer whose statistics were not finite, by training up to there again.

    A run is a function of its steps, so the loss that was not finite comes again. The last records
    of a run cannot tell the layer: by then all layers are affected. `state` is of a step before the
    error, and is donated.

    Returns:
      A clause that names the layer.
    """
    first_step, last_step = int(first_device(state.step)), error.step - 1
    count = last_step - first_step
    if count > MAX_REPLAYED_STEPS:
        return (
            f"its layer was not looked for, because the last checkpoint is {count} steps before "
            f"it, more than {MAX_REPLAYED_STEPS} (lower checkpoint_every_steps)"
        )
    before = state
    for dispatch in train_pass(program, config, state, last_step):
        before = dispatch.state
        jax.block_until_ready(before.step)  # So that dispatches do not pile up on the device.
    stack, _ = next(batch_stacks(program, config, last_step))
    layers = _layers_not_finite(program, config, before, stack, error.after_update)
    found = f"found by replaying {count} steps from step {first_step}"
    if not layers:
        return f"no normalization layer's statistics are, the loss alone is ({found})"
    return f"the first layer whose statistics are not finite is {layers[0]} ({found})"


def _layers_not_finite(
    program: Program, config: ConfigDict, state: TrainState, stack: BatchStack, after_update: bool
) -> list[str]:
    """Returns the layers with statistics that are not finite, in the order of their calls."""
    step = program.compiled(finite_layers_step, after_update=after_update)
    data = program.data(program.task.train)
    found = first_device(step(state, program.hparams(config), data, stack))
    return [layer for layer, is_finite in jax.device_get(found).items() if not is_finite]


def finite_layers_step(
    task: Task,
    state: TrainState,
    hparams: HParams,
    data: Examples | None,
    stack: BatchStack,
    *,
    after_update: bool,
) -> OrderedDict[str, jax.Array]:
    """Checks the moments of each layer's input on the next batch, and its own statistics.

    With `after_update` it looks after the next update, on the same batch. For the arguments see
    `mbn_jax.training.steps`.

    Returns:
      By layer, in the order of their calls, an int32 scalar: 1 where all are finite, else 0.
    """
    batch = next_batch(task, state, hparams, data, stack)
    new = build_train_step(task, hparams)(state, batch)[0] if after_update else state
    variables = {"params": new.params, "batch_stats": new.batch_stats}
    with record_norm_inputs(task.norm_layers) as recorded:
        task.loss(training_apply(task, hparams, variables, state.key), batch)
    kept = layer_statistics(new.batch_stats)
    flags = OrderedDict()  # JAX sorts a dict.
    for layer, moments in recorded.items():
        numbers = (moments.mean, moments.var, *kept.get(layer, ()))
        is_finite = jnp.stack([jnp.isfinite(x).all() for x in numbers]).all()
        flags[layer] = jax.lax.pmin(is_finite.astype(jnp.int32), AXIS_NAME)
    return flags
