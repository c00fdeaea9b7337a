"""How the error of a transported slot grows with its age, and what would limit it.

    python experiments/scripts/transport_growth.py --config=configs/cifar.py:short \
        --config.dataset.data_dir=WHERE_CIFAR10_IS

Three times in a run, it takes the statistics of the last batches in every norm layer, lets the
updates move them step by step, and compares them with those of the same batches in the current
network. The difference is the error of the moving, without sampling noise. (After the first norm,
inputs also drift because batches enter and leave the memories of earlier layers; no update causes
that, and no shift measures it.) A table for each batch size, with mean and 95 % interval over seeds
of the root mean square over batches and channels, averaged over layers and the three times.

* stays: not moved, as in 'off' and 'rewrite'
* moved: by the shift of the training batch, scale and offset, as in 'transport'
* moved by half of that; moved by the offset alone
* moved by the next batch: its forward before the update against its training forward after it. That
  batch was not fitted yet, and costs one more forward too

The best factor for the sum of all shifts fits it to the true displacement: below 1 if the shifts
overshoot. Result: docs/results/transport_growth.md.
"""

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict
from scipy import stats

from mbn_jax.core.double_forward import BATCH_MOMENTS, FIRST_BATCH_MOMENTS, RECORDS
from mbn_jax.core.moments import Moments
from mbn_jax.core.transport import transport
from mbn_jax.parallel.devices import AXIS_NAME, first_device, replicate
from mbn_jax.training.config_files import parse_config
from mbn_jax.training.program import Program, Programs
from mbn_jax.training.shift import statistics_error
from mbn_jax.training.steps import BatchStack, build_train_step, next_batch

AGES = (1, 4, 16, 64, 256)
STARTS = (300, 700, 1100)  # Steps.
LAST_BATCHES = 8
BATCH_SIZES = (2, 8, 32)
RATE_PER_EXAMPLE = 0.005
STAYS, MOVED = "stays", "moved"


def halfway(before: Moments, after: Moments) -> Moments:
    """Returns the moments of half a shift."""
    return after._replace(mean=(before.mean + after.mean) / 2, var=jnp.sqrt(before.var * after.var))


RULES: dict[str, Callable] = {
    STAYS: lambda own, upcoming: None,
    MOVED: lambda own, upcoming: own,
    "moved by half": lambda own, upcoming: (own[0], halfway(*own)),
    "moved by the offset alone": lambda own, upcoming: (own[0], own[1]._replace(var=own[0].var)),
    "moved by the next batch": lambda own, upcoming: upcoming,
}
"""What the slots move by: moments before and after, of the shifts of two batches."""


class Observer:
    """The functions of a device that train, and watch batches of the past."""

    def __init__(self, program: Program):
        """Compiles nothing yet."""
        self._task = program.task
        options = {"axis_name": AXIS_NAME, "devices": program.devices}
        self.train = jax.pmap(self._train, **options)
        self.observe = jax.pmap(self._observe, **options)
        self.look = jax.pmap(self._look, **options)

    def _moments(self, values, params, batch_stats, batch, **collections):
        """Returns what a forward in training records, the inputs' moments by layer."""
        variables = {"params": params, "batch_stats": batch_stats, **collections}
        mutable = ["batch_stats", BATCH_MOMENTS]
        model = self._task.model(values)
        return model.apply(variables, batch["image"], train=True, mutable=mutable)[1][BATCH_MOMENTS]

    def _batch(self, values, state, data, block, later):
        state = state.replace(step=state.step + later)
        return next_batch(self._task, state, values, data, block)

    def _train(self, state, values, data, block):
        batch = self._batch(values, state, data, block, 0)
        return build_train_step(self._task, values)(state, batch)[0]

    def _look(self, state, values, data, block, age):
        """Returns moments of the batches before the last `age`, by layer `[batches, *F]`."""

        def at(step):
            batch = self._batch(values, state.replace(step=step), data, block, 0)
            return _by_layer(self._moments(values, state.params, state.batch_stats, batch))

        return jax.vmap(at)(state.step - age - 1 - jnp.arange(LAST_BATCHES))

    def _observe(self, state, values, data, block, slots):
        """Trains one step, and moves the slots by every rule."""
        batch, upcoming = (self._batch(values, state, data, block, later) for later in (0, 1))
        first = self._moments(values, state.params, state.batch_stats, batch)
        before = self._moments(values, state.params, state.batch_stats, upcoming)
        new, _ = build_train_step(self._task, values)(state, batch)
        second = self._moments(
            values, new.params, state.batch_stats, batch, **{FIRST_BATCH_MOMENTS: first}
        )
        after = self._moments(values, new.params, new.batch_stats, upcoming)
        recorded = [_by_layer(x) for x in (first, second, before, after)]
        epsilon = self._task.config.norm.epsilon
        moved = {}
        for name, rule in RULES.items():
            moved[name] = {}
            for layer in recorded[0]:
                first, second, before, after = (moments[layer] for moments in recorded)
                shift = rule((first, second), (before, after))
                kept = slots[name][layer]
                moved[name][layer] = transport(kept, *shift, epsilon) if shift else kept
        return new, moved


