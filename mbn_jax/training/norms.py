"""Normalization layers, by name, in one calling convention."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from ml_collections import ConfigDict

from mbn_jax.core.moments import Schedule
from mbn_jax.linen.batch_renorm import BatchRenorm
from mbn_jax.linen.memorized import MemorizedBatchNorm
from mbn_jax.linen.virtual_batches import VirtualBatches
from mbn_jax.parallel.devices import AXIS_NAME

SYNCS = ("sync", "group", "local")


def synced_devices(config: ConfigDict, num_devices: int) -> int:
    """Returns over how many devices the statistics of a batch are pooled."""
    return {"sync": num_devices, "group": config.norm.sync_group_size, "local": 1}[config.norm.sync]


class Affine(nn.Module):
    """A learned scale and bias per channel and nothing else: the baseline without normalization.

    >>> Affine().init(jax.random.key(0), jnp.zeros((2, 3)))['params']['scale'].tolist()
    [1.0, 1.0, 1.0]
    """

    use_running_average: bool | None = None
    dtype: jnp.dtype | None = None
    scale_init: nn.initializers.Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns x * scale + bias, for x `[..., channels]`."""
        shape = (x.shape[-1],)
        scale = self.param("scale", self.scale_init, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        broadcast = (1,) * (x.ndim - 1) + shape
        y = x * scale.reshape(broadcast) + bias.reshape(broadcast)
        return y.astype(self.dtype or x.dtype)


def memory_rule(config: ConfigDict, total_steps: int) -> tuple[Schedule, Schedule]:
    """Returns memory size and decay of the layers, as numbers or as functions of the step."""
    norm, growth = config.norm, config.norm.memory_schedule
    if isinstance(growth.start_size, int) and not growth.start_size:
        return norm.memory_size, norm.decay
    begin, end = round(growth.begin * total_steps), round(growth.end * total_steps)
    size = optax.linear_schedule(
        growth.start_size, norm.memory_size, max(1, end - begin), transition_begin=begin
    )
    return size, norm.decay


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


def _pooled_options(config: ConfigDict, num_devices: int) -> dict:
    """Returns what every layer takes that normalizes by a pool with the batch in it."""
    norm = config.norm
    return {
        "gradient": norm.gradient,
        **_statistics_options(config, num_devices),
    }


def _memorized(config: ConfigDict, num_devices: int, total_steps: int) -> Callable[..., nn.Module]:
    norm = config.norm
    memory_size, decay = memory_rule(config, total_steps)
    return functools.partial(
        MemorizedBatchNorm,
        memory_size=memory_size,
        memory_capacity=norm.memory_capacity or norm.memory_size,
        decay=decay,
        **_pooled_options(config, num_devices),
    )


def _averaged(config: ConfigDict, num_devices: int, total_steps: int) -> Callable[..., nn.Module]:
    return functools.partial(
        MemorizedBatchNorm,
        memory_size=None,
        decay=config.norm.decay,
        **_pooled_options(config, num_devices),
    )


def _batch(config: ConfigDict, num_devices: int, total_steps: int) -> Callable[..., nn.Module]:
    options = _statistics_options(config, num_devices)
    return functools.partial(nn.BatchNorm, momentum=config.norm.momentum, **options)


def _batch_renorm(
    config: ConfigDict, num_devices: int, total_steps: int
) -> Callable[..., nn.Module]:
    limits = config.norm.batch_renorm
    begin = round(limits.begin * total_steps)

    def until(end: float) -> int:
        return max(1, round(end * total_steps) - begin)

    return functools.partial(
        BatchRenorm,
        momentum=config.norm.momentum,
        r_max=optax.linear_schedule(1.0, limits.r_max, until(limits.r_end), begin),
        d_max=optax.linear_schedule(0.0, limits.d_max, until(limits.d_end), begin),
        **_statistics_options(config, num_devices),
    )


def _without_statistics(make: Callable[[ConfigDict], Callable[..., nn.Module]]):
    """Adapts a layer that has no statistics of batches, and so no `use_running_average`."""

    def build(config: ConfigDict, num_devices: int, total_steps: int) -> Callable[..., nn.Module]:
        layer = functools.partial(make(config), epsilon=config.norm.epsilon)
        return lambda use_running_average=None, **options: layer(**options)

    return build


def _none(config: ConfigDict, num_devices: int, total_steps: int) -> Callable[..., nn.Module]:
    return Affine


NORMS = {
    "memorized": _memorized,
    "averaged": _averaged,
    "batch": _batch,
    "batch_renorm": _batch_renorm,
    "group": _without_statistics(
        lambda config: functools.partial(nn.GroupNorm, num_groups=config.norm.num_groups)
    ),
    # Over channels and space, as is usual for convolutions.
    "layer": _without_statistics(lambda config: functools.partial(nn.GroupNorm, num_groups=1)),
    "instance": _without_statistics(lambda config: nn.InstanceNorm),
    "none": _none,
}
NORMS_OF_BATCHES = ("memorized", "averaged", "batch", "batch_renorm")
"""Those with statistics of batches."""

NORMS_WITH_MEMORY = ("memorized", "averaged")
"""Those of which `double_forward='transport'` can move what they keep."""

LAYERS = (
    VirtualBatches,
    MemorizedBatchNorm,
    nn.BatchNorm,
    BatchRenorm,
    nn.GroupNorm,
    nn.InstanceNorm,
    Affine,
)
"""The classes of the layers that `NORMS` makes."""


def build_norm(config: ConfigDict, num_devices: int, total_steps: int) -> Callable[..., nn.Module]:
    """Returns what makes the layers that `config.norm` describes.

    Args:
      config: of the run; `norm.memory_size` and `norm.decay` may be traced, where
        `norm.memory_capacity` is given.
      num_devices: over all hosts; `norm.sync='group'` divides them.
      total_steps: of the run; schedules of a norm are shares of it.

    Returns:
      A factory: `norm(use_running_average=..., scale_init=...)` is a linen module.
    """
    norm = functools.partial(
        NORMS[config.norm.name](config, num_devices, total_steps),
        dtype=jnp.dtype(config.model.dtype),
    )
    virtual_batch_size = config.norm.virtual_batch_size
    if not virtual_batch_size or config.norm.name not in NORMS_OF_BATCHES:
        return norm
    synced = synced_devices(config, num_devices)
    num_groups = config.batch_size // num_devices * synced // virtual_batch_size

    def in_groups(use_running_average: bool, **options) -> nn.Module:
        return VirtualBatches(functools.partial(norm, **options), num_groups, use_running_average)

    return in_groups
