"""One pass or two over a batch's data: how exact the moments are.

    python experiments/scripts/moments.py

Prints a table: relative error of the variance of 4,096 float32 values at a distance of |mean| / std
from zero, against float64 NumPy, the largest over 256 channels and 5 seeds. What either costs:
`experiments/scripts/step_cost.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mbn_jax.core.moments import batch_moments

SEEDS = 5
WAYS = {
    "one pass around 0 (flax's fast variance)": lambda x, mean, std: batch_moments(x, (0,)),
    "one pass around a memory's mean, 1 std off": lambda x, mean, std: batch_moments(
        x, (0,), center=mean + std
    ),
    "one pass around a memory's mean, 10 std off": lambda x, mean, std: batch_moments(
        x, (0,), center=mean + 10 * std
    ),
    "two passes": lambda x, mean, std: batch_moments(x, (0,), use_fast_variance=False),
}
DISTANCES = (0, 10, 100, 1000)


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


def main() -> None:
    """Prints the table as Markdown."""
    print(f"| variance error at abs(mean)/std = | {' | '.join(map(str, DISTANCES))} |")
    print("| --- |" + " --- |" * len(DISTANCES))
    for name, way in WAYS.items():
        errors = " | ".join(f"{variance_error(way, distance):.0e}" for distance in DISTANCES)
        print(f"| {name} | {errors} |")


if __name__ == "__main__":
    main()
