"""Whether moving the backward statistics of MABN by each update's shift helps.

    python experiments/scripts/backward_transport.py --config=configs/cifar.py:resnet8 \
        --config.dataset.data_dir=WHERE_CIFAR10_IS

MABN averages the two backward sums of a layer over earlier batches, whose sums are of parameters
that are gone. Here each step takes a second backward pass, of the same batch under the new
parameters and the same averages, and moves every sum that the layer keeps by what the pass changed.
This costs a whole forward and backward pass, so it is no option of the layer.

* stays: MABN as it is
* own shift: the sums of each small batch move by its own shift
* shared shift: they move by the mean shift of all 16, which has less noise
* shared, both: and the forward statistics move, too, each by the shift of its small batch
* shared, next batch: as the shared shift, of the sums of the next batch, which this update did not
  fit; for two more passes

The setting is that of experiments/ceiling.py, 'moving average 2' and 'moving average 2 with mean'.
A table of test errors with recomputed statistics, %, mean over seeds and half of its 95 % interval
(Student's t), and the differences from 'stays', paired by seed. Result: docs/results/backward.md.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mbn_jax.core.moments import Moments
from mbn_jax.core.moving_average import BACKWARD_SUMS, zero_sums
from mbn_jax.core.transport import transport
from mbn_jax.parallel.devices import AXIS_NAME, replicate
from mbn_jax.step.forward import BoundApply, run_loss
from mbn_jax.step.state import TrainState
from mbn_jax.sweeps.summary import interval
from mbn_jax.training.config_files import parse_config, with_fields
from mbn_jax.training.passes import evaluate, recalibrate
from mbn_jax.training.program import Program, Programs
from mbn_jax.training.steps import BatchStack, build_train_step, next_batch

sys.path.append(str(Path(__file__).resolve().parents[1]))
from ceiling import FIELDS, tuned_settings

PyTree = Any

STAYS, OWN, SHARED, BOTH = "stays", "own shift", "shared shift", "shared, both"
NEXT = "shared, next batch"
MODES = (STAYS, OWN, SHARED, BOTH, NEXT)
SETTINGS = (
    "moving average 2, standardized",
    "moving average 2 with mean, plain",
)


def second_pass(task, hparams, params: PyTree, before: TrainState, batch) -> tuple[PyTree, PyTree]:
    """Returns statistics and backward sums of a batch under `params`, from the averages before."""
    apply_fn = task.model(hparams).apply

    def loss(sinks: PyTree):
        variables = {"params": params, "batch_stats": before.batch_stats, BACKWARD_SUMS: sinks}
        apply = BoundApply(apply_fn, variables, (), {}, records=False)
        value, (_, written) = run_loss(task.loss, apply, batch, frozen=False)
        return value, written["batch_stats"]

    sums, written = jax.grad(loss, has_aux=True)(zero_sums(before.batch_stats))
    return written, sums


def recorded_sums(batch_stats: PyTree, sums: PyTree) -> PyTree:
    """Returns the backward sums that all layers keep of their last batch, as a tree like `sums`."""
    if BACKWARD_SUMS in sums:
        return {BACKWARD_SUMS: batch_stats[BACKWARD_SUMS]}
    return {name: recorded_sums(batch_stats[name], inner) for name, inner in sums.items()}


def moved(kept: PyTree, again: PyTree, shifts: PyTree, mode: str, epsilon: float) -> PyTree:
    """Returns the averages of all layers after they have followed an update.

    Args:
      kept: `batch_stats` after the step.
      again: those that the second pass wrote.
      shifts: what the update changed in the backward sums of a batch.
      mode: one of `MODES`.
      epsilon: added to variances.
    """
    if BACKWARD_SUMS not in shifts:
        inner = {
            name: moved(kept[name], again[name], shifts[name], mode, epsilon) for name in shifts
        }
        return {**kept, **inner}
    # Of each group: [groups, 3, *F], where the last of the three counts and does not move.
    shift = shifts[BACKWARD_SUMS].at[:, 2].set(0)
    if mode != OWN:
        shift = jnp.broadcast_to(shift.mean(0), shift.shape)
    there = kept["backward"][:, :, 2:]
    new = {
        "backward": kept["backward"] + there * shift[:, None],
        BACKWARD_SUMS: kept[BACKWARD_SUMS] + shift,
    }
    if mode == BOTH:
        # The newest is that of the second pass itself; the earlier ones follow its shift.
        slots, newest = (_slots(x["forward"]) for x in (kept, again))
        pair = (jax.tree.map(lambda x: x[:, 0], side) for side in (slots, newest))
        first, second = (side._replace(count=jnp.full_like(side.count, 1e6)) for side in pair)
        follow = jax.vmap(functools.partial(transport, epsilon=epsilon))
        followed = follow(slots, first, second)
        new["forward"] = jnp.stack(followed, 2).at[:, 0].set(again["forward"][:, 0])
    return {**kept, **new}


def _slots(batches: jax.Array) -> Moments:
    """Returns `[groups, batches, 3, *F]` as slots."""
    return Moments(*jnp.moveaxis(batches, 2, 0))


def compiled_step(program: Program, mode: str) -> Callable:
    """Returns a step of (state, hparams, data, stack) that moves the averages as `mode` says."""
    task = program.task

    def one_step(state: TrainState, hparams, data, stack) -> TrainState:
        batch = next_batch(task, state, hparams, data, stack)
        new, _ = build_train_step(task, hparams)(state, batch)
        if mode == STAYS:
            return new
        seen = batch
        if mode == NEXT:
            seen = next_batch(task, state.replace(step=state.step + 1), hparams, data, stack)
        again, sums = second_pass(task, hparams, new.params, state, seen)
        before = recorded_sums(new.batch_stats, sums)
        if mode == NEXT:
            _, before = second_pass(task, hparams, state.params, state, seen)
        shifts = jax.tree.map(jnp.subtract, sums, before)
        epsilon = task.config.norm.epsilon
        return new.replace(batch_stats=moved(new.batch_stats, again, shifts, mode, epsilon))

    return jax.pmap(one_step, axis_name=AXIS_NAME, devices=program.devices, donate_argnums=0)


def test_error(config: ConfigDict, program: Program, step: Callable) -> float:
    """Trains one seed; returns its test error with recomputed statistics, %."""
    task = program.task
    state = replicate(program.init_state(config), program.devices)
    hparams, data = program.hparams(config), program.data(task.train)
    index = task.order(config.seed).steps(0, task.total_steps)
    stack = replicate(BatchStack(np.int32(0), index), program.devices)
    for _ in range(task.total_steps):
        state = step(state, hparams, data, stack)
    state = recalibrate(program, config, state, config.recalibrate_batches)
    return 100 * evaluate(program, config, state)["error"]


def row(name: str, errors: Mapping[str, list[float]]) -> str:
    """Returns a row of the table: the errors of each mode, and their differences from STAYS."""
    cells = []
    for mode, found in errors.items():
        cell = f"{np.mean(found):.1f} ± {interval(found):.1f}"
        if mode != STAYS and STAYS in errors:
            change = np.subtract(found, errors[STAYS])
            cell += f" ({np.mean(change):+.1f} ± {interval(change):.1f})"
        cells.append(cell)
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    """Prints a row for each setting, as it is done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a config file")
    parser.add_argument("--seeds", type=int, default=5, help="2 or more")
    parser.add_argument("--settings", nargs="+", default=SETTINGS, choices=SETTINGS)
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    args, overrides = parser.parse_known_args()
    config = with_fields(parse_config(args.config, overrides), FIELDS, "the sweep's fields")
    print(
        f"| setting | {' | '.join(args.modes)} |\n| --- |{' --- |' * len(args.modes)}", flush=True
    )
    for name in args.settings:
        chosen = with_fields(config, tuned_settings()[name], name)
        program = Programs(jax.devices()[:1]).get(chosen)
        errors: dict[str, list[float]] = {}
        for mode in args.modes:
            step = compiled_step(program, mode)
            for seed in range(args.seeds):
                chosen.seed = seed
                errors.setdefault(mode, []).append(test_error(chosen, program, step))
        print(row(name, errors), flush=True)


if __name__ == "__main__":
    main()
