"""Normalization layers, by name, in one calling convention."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from mbn_jax.normalization import MemorizedBatchNorm
from mbn_jax.parallel import AXIS_NAME

SYNCS = ("sync", "group", "local")


class Affine(nn.Module):
    """A learned scale and bias per channel and nothing else: the baseline without normalization.

    >>> Affine().init(jax.random.key(0), jnp.zeros((2, 3)))['params']['scale'].tolist()
    [1.0, 1.0, 1.0]
    """

    use_running_average: bool | None = None
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns x * scale + bias, for x `[..., channels]`."""
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        broadcast = (1,) * (x.ndim - 1) + shape
        y = x * scale.reshape(broadcast) + bias.reshape(broadcast)
        return y.astype(self.dtype or x.dtype)


def _statistics_options(config: ConfigDict, num_devices: int) -> dict:
    """Returns what every layer with batch statistics takes."""
    norm = config.norm
    options = {"epsilon": norm.epsilon, "use_fast_variance": norm.use_fast_variance}
    if norm.sync != "local":
        options["axis_name"] = AXIS_NAME
    if norm.sync == "group":
        size = norm.sync_group_size
        starts = range(0, num_devices, size)
        # Tuples, for a module with lists could not be hashed.
        options["axis_index_groups"] = tuple(tuple(range(i, i + size)) for i in starts)
    return options


def _memorized(config: ConfigDict, num_devices: int) -> Callable[..., nn.Module]:
    norm = config.norm
    return functools.partial(
        MemorizedBatchNorm,
        memory_size=norm.memory_size,
        memory_capacity=norm.memory_capacity or None,
        decay=norm.decay,
        gradient=norm.gradient,
        r_max=norm.r_max or None,
        d_max=norm.d_max or None,
        **_statistics_options(config, num_devices),
    )


def _batch(config: ConfigDict, num_devices: int) -> Callable[..., nn.Module]:
    options = _statistics_options(config, num_devices)
    return functools.partial(nn.BatchNorm, momentum=config.norm.momentum, **options)


def _none(config: ConfigDict, num_devices: int) -> Callable[..., nn.Module]:
    return Affine


NORMS = {"memorized": _memorized, "batch": _batch, "none": _none}


LAYERS = (MemorizedBatchNorm, nn.BatchNorm, Affine)
"""The classes of the layers that `NORMS` makes."""


def build_norm(config: ConfigDict, num_devices: int) -> Callable[..., nn.Module]:
    """Returns what makes the layers that `config.norm` describes.

    Args:
      config: of the run; `norm.memory_size` and `norm.decay` may be traced, where
        `norm.memory_capacity` is given.
      num_devices: over all hosts; `norm.sync='group'` divides them.

    Returns:
      A factory: `norm(use_running_average=..., dtype=...)` is a linen module.
    """
    return functools.partial(
        NORMS[config.norm.name](config, num_devices), dtype=jnp.dtype(config.model.dtype)
    )
