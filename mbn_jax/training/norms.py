"""Normalization layers, by name, in one calling convention."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
import optax
from flax import linen as nn
from ml_collections import ConfigDict

from mbn_jax.core.moments import Schedule
from mbn_jax.linen.batch_renorm import BatchRenorm
from mbn_jax.linen.memorized import MemorizedBatchNorm
from mbn_jax.linen.virtual_batches import VirtualBatches
from mbn_jax.models.affine import Affine
from mbn_jax.parallel.devices import AXIS_NAME
from mbn_jax.training.hparams import HParams

SYNCS = ("sync", "group", "local")
NORMS_OF_BATCHES = ("memorized", "batch", "batch_renorm")
"""Norms that normalize by statistics of batches."""

LAYERS = (
    VirtualBatches,
    MemorizedBatchNorm,
    nn.BatchNorm,
    BatchRenorm,
    nn.GroupNorm,
    nn.InstanceNorm,
    Affine,
)
"""Classes of the layers that `NORMS` builds."""

NormFactory = Callable[..., nn.Module]
"""`norm(use_running_average=..., scale_init=...)` is a normalization layer."""


def build_norm(
    config: ConfigDict, hparams: HParams, num_devices: int, total_steps: int
) -> NormFactory:
    """Builds the norm that `config.norm` describes.

    Args:
      config: run configuration; the numbers in `hparams` are not read from it.
      hparams: memory size and decay, which may be traced.
      num_devices: devices on all hosts; `norm.sync='group'` divides them.
      total_steps: total training steps; schedules of a norm are shares of it.

    Returns:
      A factory of normalization layers.
    """
    norm = functools.partial(
        NORMS[config.norm.name](config, hparams, num_devices, total_steps),
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


def is_endless(config: ConfigDict) -> bool:
    """Returns whether the memory has no end, and so no slots: `norm.memory_size=0`."""
    return config.norm.memory_size == 0


def has_memory_schedule(config: ConfigDict) -> bool:
    """Returns whether the memory size follows a schedule."""
    return config.norm.memory_schedule.start_size > 0


def memory_capacity(config: ConfigDict) -> int:
    """Returns how many slots a memory has; 0 for one without end."""
    return 0 if is_endless(config) else config.norm.memory_capacity or config.norm.memory_size


def memory_size_schedule(config: ConfigDict, hparams: HParams, total_steps: int) -> Schedule:
    """Returns the memory size, as a number or as a function of the step."""
    if not has_memory_schedule(config):
        return hparams.memory_size
    growth = config.norm.memory_schedule
    begin, end = round(growth.begin * total_steps), round(growth.end * total_steps)
    return optax.linear_schedule(
        hparams.memory_start_size,
        hparams.memory_size,
        max(1, end - begin),
        transition_begin=begin,
    )


def synced_devices(config: ConfigDict, num_devices: int) -> int:
    """Returns how many devices share the statistics of a batch."""
    return {"sync": num_devices, "group": config.norm.sync_group_size, "local": 1}[config.norm.sync]


def _memorized(
    config: ConfigDict, hparams: HParams, num_devices: int, total_steps: int
) -> NormFactory:
    options = {
        "decay": hparams.decay,
        "gradient": config.norm.gradient,
        **_statistics_options(config, num_devices),
    }
    if is_endless(config):
        return functools.partial(MemorizedBatchNorm, memory_size=None, **options)
    return functools.partial(
        MemorizedBatchNorm,
        memory_size=memory_size_schedule(config, hparams, total_steps),
        memory_capacity=memory_capacity(config),
        **options,
    )


def _batch(config: ConfigDict, hparams: HParams, num_devices: int, total_steps: int) -> NormFactory:
    options = _statistics_options(config, num_devices)
    return functools.partial(nn.BatchNorm, momentum=config.norm.momentum, **options)


def _batch_renorm(
    config: ConfigDict, hparams: HParams, num_devices: int, total_steps: int
) -> NormFactory:
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


def _statistics_options(config: ConfigDict, num_devices: int) -> dict:
    """Returns the options that all layers with statistics of batches share."""
    norm = config.norm
    options = {"epsilon": norm.epsilon, "use_fast_variance": norm.use_fast_variance}
    if norm.sync != "local":
        options["axis_name"] = AXIS_NAME
    if norm.sync == "group":
        size = norm.sync_group_size
        starts = range(0, num_devices, size)
        # Tuples, because flax hashes a module's attributes.
        options["axis_index_groups"] = tuple(tuple(range(i, i + size)) for i in starts)
    return options


def _without_statistics(make_layer: Callable[[ConfigDict], Callable[..., nn.Module]]):
    """Adapts a layer without statistics of batches, which takes no `use_running_average`."""

    def build(
        config: ConfigDict, hparams: HParams, num_devices: int, total_steps: int
    ) -> NormFactory:
        layer = functools.partial(make_layer(config), epsilon=config.norm.epsilon)
        return lambda use_running_average=None, **options: layer(**options)

    return build


def _none(config: ConfigDict, hparams: HParams, num_devices: int, total_steps: int) -> NormFactory:
    return Affine


NORMS = {
    "memorized": _memorized,
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
