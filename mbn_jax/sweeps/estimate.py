"""How long a sweep will take: from short runs of a few of its programs."""

import dataclasses
import tempfile
import time
from collections.abc import Sequence

from ml_collections import ConfigDict

from mbn_jax.errors import UserError
from mbn_jax.parallel.preemption import StoppedError
from mbn_jax.training.config import fields, program_key
from mbn_jax.training.divergence import DivergenceError
from mbn_jax.training.loop import train
from mbn_jax.training.program import Programs

COST_FIELDS = ("dataset", "model", "loss", "batch_size", "double_forward", "shift", "runtime")
"""Fields, and groups of fields, that set how long a step takes; other fields are taken not to."""

DISPATCHES_PER_RECORD = 8
RECORDS = 4


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The time that a sweep takes from nothing.

    Attributes:
      seconds: the time, of all devices together.
      num_measured: programs that were measured for it; any other was taken to be as fast as the one
        with the same `COST_FIELDS`.
    """

    seconds: float
    num_measured: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds that the parts of a run take."""

    compilation: float
    step: float
    evaluation: float
    shift: float

    def of_run(self, config: ConfigDict, total_steps: int) -> float:
        """Returns the seconds of a run without its compilation and checkpoints."""
        evaluations = config.num_epochs
        if config.eval_every_steps:
            evaluations = total_steps / config.eval_every_steps
        seconds = self.step * total_steps + self.evaluation * max(1.0, evaluations)
        if config.shift.every_steps:
            seconds += self.shift * (total_steps / config.shift.every_steps)
        return seconds


def estimate(configs: Sequence[ConfigDict], programs: Programs, num_devices: int) -> Estimate:
    """Estimates the time of members with these configs, on devices that share them.

    It measures on the device of `programs`, which should be idle; raises UserError if it cannot.
    """
    costs: dict[str, Cost] = {}
    compiled: set[str] = set()
    seconds = 0.0
    for config in configs:
        kind = _kind(config)
        if kind not in costs:
            costs[kind] = measure(config, programs)
        program = program_key(config)
        if program not in compiled:
            compiled.add(program)
            seconds += costs[kind].compilation  # Every device compiles for itself, side by side.
        total_steps = programs.task(config).total_steps
        seconds += costs[kind].of_run(config, total_steps) / num_devices
    return Estimate(seconds, len(costs))


def _kind(config: ConfigDict) -> str:
    """Returns a text that is equal for configs whose steps are taken to be equally fast."""
    named = {k: v for k, v in fields(config).items() if k.startswith(COST_FIELDS)}
    return str(sorted(named.items()))


def measure(config: ConfigDict, programs: Programs, seconds: float = 1.0) -> Cost:
    """Measures the costs of a run by its first steps, in a folder that is thrown away.

    Args:
      config: the run's; its learning rate is not used, for the run should not diverge.
      programs: of one device, to measure on.
      seconds: how long to measure for at least.

    Raises:
      UserError: where these steps diverge.
    """
    stride = config.steps_per_dispatch
    every = DISPATCHES_PER_RECORD * stride
    short = config.copy_and_resolve_references()
    short.num_epochs = config.num_epochs + float(2 * RECORDS * every)  # Never too few.
    short.optimizer.learning_rate = 1e-8
    short.log_every_steps = short.eval_every_steps = every
    short.checkpoint_every_steps = stride << 30  # Not while it is measured.
    if config.shift.every_steps:
        short.shift.every_steps = 2 * every  # With every second evaluation.
    begin = dispatched = time.monotonic()
    rates: list[float] = []
    pauses: list[float] = []
    ends: list[float] = []

    def on_record(step: int, values: dict[str, float]) -> None:
        rates.append(values["images_per_second"])
        ends.append(time.monotonic())
        pauses.append(ends[-1] - dispatched)

    def stop_asked(first_step: int, last_step: int) -> bool:
        nonlocal dispatched
        dispatched = time.monotonic()
        return len(ends) >= RECORDS and dispatched - ends[0] > seconds

    with tempfile.TemporaryDirectory() as folder:
        try:
            train(short, folder, programs=programs, on_record=on_record, stop_asked=stop_asked)
        except DivergenceError as error:
            raise UserError(f"cannot estimate the time: {error}") from error
        except StoppedError:
            pass
    return Cost(
        compilation=ends[1] - begin,
        step=config.batch_size / max(rates[2:]),
        evaluation=min(pauses[2::2]),
        shift=max(0.0, min(pauses[3::2]) - min(pauses[2::2])),
    )
