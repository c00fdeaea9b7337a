"""What a training step costs with each norm and each second forward, against flax's BatchNorm.

    python experiments/scripts/step_cost.py --workdir=runs/step_cost

Prints a table for each dtype and batch size, and saves them to `step_cost.md`, and all numbers to
`step_cost.jsonl`. FLOPs, bytes accessed and peak temporary memory are the compiler's counts, as
ratios to the first row, and so is the time that it took to compile. `kept` is what the backward
pass needs of the forward, before the compiler shares and recomputes. The step time is measured in
rounds that run every step once, in turn: the median of its ratio to the first row's of the same
round, and the quartiles. `host` is the host time of a step, until the call returns. The last row
repeats the first: it shows the noise.

On a CPU pin the process to a core (taskset -c 0): it is steadier, and hardly slower. With
`--tpu=v5e:2x2` the steps are compiled for a TPU, without needing one, and not run; it needs libtpu
(`pip install '.[train,tpu]'`). `--torch` runs PyTorch's step too, if it is installed. Result:
docs/results/cost.md.
"""

import argparse
import dataclasses
import functools
import importlib
import itertools
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from topologies import topology_devices

from mbn_jax import BatchRenorm, MemorizedBatchNorm, TrainState, make_train_step
from mbn_jax.datasets.split import Examples
from mbn_jax.models import MODELS
from mbn_jax.training.losses import CrossEntropy
from mbn_jax.training.program import QUICKLY

CLASSES = 10


def second_forward(mode: str, fraction: float = 1.0) -> Callable:
    """Returns what makes a step with this second forward."""
    return functools.partial(make_train_step, double_forward=mode, double_forward_fraction=fraction)


plain_step = second_forward("off")


@dataclasses.dataclass(frozen=True)
class Case:
    """A training step.

    Attributes:
      norm: makes the layers.
      step: makes the step from `apply`, optimizer and loss.
      remat: whether the network keeps convolutions alone.
    """

    norm: Callable[..., nn.Module] = MemorizedBatchNorm
    step: Callable[..., Callable] = plain_step
    remat: bool = False


def group_norm(use_running_average: bool, **options) -> nn.Module:
    """Returns GroupNorm, which has no statistics to be told of."""
    return nn.GroupNorm(num_groups=8, **options)


def flax_example_step(apply_fn: Callable, tx: optax.GradientTransformation, _) -> Callable:
    """Returns a step as in flax's ImageNet example, with weight decay in the loss."""

    def train_step(state: TrainState, batch: Examples) -> tuple[TrainState, dict]:
        def loss_fn(params):
            logits, updates = apply_fn(
                {"params": params, "batch_stats": state.batch_stats},
                batch["image"],
                train=True,
                mutable=["batch_stats"],
            )
            labels = jax.nn.one_hot(batch["label"], CLASSES)
            loss = optax.softmax_cross_entropy(logits, labels).mean()
            decayed = (jnp.sum(x**2) for x in jax.tree.leaves(params) if x.ndim > 1)
            return loss + 1e-4 * 0.5 * sum(decayed), (logits, updates)

        (_, (logits, updates)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        deltas, opt_state = tx.update(grads, state.opt_state, state.params)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
        accuracy = jnp.mean(logits.argmax(-1) == batch["label"])
        state = state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, deltas),
            batch_stats=updates["batch_stats"],
            opt_state=opt_state,
        )
        return state, {"loss": loss, "accuracy": accuracy}

    return train_step


BASE = "batch"
CASES = {
    BASE: Case(nn.BatchNorm),
    "batch, step of flax's example": Case(nn.BatchNorm, flax_example_step),
    "batch renorm": Case(functools.partial(BatchRenorm, r_max=3.0, d_max=5.0)),
    "group": Case(group_norm),
    **{
        f"memorized, {k}": Case(functools.partial(MemorizedBatchNorm, memory_size=k))
        for k in (1, 8, 64, 128, 256)
    },
    "memorized, two passes": Case(functools.partial(MemorizedBatchNorm, use_fast_variance=False)),
    "memorized, rewrite": Case(step=second_forward("rewrite")),
    "memorized, transport": Case(step=second_forward("transport")),
    "memorized, rewrite by 1/4": Case(step=second_forward("rewrite", 0.25)),
    "memorized, transport by 1/4": Case(step=second_forward("transport", 0.25)),
    "batch, remat": Case(nn.BatchNorm, remat=True),
    "memorized, remat": Case(remat=True),
    "memorized, remat, rewrite": Case(step=second_forward("rewrite"), remat=True),
    "batch, again": Case(nn.BatchNorm),
}