def _by_layer(recorded) -> dict[str, Moments]:
    """Returns what layers that are called once have recorded."""
    calls = traverse_util.flatten_dict(recorded, sep="/")
    records = {path: call for path, (call,) in calls.items() if path.endswith(f"/{RECORDS}")}
    return {path: record.batch for path, record in records.items()}


def factor(start: Moments, moved: Moments, now: Moments, epsilon: float) -> np.ndarray:
    """Returns the sums (moved x real, moved x moved) of a layer's displacements of the means."""
    unit = np.sqrt(now.var + epsilon)
    real, predicted = (now.mean - start.mean) / unit, (moved.mean - start.mean) / unit
    return np.array([np.sum(real * predicted), np.sum(predicted * predicted)])


def run(
    config: ConfigDict, program: Program, observer: Observer
) -> dict[tuple[str, str, int], float]:
    """Returns the errors of one seed, by (what, rule, age)."""
    devices, task, epsilon = program.devices, program.task, config.norm.epsilon
    values = program.hparams(config)
    state = replicate(program.init_state(config), devices)
    data = program.data(task.train)
    last = max(STARTS) + max(AGES) + 2
    index = task.order(config.seed).steps(0, last)

    block = replicate(BatchStack(np.int32(0), index), devices)
    ages = {age: replicate(np.int32(age), devices) for age in (0, *AGES)}
    found: dict[tuple[str, str, int], list[float]] = {}
    sums: dict[int, list[np.ndarray]] = {age: [] for age in AGES}
    step = 0
    for begin in STARTS:
        while step < begin:
            state, step = observer.train(state, values, data, block), step + 1
        start = observer.look(state, values, data, block, ages[0])
        slots = dict.fromkeys(RULES, start)
        for age in range(1, max(AGES) + 1):
            state, slots = observer.observe(state, values, data, block, slots)
            step += 1
            if age not in AGES:
                continue
            now = jax.device_get(first_device(observer.look(state, values, data, block, ages[age])))
            host = jax.device_get(first_device(slots))
            for name, layers in host.items():
                errors = [
                    statistics_error(m.mean, m.var, now[layer], epsilon)
                    for layer, m in layers.items()
                ]
                for what in errors[0]:
                    mean = float(np.mean([error[what] for error in errors]))
                    found.setdefault((what, name, age), []).append(mean)
            at_start = jax.device_get(first_device(start))
            sums[age] += [factor(at_start[x], host[MOVED][x], now[x], epsilon) for x in now]
    result = {key: float(np.mean(x)) for key, x in found.items()}
    for age, parts in sums.items():
        product, square = np.sum(parts, 0)
        result["factor", MOVED, age] = float(product / square)
    return result


def table(results: list[dict[tuple[str, str, int], float]]) -> str:
    """Returns the table of all seeds, in Markdown."""
    rows = [
        f"| | {' | '.join(f'{age} updates' for age in AGES)} |",
        "| --- |" + " --- |" * len(AGES),
    ]
    titles = {"mean": "mean, std", "log_variance": "log variance", "factor": "best factor, mean"}
    quantile = stats.t.ppf(0.975, len(results) - 1) / np.sqrt(len(results))
    for what, title in titles.items():
        for name in RULES:
            if (what, name, AGES[0]) not in results[0]:
                continue
            cells = []
            for age in AGES:
                x = [result[what, name, age] for result in results]
                cells.append(f"{np.mean(x):.3f} ± {quantile * np.std(x, ddof=1):.3f}")
            rows.append(f"| {title}: {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    """Prints a table for each batch size, as it is done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a config file")
    parser.add_argument("--seeds", type=int, default=5, help="2 or more")
    args, overrides = parser.parse_known_args()
    for size in BATCH_SIZES:
        config = parse_config(args.config, overrides)
        config.batch_size = size
        config.optimizer.learning_rate = RATE_PER_EXAMPLE * size
        config.double_forward = "transport"
        program = Programs(jax.devices()[:1]).get(config)
        observer = Observer(program)
        results = []
        for seed in range(args.seeds):
            config.seed = seed
            results.append(run(config, program, observer))
        print(f"\nBatch size {size}\n\n{table(results)}", flush=True)


if __name__ == "__main__":
    main()
