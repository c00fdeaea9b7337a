"""What an update does to the statistics, and what the statistics in `batch_stats` tell."""

from typing import Any

import jax.numpy as jnp

from mbn_jax.core.moments import Array, Moments, abs_sq

PyTree = Any


def update_shift(before: Moments, after: Moments, var: Array, epsilon: float) -> dict[str, Array]:
    """Measures how far an update moved the statistics of one batch, averaged over features.

        mean = sqrt(E[|m' - m|^2 / s^2])    std = sqrt(E[(s_B' - s_B)^2 / s^2])
        kl = E[KL(N(m', v') || N(m, v))],    s^2 = var + epsilon, and epsilon added to v and v'

    Args:
      before: moments of the batch under the parameters before the update, `[*F]`.
      after: moments of the same batch under those after it, `[*F]`.
      var: `[*F]`, what the layer's standard deviations are measured in.
      epsilon: added to variances.

    Returns:
      'mean' and 'std', in standard deviations, and 'kl', in nats: what describing the batch by its
      statistics from before the update costs.

    >>> moments = Moments(jnp.array([0.0]), jnp.array([1.0]), jnp.array([8.0]))
    >>> moved = Moments(jnp.array([0.5]), jnp.array([1.0]), jnp.array([8.0]))
    >>> shift = update_shift(moments, moved, jnp.array([1.0]), 0.0)
    >>> {name: float(value) for name, value in shift.items()}
    {'mean': 0.5, 'std': 0.0, 'kl': 0.125}
    """
    v, v_after, unit = before.var + epsilon, after.var + epsilon, var + epsilon
    moved = abs_sq(after.mean - before.mean)
    kl = 0.5 * (jnp.log(v / v_after) + (v_after + moved) / v - 1)
    return {
        "mean": jnp.sqrt((moved / unit).mean()),
        "std": jnp.sqrt((jnp.square(jnp.sqrt(v_after) - jnp.sqrt(v)) / unit).mean()),
        "kl": kl.mean(),
    }


def statistics_error(
    mean: Array, var: Array, population: Moments, epsilon: float
) -> dict[str, Array]:
    """Measures the error of a layer's statistics against the population's, over its features.

        mean = sqrt(E[|mean - m|^2 / (v + epsilon)])
        log_variance = sqrt(E[log((var + epsilon) / (v + epsilon))^2])

    Args:
      mean: that the layer normalizes by at inference, `[*F]`.
      var: likewise.
      population: moments m, v of the layer's inputs over the population, `[*F]`.
      epsilon: added to variances.

    Returns:
      'mean', in the population's standard deviations, and 'log_variance'.

    >>> population = Moments(jnp.array([1.0]), jnp.array([4.0]), jnp.array([8.0]))
    >>> error = statistics_error(jnp.array([2.0]), jnp.array([4.0]), population, 0.0)
    >>> {name: float(value) for name, value in error.items()}
    {'mean': 0.5, 'log_variance': 0.0}
    """
    v = population.var + epsilon
    return {
        "mean": jnp.sqrt((abs_sq(mean - population.mean) / v).mean()),
        "log_variance": jnp.sqrt(jnp.square(jnp.log((var + epsilon) / v)).mean()),
    }