class Step:
    """A compiled step, and a state of its own where it is to be run.

    Attributes:
      counts: what the compiler says, and 'compile', its seconds.
    """

    def __init__(
        self,
        case: Case,
        *,
        model: str,
        batch_size: int,
        image_size: int,
        dtype: str,
        device: Any = None,
    ):
        """Compiles it; for `device`, a description, without a state."""
        network = MODELS[model](
            num_classes=CLASSES,
            norm=functools.partial(case.norm, dtype=jnp.dtype(dtype)),
            dtype=jnp.dtype(dtype),
            remat=case.remat,
        )
        tx = optax.sgd(1e-3, momentum=0.9)

        def initial_state() -> TrainState:
            images = jnp.zeros((1, image_size, image_size, 3))
            variables = network.init(jax.random.key(0), images, train=False)
            return TrainState.create(variables, tx, jax.random.key(1))

        images = np.random.default_rng(0).normal(size=(batch_size, image_size, image_size, 3))
        batch = {"image": np.float32(images), "label": np.arange(batch_size, dtype=np.int32) % 10}
        step = case.step(network.apply, tx, CrossEntropy())
        state = jax.eval_shape(initial_state)
        kept = kept_bytes(network, state, batch)
        if device is not None:
            sharding = jax.sharding.SingleDeviceSharding(device)

            def on_device(x) -> jax.ShapeDtypeStruct:
                return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

            state, batch = jax.tree.map(on_device, (state, batch))
        begin = time.perf_counter()
        self._step = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
        seconds = time.perf_counter() - begin
        cost = self._step.cost_analysis()
        self.counts = {
            "FLOPs": cost["flops"],
            "bytes": cost["bytes accessed"],
            "memory": self._step.memory_analysis().temp_size_in_bytes,
            "kept": kept,
            "compile": seconds,
        }
        if device is None:
            on_cpu = jax.default_backend() == "cpu"
            initial = jax.jit(initial_state, compiler_options=QUICKLY if on_cpu else None)
            self._state, self._batch = initial(), jax.device_put(batch)

    def seconds(self, clock: Callable[[], float]) -> tuple[float, float]:
        """Takes a step; returns its time, and how long the call took of it."""
        begin = clock()
        self._state, _ = self._step(self._state, self._batch)
        host = clock() - begin
        jax.block_until_ready(self._state)
        return clock() - begin, host


def kept_bytes(network: nn.Module, state: TrainState, batch: Examples) -> int:
    """Returns the bytes of feature maps that the backward pass needs, as the program is written."""

    def backward(params, batch_stats, batch):
        def loss(params):
            variables = {"params": params, "batch_stats": batch_stats}
            apply = functools.partial(network.apply, variables, mutable=["batch_stats"])
            return CrossEntropy()(apply, batch)

        return jax.vjp(loss, params, has_aux=True)[1]

    kept = jax.eval_shape(backward, state.params, state.batch_stats, batch)
    examples = len(batch["label"])
    maps = (x for x in jax.tree.leaves(kept) if x.ndim > 2 and x.shape[0] == examples)
    return sum(x.size * x.dtype.itemsize for x in maps)


class TorchStep:
    """PyTorch's step with its BatchNorm and the network of `--model=cifar_resnet20`."""

    counts = dict.fromkeys(("FLOPs", "bytes", "memory", "kept", "compile"), float("nan"))

    def __init__(self, batch_size: int, image_size: int):
        """Builds the network."""
        torch = importlib.import_module("torch")
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        layers, functional = torch.nn, torch.nn.functional

        class Block(layers.Module):
            def __init__(self, before: int, features: int):
                super().__init__()
                self.stride = 1 if before == features else 2
                self.conv1 = layers.Conv2d(before, features, 3, self.stride, 1, bias=False)
                self.norm1 = layers.BatchNorm2d(features)
                self.conv2 = layers.Conv2d(features, features, 3, 1, 1, bias=False)
                self.norm2 = layers.BatchNorm2d(features)
                self.added = features - before

            def forward(self, x):
                y = functional.relu(self.norm1(self.conv1(x)))
                y = self.norm2(self.conv2(y))
                if self.added:
                    x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.added))
                return functional.relu(x + y)

        widths = [16, *[width for width in (16, 32, 64) for _ in range(3)]]
        self._network = layers.Sequential(
            layers.Conv2d(3, 16, 3, 1, 1, bias=False),
            layers.BatchNorm2d(16),
            layers.ReLU(),
            *[Block(*pair) for pair in itertools.pairwise(widths)],
            layers.AdaptiveAvgPool2d(1),
            layers.Flatten(),
            layers.Linear(64, CLASSES),
        )
        self._optimizer = torch.optim.SGD(self._network.parameters(), 1e-3, momentum=0.9)
        self._loss = functional.cross_entropy
        images = np.random.default_rng(0).normal(size=(batch_size, 3, image_size, image_size))
        self._images = torch.tensor(images.tolist())
        self._labels = torch.arange(batch_size) % CLASSES

    def seconds(self, clock: Callable[[], float]) -> tuple[float, float]:
        """Takes a step; returns its time, twice: the call returns when it is done."""
        begin = clock()
        self._optimizer.zero_grad()
        self._loss(self._network(self._images), self._labels).backward()
        self._optimizer.step()
        taken = clock() - begin
        return taken, taken


