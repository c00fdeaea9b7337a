"""What an update does to the statistics, and what the statistics in `batch_stats` tell."""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mbn_jax.statistics import Array, Moments, abs_sq, memory_weights, pool

PyTree = Any


def inference_statistics(layer_stats: PyTree, memory_size, decay) -> tuple[Array, Array]:
    """Returns (mean, var) that one layer normalizes by at inference.

    Args:
      layer_stats: what the layer keeps in `batch_stats`: a memory, or moving averages.
      memory_size: of a memory.
      decay: of a memory.
    """
    mean, var = layer_stats["mean"], layer_stats["var"]
    if "count" not in layer_stats:
        return mean, var
    slots = Moments(mean, var, layer_stats["count"])
    return pool(slots, memory_weights(slots.count, memory_size, decay))


def layers_with_statistics(batch_stats: PyTree) -> dict[str, PyTree]:
    """Returns what each layer keeps in `batch_stats`, by the layer's path.

    >>> list(layers_with_statistics({'block': {'norm': {'mean': 0, 'var': 1}}}))
    ['block/norm']
    """
    layers: dict[str, PyTree] = {}

    def visit(path: tuple[str, ...], tree: PyTree) -> None:
        if {"mean", "var"} <= set(tree) and not isinstance(tree["mean"], dict):
            layers["/".join(path)] = tree
            return
        for name, child in tree.items():
            if isinstance(child, dict):
                visit((*path, name), child)

    visit((), batch_stats)
    return layers


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
    for path, stats in layers_with_statistics(batch_stats).items():
        if "count" in stats:
            mean, var = inference_statistics(stats, memory_size, decay)
            square = abs_sq(mean - stats["mean"][0]) / jnp.maximum(var, jnp.finfo(var.dtype).tiny)
            distances[path] = jnp.sqrt(square.mean())
    return distances


@contextlib.contextmanager
def record_norm_inputs(
    layer_types: tuple[type[nn.Module], ...], layers: str, moments: Callable[[Array], Any]
) -> Iterator[dict[str, Any]]:
    """Records the moments of what goes into the normalization layers of any model.

    Args:
      layer_types: the classes that are normalization layers.
      layers: regular expression; a layer counts whose path has a match of it.
      moments: of an input, or whatever else of it is wanted.

    Yields:
      A dict that `model.apply` within the block fills, by the layer's path; further calls of a
      layer get '#1', '#2'.
    """
    recorded: dict[str, Any] = {}
    wanted = re.compile(layers)

    def interceptor(call, args, kwargs, context):
        if context.method_name == "__call__" and isinstance(context.module, layer_types):
            path = "/".join(context.module.path)
            if wanted.search(path):
                calls = sum(name.split("#")[0] == path for name in recorded)
                recorded[f"{path}#{calls}" if calls else path] = moments(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(interceptor):
        yield recorded


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
