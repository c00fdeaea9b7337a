"""What the statistics in `batch_stats` tell about a run."""

from typing import Any

import jax
import jax.numpy as jnp

from mbn_jax.statistics import Moments, abs_sq, memory_weights, pool

PyTree = Any


def memory_distance(batch_stats: PyTree, memory_size: int, decay: float) -> dict[str, jax.Array]:
    """Measures, layer by layer, how far the memory is from the newest batch.

        distance = sqrt(E[|mean - m_0|^2 / var]),    the average over a layer's features,

    with the pooled mean and variance and the newest slot's mean m_0: in standard deviations. 0 at
    memory size 1.

    Args:
      batch_stats: of one device.
      memory_size: of the layers.
      decay: of the layers.

    Returns:
      A scalar for each `MemorizedBatchNorm`, by its path; empty where there are none.

    >>> ones = jnp.ones((2, 1))
    >>> stats = {'norm': {'mean': jnp.array([[2.0], [0.0]]), 'var': ones, 'count': ones}}
    >>> {k: round(float(v), 4) for k, v in memory_distance(stats, 2, 1.0).items()}
    {'norm': 0.7071}
    """
    distances = {}

    def visit(path: tuple[str, ...], tree: PyTree) -> None:
        if set(tree) == {"mean", "var", "count"}:
            slots = Moments(tree["mean"], tree["var"], tree["count"])
            mean, var = pool(slots, memory_weights(slots.count, memory_size, decay))
            square = abs_sq(mean - slots.mean[0]) / jnp.maximum(var, jnp.finfo(var.dtype).tiny)
            distances["/".join(path)] = jnp.sqrt(square.mean())
            return
        for name, child in tree.items():
            if isinstance(child, dict):
                visit((*path, name), child)

    visit((), batch_stats)
    return distances