def measure(
    steps: dict[str, Any], rounds: int, clock: Callable[[], float]
) -> dict[str, np.ndarray]:
    """Returns the times of every step, `[rounds, 2]`: of the step, and of the call."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name, step in steps.items():
            taken = step.seconds(clock)
            if number >= 2:  # The first fill caches.
                times[name].append(taken)
    return {name: np.array(taken) for name, taken in times.items()}


def rows(
    steps: dict[str, Any], rounds: int, batch_size: int, clock: Callable[[], float]
) -> list[dict[str, Any]]:
    """Measures, and returns a row for every step."""
    times = measure(steps, rounds, clock) if rounds else {}
    base = steps[BASE].counts
    found = []
    for name, step in steps.items():
        row: dict[str, Any] = {"step": name}
        row |= {key: value / base[key] for key, value in step.counts.items()}
        row |= {f"absolute {key}": value for key, value in step.counts.items()}
        if times:
            ratios = times[name][:, 0] / times[BASE][:, 0]
            row["quartiles"], row["time"], row["upper quartile"] = np.quantile(
                ratios, (0.25, 0.5, 0.75)
            )
            seconds, host = np.median(times[name], axis=0)
            row |= {"seconds": seconds, "images/s": batch_size / seconds, "host ms": host * 1e3}
        found.append(row)
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Returns the rows as Markdown."""
    columns = {"FLOPs": ".3f", "bytes": ".3f", "memory": ".3f", "kept": ".3f", "compile": ".2f"}
    if "time" in found[0]:
        columns |= {"time": ".3f", "quartiles": ".3f", "images/s": ".0f", "host ms": ".2f"}
    lines = [f"| step | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    for row in found:
        cells = {key: format(row[key], form) for key, form in columns.items()}
        if "quartiles" in cells:
            cells["quartiles"] += f" to {row['upper quartile']:.3f}"
        cells = {key: "" if "nan" in cell else cell for key, cell in cells.items()}
        lines.append(f"| {row['step']} | {' | '.join(cells.values())} |")
    return "\n".join(lines)


def main() -> None:
    """Prints and saves a table for each network, dtype and batch size, as it is done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="cifar_resnet20", choices=sorted(MODELS))
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--dtypes", nargs="+", default=("float32",))
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=(2, 8, 32, 128))
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=30, help="0: counts alone")
    parser.add_argument(
        "--processor_time",
        action="store_true",
        help="count the time of this process alone: on a CPU that others use, pinned to one core",
    )
    parser.add_argument("--tpu", metavar="TOPOLOGY", help="compile for it; for example v5e:2x2")
    parser.add_argument("--torch", action="store_true", help="PyTorch's step too")
    parser.add_argument("--workdir", type=pathlib.Path, help="where to save the tables")
    args = parser.parse_args()
    if BASE not in args.cases:
        parser.error(f"--cases needs {BASE!r}, to which the others are ratios")
    try:
        device = topology_devices(args.tpu)[0] if args.tpu else None
    except ValueError as error:
        parser.error(str(error))
    name = device.device_kind if args.tpu else jax.devices()[0].device_kind
    rounds = 0 if args.tpu else args.rounds
    clock = time.process_time if args.processor_time else time.perf_counter
    jax.config.update("jax_enable_compilation_cache", False)  # Its time is measured too.
    Step(CASES[BASE], model="convnet", batch_size=8, image_size=8, dtype="float32", device=device)
    for dtype in args.dtypes:
        for size in args.batch_sizes:
            make = functools.partial(
                Step,
                model=args.model,
                batch_size=size,
                image_size=args.image_size,
                dtype=dtype,
                device=device,
            )
            steps: dict[str, Any] = {
                case: make(CASES[case]) for case in args.cases if "1/4" not in case or size % 4 == 0
            }
            if args.torch:
                steps["PyTorch, batch"] = TorchStep(size, args.image_size)
            found = rows(steps, rounds, size, clock)
            title = f"{args.model}, {dtype}, batch size {size}, {args.image_size} pixels, {name}"
            print(f"\n{title}\n\n{table(found)}", flush=True)
            if args.workdir:
                save(args.workdir, title, found)


def save(workdir: pathlib.Path, title: str, found: list[dict[str, Any]]) -> None:
    """Adds a table to those of the folder."""
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "step_cost.md").open("a") as file:
        file.write(f"\n{title}\n\n{table(found)}\n")
    with (workdir / "step_cost.jsonl").open("a") as file:
        file.writelines(json.dumps({"table": title, **row}) + "\n" for row in found)


if __name__ == "__main__":
    main()
