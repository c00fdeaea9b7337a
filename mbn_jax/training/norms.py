"""Normalization layers, by name, in one calling convention."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from flax import linen as nn
from ml_collections import ConfigDict

from mbn_jax.core.moments import Schedule
from mbn_jax.linen.batch_renorm import BatchRenorm
from mbn_jax.linen.memorized import MemorizedBatchNorm
from mbn_jax.linen.moving_average import MovingAverageBatchNorm
from mbn_jax.linen.virtual_batches import VirtualBatches
from mbn_jax.models.affine import Affine
from mbn_jax.names import accepted, named, only_accepted, takes, with_kwargs
from mbn_jax.parallel.devices import AXIS_NAME
from mbn_jax.statistics.recalibration import LAYERS_WITH_STATISTICS
from mbn_jax.training.hparams import HParams

SYNCS = ("sync", "group", "local")

NORMS: dict[str, Callable[..., nn.Module]] = {
    "memorized": MemorizedBatchNorm,
    "batch": nn.BatchNorm,
    "batch_renorm": BatchRenorm,
    "moving_average": MovingAverageBatchNorm,
    "group": nn.GroupNorm,
    # Over channels and space, as is usual for convolutions.
    "layer": functools.partial(nn.GroupNorm, num_groups=1),
    "instance": nn.InstanceNorm,
    "none": Affine,
}

LAYERS = (*LAYERS_WITH_STATISTICS, nn.GroupNorm, nn.InstanceNorm, Affine)
"""Classes of the layers in `NORMS`."""

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
      A factory of normalization layers, called with `use_running_average`, which it takes whether
      or not the layer does. The layer gets `norm.kwargs`, and of the fields what it takes.
    """
    layer = named(config.norm.name, NORMS, "norm.name")
    offered = _options(config, hparams, num_devices, total_steps)
    is_told_of_inference = takes(layer, "use_running_average")
    if is_told_of_inference:
        offered |= _options_of_batches(config, num_devices)
    given = with_kwargs(only_accepted(layer, offered), config.norm, "norm")
    norm = functools.partial(layer, **given)
    if not is_told_of_inference:
        return lambda use_running_average=None, **options: norm(**options)
    virtual_batch_size = config.norm.virtual_batch_size
    if not virtual_batch_size or not is_norm_of_batches(layer):
        return norm
    synced = synced_devices(config, num_devices)
    num_groups = config.batch_size // num_devices * synced // virtual_batch_size

    def in_groups(use_running_average: bool, **options) -> nn.Module:
        return VirtualBatches(functools.partial(norm, **options), num_groups, use_running_average)

    return in_groups


def is_norm_of_batches(layer: Callable[..., nn.Module]) -> bool:
    """Returns whether a layer normalizes by statistics of batches, and can sync them."""
    return {"use_running_average", "axis_name"} <= accepted(layer)


def norm_layers(norm: NormFactory) -> tuple[type[nn.Module], ...]:
    """Returns the classes that are normalization layers, also what `norm` makes."""
    layer = norm(use_running_average=True)
    if isinstance(layer, VirtualBatches):
        layer = layer.norm(use_running_average=True)
    made = type(layer)
    return LAYERS if made in LAYERS else (*LAYERS, made)


def is_endless(config: ConfigDict) -> bool:
    """Returns whether the memory has no end, and so no slots: `norm.memory_size=0`."""
    return config.norm.memory_size == 0


def has_memory_schedule(config: ConfigDict) -> bool:
    """Returns whether the memory size follows a schedule."""
    return config.norm.memory_schedule.start_size > 0


def memory_capacity(config: ConfigDict) -> int:
    """Returns how many slots a memory has; 0 for an endless one."""
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


def _options(
    config: ConfigDict, hparams: HParams, num_devices: int, total_steps: int
) -> dict[str, Any]:
    """Returns what a layer is given where it has an argument of that name."""
    norm = config.norm
    options = {
        "dtype": jnp.dtype(config.model.dtype),
        "epsilon": norm.epsilon,
        "momentum": norm.momentum,
        "num_groups": norm.num_groups,
        "memory_size": None,
        "decay": hparams.decay,
        "gradient": norm.gradient,
    }
    if not is_endless(config):
        options["memory_size"] = memory_size_schedule(config, hparams, total_steps)
        options["memory_capacity"] = memory_capacity(config)
    if norm.name == "batch_renorm":
        options |= _limits(config, total_steps)
    return options


def _limits(config: ConfigDict, total_steps: int) -> dict[str, Any]:
    """Returns the limits of batch renormalization, functions of the step."""
    limits = config.norm.batch_renorm
    begin = round(limits.begin * total_steps)

    def until(end: float) -> int:
        return max(1, round(end * total_steps) - begin)

    return {
        "r_max": optax.linear_schedule(1.0, limits.r_max, until(limits.r_end), begin),
        "d_max": optax.linear_schedule(0.0, limits.d_max, until(limits.d_end), begin),
    }


def _options_of_batches(config: ConfigDict, num_devices: int) -> dict[str, Any]:
    """Returns what a layer with statistics of batches is given beside `_options`."""
    norm = config.norm
    options: dict[str, Any] = {"use_fast_variance": norm.use_fast_variance}
    if norm.sync != "local":
        options["axis_name"] = AXIS_NAME
    if norm.sync == "group":
        size = norm.sync_group_size
        starts = range(0, num_devices, size)
        # Tuples, because flax hashes a module's attributes.
        options["axis_index_groups"] = tuple(tuple(range(i, i + size)) for i in starts)
    return options
