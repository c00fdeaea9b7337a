"""The statistics in a checkpoint: those of each group of devices, `[groups, ...]`.

A group is one device where devices keep statistics of their own, else all devices.
"""

from typing import Any

import jax
import numpy as np

from mbn_jax.core.batch_stats import pool_batch_stats
from mbn_jax.parallel.devices import (
    Devices,
    distribute,
    gather_over_hosts,
    local_devices,
    replicate,
)

PyTree = Any


def groups_of(batch_stats: PyTree, *, local_statistics: bool) -> PyTree:
    """Returns host arrays `[groups, ...]` of the statistics on the devices, `[devices, ...]`."""
    if local_statistics:
        return gather_over_hosts(batch_stats)
    return jax.tree.map(lambda x: x[:1], jax.device_get(batch_stats))


def num_groups(stats: PyTree) -> int:
    """Returns the number of groups; 1 where there are no statistics.

    >>> num_groups({"mean": np.zeros((8, 3))})
    8
    """
    return max((len(x) for x in jax.tree.leaves(stats)), default=1)


def on_devices(stats: PyTree, like: PyTree, *, local_statistics: bool, devices: Devices) -> PyTree:
    """Puts saved statistics on the devices.

    Where the groups are not these devices, their statistics are pooled, and every device starts
    from the pool; those of one device now have the shapes of `like`.
    """
    is_empty = not jax.tree.leaves(stats)
    if not local_statistics or is_empty or num_groups(stats) != len(devices or jax.devices()):
        return replicate(_in_virtual_batches_of(like, pooled(stats)), devices)
    count = len(local_devices(devices))
    first = 0 if devices else jax.process_index() * count
    return distribute(jax.tree.map(lambda x: x[first : first + count], stats), devices)


def pooled(stats: PyTree) -> PyTree:
    """Returns the statistics of all groups together, without the axis of the groups."""
    if num_groups(stats) > 1:
        return jax.device_get(pool_batch_stats(stats))
    return jax.tree.map(lambda x: x[0], stats)


def _in_virtual_batches_of(like: PyTree, stats: PyTree) -> PyTree:
    """Pools virtual batches where their number is another one now; each starts from the pool."""
    if jax.tree.map(np.shape, stats) == jax.tree.map(np.shape, like):
        return stats
    pool = jax.device_get(pool_batch_stats(stats))
    return jax.tree.map(lambda x, y: np.broadcast_to(x, np.shape(y)), pool, like)
