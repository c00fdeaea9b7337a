"""How long a run will take."""

import time
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from mbn_jax.parallel.devices import replicate
from mbn_jax.step.state import TrainState
from mbn_jax.training.intervals import Intervals
from mbn_jax.training.passes import evaluate, train_pass
from mbn_jax.training.program import Program
from mbn_jax.training.shift import measure_shift


def estimate_seconds(program: Program, config: ConfigDict, seconds: float) -> float:
    """Estimates the time of a run from a short one, without compilation and checkpoints.

    Args:
      program: program of the run.
      config: run configuration.
      seconds: how long to measure the training steps.

    Returns:
      Seconds for the run's training steps, evaluations and measurements of the shift.
    """
    total_steps, stride = program.task.total_steps, config.steps_per_dispatch
    last_step = total_steps // stride * stride or total_steps  # Whole dispatches, if there are any.

    def train_for(limit: float) -> tuple[TrainState, float]:
        """Returns the state after `limit` seconds, or the last one, and the seconds of a step."""
        begin = time.monotonic()
        initial = replicate(program.init_state(config), program.devices)
        for dispatch in train_pass(program, config, initial, last_step):
            jax.block_until_ready(dispatch.state)
            taken = time.monotonic() - begin
            if taken >= limit:
                break
        return dispatch.state, taken / dispatch.step

    train_for(0)  # Compiles.
    state, seconds_of_step = train_for(seconds)
    total = seconds_of_step * total_steps

    def time_of_second(call: Callable[[], Any]) -> float:
        call()  # Compiles.
        begin = time.monotonic()
        call()
        return time.monotonic() - begin

    evaluations = -(-total_steps // Intervals.of(program.task, config).evaluation)
    total += evaluations * time_of_second(lambda: evaluate(program, config, state))
    if config.shift.every_steps:
        measurements = total_steps // config.shift.every_steps
        total += measurements * time_of_second(lambda: measure_shift(program, config, state, None))
    return total
