"""What a run does about a loss that is not finite: says when, and where in the network it began."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from mbn_jax.core.double_forward import BATCH_MOMENTS
from mbn_jax.parallel.devices import AXIS_NAME, first_device, replicate
from mbn_jax.statistics.recalibration import record_norm_inputs
from mbn_jax.step.state import TrainState
from mbn_jax.training import config as config_lib
from mbn_jax.training.norms import LAYERS
from mbn_jax.training.task import Batch

if TYPE_CHECKING:
    from mbn_jax.training.program import Program

MAX_REPLAYED_STEPS = 10_000
"""Of a run that diverged, to find the layer; as many steps as were trained for it before."""


class DivergenceError(Exception):
    """Training diverged.

    Attributes:
      step: the first step known to be affected.
      after_update: whether it was noticed after the update of that step, not in its loss.
    """

    def __init__(self, message: str, step: int, after_update: bool = False):
        """Keeps all, so that the error survives a process boundary."""
        super().__init__(message, step, after_update)
        self.step = step
        self.after_update = after_update

    def __str__(self) -> str:
        """Returns the message."""
        return self.args[0]


class FiniteCheck:
    """Checks the numbers that a run reads from the devices anyway."""

    def __init__(self, schedule: optax.Schedule, *, goes_on: bool, say: Callable[[str], None]):
        """Checks nothing yet.

        Args:
          schedule: of the learning rate.
          goes_on: whether to say it, once, instead of raising.
          say: shows a line.
        """
        self._schedule = schedule
        self._goes_on = goes_on
        self._say = say
        self._is_said = False

    def __call__(self, value: float, what: str, step: int, *, after_update: bool = False) -> None:
        """Checks one number.

        Args:
          value: to check.
          what: it is.
          step: that it belongs to.
          after_update: whether it is of the parameters after that step's update.

        Raises:
          DivergenceError: naming the step and its learning rate.
        """
        if np.isfinite(value) or self._is_said:
            return
        rate = float(self._schedule(step - 1))
        when = "after" if after_update else "of"
        told = f"The {what} {when} step {step} is {value}, at learning rate {rate:.4g}"
        if not self._goes_on:
            raise DivergenceError(told, step, after_update)
        self._say(f"{told}; training goes on, as on_divergence='continue' says.")
        self._is_said = True

    def losses(self, losses: np.ndarray, step: int) -> None:
        """Checks the losses of the steps up to `step`; raises as a call does."""
        for at, loss in enumerate(losses, start=step - len(losses) + 1):
            self(loss, "loss", at)

    def params(self, state: TrainState, step: int) -> None:
        """Checks the parameters, of which the losses told before the last update only."""
        params = jax.tree.leaves(first_device(state.params))
        total = sum(float(jnp.sum(x)) for x in params)
        self(total, "sum of the parameters", step, after_update=True)


def where_it_began(
    program: "Program", config: ConfigDict, state: TrainState, error: DivergenceError
) -> str:
    """Finds the first layer whose statistics were not finite, by training up to there again.

    A run is a function of its steps, so the loss that was not finite comes again. Of the last
    records of a run nothing can be told: by then all layers are affected.

    Args:
      program: that serves the run.
      config: of the run.
      state: arrays `[devices, ...]`, of a step before the error; it is donated.
      error: of the run.

    Returns:
      A clause about it.
    """
    first_step, last_step = int(first_device(state.step)), error.step - 1
    count = last_step - first_step
    if count > MAX_REPLAYED_STEPS:
        return (
            f"its layer was not looked for, because the last checkpoint is {count} steps before "
            f"it, more than {MAX_REPLAYED_STEPS} (lower checkpoint_every_steps)"
        )
    before = state
    for _, before, _, _ in program.dispatches(config, state, last_step):
        jax.block_until_ready(before.step)  # Nothing piles up on the device.
    block, _ = next(program.blocks(config, last_step))
    layers = program.layer_check(config, before, block, error.after_update)
    found = f"found by replaying {count} steps from step {first_step}"
    if not layers:
        return f"no normalization layer's statistics are, the loss alone is ({found})"
    return f"the first layer whose statistics are not finite is {layers[0]} ({found})"


class LayerCheck:
    """Finds the layers with statistics that are not finite, in runs that one program serves."""

    def __init__(self, program: "Program"):
        """Compiles nothing yet."""
        self._program = program
        self._order: list[str] = []
        self._sound = {
            after_update: program.map_over_devices(
                functools.partial(self._device_sound, after_update=after_update)
            )
            for after_update in (False, True)
        }

    def __call__(
        self, config: ConfigDict, state: TrainState, block: Batch, after_update: bool
    ) -> list[str]:
        """Returns the layers, in the order in which they are called.

        Args:
          config: of the run.
          state: arrays `[devices, ...]`.
          block: with the batch of the next step.
          after_update: whether to look after the next update, on its own batch again.
        """
        values = replicate(config_lib.traced_values(config), self._program.devices)
        data = self._program.data(self._program.experiment.train)
        sound = jax.device_get(first_device(self._sound[after_update](state, values, data, block)))
        return [layer for layer, is_sound in zip(self._order, sound, strict=True) if not is_sound]

    def _device_sound(
        self, state: TrainState, values: Batch, data: Batch, block: Batch, *, after_update: bool
    ) -> list[jax.Array]:
        """Returns for each layer, as called, whether its input's and its own moments are finite."""
        experiment = self._program.experiment
        batch = experiment.batch_of_step(values, state, data, block)
        new = experiment.step(values)(state, batch)[0] if after_update else state
        with record_norm_inputs(LAYERS) as recorded:
            experiment.model(values, remat=False).apply(
                {"params": new.params, "batch_stats": new.batch_stats},
                batch["image"],
                train=True,
                mutable=["batch_stats", BATCH_MOMENTS],
                rngs={"dropout": state.key},
            )
        kept = experiment.inference_statistics(new.batch_stats, values)
        self._order = list(recorded)  # While it is traced; the outputs of a dict would be sorted.
        sound = []
        for layer, moments in recorded.items():
            numbers = (moments.mean, moments.var, *kept.get(layer, ()))
            is_finite = jnp.stack([jnp.isfinite(x).all() for x in numbers]).all()
            sound.append(jax.lax.pmin(is_finite.astype(jnp.int32), AXIS_NAME))
        return sound
