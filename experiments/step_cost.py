"""What a training step costs with each norm and each second forward, against flax's BatchNorm.

    python experiments/step_cost.py

FLOPs, bytes accessed and peak temporary memory are the compiler's counts, as ratios. The step time
is measured in rounds that take every step once, in turn: the median of its ratio to BatchNorm's
step of the same round, and the quartiles. The last row is BatchNorm once more: what noise alone
makes. On a CPU pin the process to a core (taskset -c 0): it is steadier, and hardly slower.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mbn_jax import BatchRenorm, MemorizedBatchNorm, TrainState, make_train_step
from mbn_jax.experiment import classification_loss
from mbn_jax.models import MODELS


@dataclasses.dataclass(frozen=True)
class Case:
    """A training step.

    Attributes:
      norm: makes the layers.
      options: of `make_train_step`.
    """

    norm: Callable[..., nn.Module]
    options: dict[str, Any] = dataclasses.field(default_factory=lambda: {"double_forward": "off"})


def group_norm(use_running_average: bool, **options) -> nn.Module:
    """Returns GroupNorm, which has no statistics to be told of."""
    return nn.GroupNorm(num_groups=8, **options)


QUARTER = {"double_forward_fraction": 0.25}
BASE = "batch"
CASES = {
    BASE: Case(nn.BatchNorm),
    "batch_renorm": Case(functools.partial(BatchRenorm, r_max=3.0, d_max=5.0)),
    "group": Case(group_norm),
    **{
        f"memorized, {k} batches": Case(functools.partial(MemorizedBatchNorm, memory_size=k))
        for k in (1, 8, 64, 256)
    },
    "memorized, rewrite": Case(MemorizedBatchNorm, {"double_forward": "rewrite"}),
    "memorized, transport": Case(MemorizedBatchNorm, {"double_forward": "transport"}),
    "memorized, rewrite of 1/4": Case(MemorizedBatchNorm, {"double_forward": "rewrite", **QUARTER}),
    "memorized, transport of 1/4": Case(
        MemorizedBatchNorm, {"double_forward": "transport", **QUARTER}
    ),
    "batch, again": Case(nn.BatchNorm),
}


class Step:
    """A compiled step with a state of its own."""

    def __init__(self, case: Case, model: str, batch_size: int, image_size: int, dtype: str):
        """Compiles it."""
        dtype = jnp.dtype(dtype)
        network = MODELS[model](
            num_classes=10, norm=functools.partial(case.norm, dtype=dtype), dtype=dtype
        )
        rng = np.random.default_rng(0)
        images = rng.normal(size=(batch_size, image_size, image_size, 3))
        self._batch = {
            "image": jnp.asarray(images, jnp.float32),
            "label": jnp.arange(batch_size) % 10,
        }
        tx = optax.sgd(1e-3, momentum=0.9)
        variables = network.init(jax.random.key(0), self._batch["image"][:1], train=False)
        self._state = TrainState.create(variables, tx, jax.random.key(1))
        step = make_train_step(network.apply, tx, classification_loss, **case.options)
        begin = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=0).lower(self._state, self._batch)
        self._step = lowered.compile()
        compile_seconds = time.perf_counter() - begin
        cost = self._step.cost_analysis()
        self.counts = {
            "FLOPs": cost["flops"],
            "bytes": cost["bytes accessed"],
            "memory": self._step.memory_analysis().temp_size_in_bytes,
            "compile": compile_seconds,
        }

    def seconds(self) -> float:
        """Takes a step; returns its time."""
        begin = time.perf_counter()
        self._state, _ = self._step(self._state, self._batch)
        jax.block_until_ready(self._state)
        return time.perf_counter() - begin


def table(steps: dict[str, Step], rounds: int, batch_size: int) -> str:
    """Measures, and returns a table in Markdown."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name, step in steps.items():
            taken = step.seconds()
            if number >= 2:  # The first fill caches.
                seconds[name].append(taken)
    base = steps[BASE].counts
    rows = [
        "| step | FLOPs | bytes | memory | compile | time | quartiles | images/s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, step in steps.items():
        cells = [f"{step.counts[key] / base[key]:.3f}" for key in ("FLOPs", "bytes", "memory")]
        cells.append(f"{step.counts['compile'] / base['compile']:.2f}")
        if rounds:
            ratios = np.divide(seconds[name], seconds[BASE])
            low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75))
            cells += [f"{median:.3f}", f"{low:.3f} to {high:.3f}"]
            cells.append(f"{batch_size / np.median(seconds[name]):.0f}")
        else:
            cells += ["", "", ""]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    """Prints a table for each batch size, as it is done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="cifar_resnet20", choices=sorted(MODELS))
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=(2, 8, 32, 128))
    parser.add_argument("--rounds", type=int, default=30, help="0: counts alone")
    args = parser.parse_args()
    device = jax.devices()[0].device_kind
    jax.config.update("jax_enable_compilation_cache", False)  # Its time is measured too.
    Step(CASES[BASE], "convnet", 8, 8, args.dtype)  # The first compilation starts the compiler.
    for batch_size in args.batch_sizes:
        steps = {
            name: Step(case, args.model, batch_size, args.image_size, args.dtype)
            for name, case in CASES.items()
            if batch_size * case.options.get("double_forward_fraction", 1) % 1 == 0
        }
        print(f"\n{args.model}, {args.dtype}, batch size {batch_size}, {device}\n")
        print(table(steps, args.rounds, batch_size), flush=True)


if __name__ == "__main__":
    main()
