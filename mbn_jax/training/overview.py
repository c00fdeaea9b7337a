"""What a run is made of, in a few lines to check before it goes on for days."""

import jax
from ml_collections import ConfigDict

from mbn_jax.datasets.split import Split
from mbn_jax.names import named
from mbn_jax.training.norms import NORMS, is_norm_of_batches, synced_devices
from mbn_jax.training.task import Task


def overview(task: Task, config: ConfigDict) -> list[str]:
    """Returns lines on hosts and devices, the batch, the statistics, and the data."""
    hosts = jax.process_count()
    per_host, per_device = config.batch_size // hosts, config.batch_size // task.num_devices
    where = _count(task.num_devices // hosts, "device")
    if hosts > 1:
        where = f"{hosts} hosts with {where} each"
    lines = [
        f"{where} ({jax.devices()[0].device_kind}); batch size {config.batch_size}: "
        + (f"{per_host} on each host, " if hosts > 1 else "")
        + f"{per_device} on each device",
        f"train on {_described(task.train)}, evaluate on {_described(task.test)}; "
        f"{_count(task.steps_per_epoch, 'step')} an epoch, {task.total_steps:,} in all",
    ]
    if is_norm_of_batches(named(config.norm.name, NORMS, "norm.name")):
        lines.insert(1, _statistics(config, task.num_devices))
    return lines


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}" + ("s" if number != 1 else "")


def _described(split: Split) -> str:
    where = "decoded as used" if split.in_memory is None else "in memory"
    return f"{_count(len(split), 'example')} of {split.name!r} ({where})"


def _statistics(config: ConfigDict, num_devices: int) -> str:
    """Returns over what the norm layers compute the statistics of a batch."""
    synced = synced_devices(config, num_devices)
    examples = config.batch_size // num_devices * synced
    groups = num_devices // synced
    if groups == 1:
        kept = "all devices share them" if num_devices > 1 else "one device has them"
    elif synced == 1:
        kept = f"each of {groups} devices keeps its own"
    else:
        kept = f"each of {groups} groups of {synced} devices keeps its own"
    virtual = config.norm.virtual_batch_size
    by = f", {virtual} at a time" if virtual else ""
    return f"statistics of {_count(examples, 'example')} a batch{by}: {kept}"
