"""What the loop around a training step costs: batches, augmentation, metrics, logging.

    python experiments/scripts/loop_cost.py --config=configs/digits.py

Alternates between the bare step, on a batch already on the devices, and the loop of `mbn-train` on
the same devices, with one step per dispatch and with several. Start-up, evaluations and checkpoints
are not counted. Prints the time of a step in each, the median ratio to the bare step of the same
round with quartiles, and the host time of the bare step, from the call until it returns. On a CPU
pin the process to a core (taskset -c 0). Result: docs/results/loop.md.
"""

import argparse
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
from ml_collections import ConfigDict

from mbn_jax.parallel.devices import AXIS_NAME, distribute, replicate, split_over_devices
from mbn_jax.training.config_files import parse_config
from mbn_jax.training.hparams import HParams
from mbn_jax.training.loop import train
from mbn_jax.training.program import Program, Programs
from mbn_jax.training.steps import build_train_step


def bare_step(
    program: Program, config: ConfigDict, clock: Callable[[], float]
) -> Callable[[int], tuple[float, float]]:
    """Returns what takes so many bare steps; that returns seconds a step, and those of the call."""
    task = program.task
    step = build_train_step(task, HParams.from_config(config).as_arrays())
    mapped = jax.pmap(step, axis_name=AXIS_NAME, donate_argnums=(0,))
    examples = task.train.read(np.arange(config.batch_size))
    examples = jax.device_get(task.prepared(examples))
    batch = distribute(split_over_devices(examples))
    state = replicate(program.init_state(config), program.devices)
    compiled = mapped.lower(state, batch).compile()  # Which is called in less time, as in the loop.

    def run(steps: int) -> tuple[float, float]:
        nonlocal state
        begin, host = clock(), 0.0
        for _ in range(steps):
            call = clock()
            state, _ = compiled(state, batch)
            host += clock() - call
        jax.block_until_ready(state)
        return (clock() - begin) / steps, host / steps

    return run


def seconds_in_loop(programs: Programs, config: ConfigDict, clock: Callable[[], float]) -> float:
    """Trains; returns the median time of a step from one record to the next."""
    times: list[float] = []
    with tempfile.TemporaryDirectory() as workdir:
        train(config, workdir, programs=programs, on_record=lambda *_: times.append(clock()))
    return float(np.median(np.diff(times))) / config.log_every_steps


def main() -> None:
    """Prints a table as Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="config file, as of mbn-train")
    parser.add_argument("--steps", type=int, default=1024, help="of a turn, a multiple of 8 stacks")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--stack", type=int, default=8, help="several steps per dispatch")
    parser.add_argument(
        "--processor_time",
        action="store_true",
        help="count the time of this process alone: on a CPU that others use, pinned to one core",
    )
    args, overrides = parser.parse_known_args()
    clock = time.process_time if args.processor_time else time.perf_counter
    if args.steps % (8 * args.stack):
        parser.error(f"--steps must be a multiple of 8 * --stack, got {args.steps}")
    config = parse_config(args.config, overrides)
    programs = Programs()
    train_examples = len(programs.task(config).train)
    config.num_epochs = args.steps / (train_examples // config.batch_size)
    config.log_every_steps = args.steps // 8
    config.eval_every_steps = config.checkpoint_every_steps = args.steps
    config.shift.every_steps = config.recalibrate_batches = 0
    config.schedule.warmup_epochs = 0.0
    stacked = config.copy_and_resolve_references()
    stacked.steps_per_dispatch = args.stack
    step = bare_step(programs.get(config), config, clock)
    times = []
    for number in range(args.rounds + 1):
        bare, host = step(args.steps)
        row = [bare, *(seconds_in_loop(programs, c, clock) for c in (config, stacked)), host]
        if number:  # The first compiles.
            times.append(row)
    print("| | ms a step | to the bare step | quartiles |\n| --- | --- | --- | --- |")
    names = ("bare step", "run", f"run, {args.stack} steps a dispatch", "host, of a bare step")
    for name, seconds in zip(names, np.array(times).T, strict=True):
        low, median, high = np.quantile(seconds / np.array(times)[:, 0], (0.25, 0.5, 0.75))
        milliseconds = 1e3 * np.median(seconds)
        print(f"| {name} | {milliseconds:.3f} | {median:.3f} | {low:.3f} to {high:.3f} |")


if __name__ == "__main__":
    main()
