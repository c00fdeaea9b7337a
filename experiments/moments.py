"""One pass or two over a batch's data: how exact the moments are, and what a step costs.

    python experiments/moments.py

Prints two tables. The first: relative error of the variance of 4,096 float32 values at a distance
of |mean| / std from zero, against float64 NumPy, the largest over 256 channels and 5 seeds. The
second: FLOPs and bytes accessed of the compiled training step (ConvNet with 64 channels, 128 images
of 32x32, no double forward), as a ratio to the same step with `flax.linen.BatchNorm`.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mbn_jax import MemorizedBatchNorm, TrainState, make_train_step
from mbn_jax.experiment import classification_loss
from mbn_jax.models.convnet import ConvNet
from mbn_jax.statistics import batch_moments, first_element

SEEDS = 5
WAYS = {
    "one pass around 0 (flax's fast variance)": lambda x, mean, std: batch_moments(x, (0,)),
    "one pass around the first element": lambda x, mean, std: batch_moments(
        x, (0,), center=first_element(x, (0,))
    ),
    "one pass around a memory's mean, 1 std off": lambda x, mean, std: batch_moments(
        x, (0,), center=mean + std
    ),
    "one pass around a memory's mean, 10 std off": lambda x, mean, std: batch_moments(
        x, (0,), center=mean + 10 * std
    ),
    "two passes": lambda x, mean, std: batch_moments(x, (0,), use_fast_variance=False),
}
DISTANCES = (0, 10, 100, 1000)
NORMS = {
    "flax BatchNorm": nn.BatchNorm,
    "flax BatchNorm, two passes": functools.partial(nn.BatchNorm, use_fast_variance=False),
    "MemorizedBatchNorm": MemorizedBatchNorm,
    "MemorizedBatchNorm, two passes": functools.partial(
        MemorizedBatchNorm, use_fast_variance=False
    ),
}


def variance_error(way, distance: float) -> float:
    """Returns the largest relative error of the variance, against float64."""
    errors = []
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        x = (rng.normal(size=(4096, 256)) + distance).astype(np.float32)
        exact = np.float64(x).var(0)
        found = jax.jit(way)(jnp.asarray(x), jnp.float32(distance), jnp.float32(1))
        errors.append(np.abs(np.float64(found.var) / exact - 1).max())
    return max(errors)


def step_cost(norm) -> dict[str, float]:
    """Returns the compiler's counts for one training step."""
    model = ConvNet(num_classes=10, norm=norm, features=(64, 64, 64, 64))
    tx = optax.sgd(0.1, momentum=0.9)
    batch = {"image": jnp.zeros((128, 32, 32, 3)), "label": jnp.zeros(128, jnp.int32)}

    variables = model.init(jax.random.key(0), batch["image"], train=False)
    state = TrainState.create(variables, tx, jax.random.key(1))
    step = make_train_step(model.apply, tx, classification_loss, double_forward="off")
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    cost = compiled.cost_analysis()
    return {"flops": cost["flops"], "bytes": cost["bytes accessed"]}


def main() -> None:
    """Prints both tables as Markdown."""
    print(f"| variance error at abs(mean)/std = | {' | '.join(map(str, DISTANCES))} |")
    print("| --- |" + " --- |" * len(DISTANCES))
    for name, way in WAYS.items():
        errors = " | ".join(f"{variance_error(way, distance):.0e}" for distance in DISTANCES)
        print(f"| {name} | {errors} |")
    costs = {name: step_cost(norm) for name, norm in NORMS.items()}
    base = costs["flax BatchNorm"]
    print("\n| step with | FLOPs | bytes accessed |\n| --- | --- | --- |")
    for name, cost in costs.items():
        print(f"| {name} | {' | '.join(f'{cost[k] / base[k]:.3f}' for k in base)} |")


if __name__ == "__main__":
    main()
