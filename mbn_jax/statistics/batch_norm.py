"""To and from networks with `flax.linen.BatchNorm`."""

import re
from collections.abc import Mapping
from typing import Any

from mbn_jax.core.conversion import folded, started_from

PyTree = Any

NAMES = ("MemorizedBatchNorm", "BatchRenorm", "MovingAverageBatchNorm", "VirtualBatches")
"""Classes by which flax names the layers that stand where a `BatchNorm` could."""


def to_batch_norm(variables: PyTree) -> PyTree:
    """Folds trained statistics into variables for the same network with `flax.linen.BatchNorm`.

    Its output at inference is the same: a memory becomes its pooled mean and variance, by the rule
    that it recorded in training. Layers that flax named by their class are renamed,
    `MemorizedBatchNorm_0` to `BatchNorm_0`.

    Args:
      variables: 'params' and 'batch_stats' of the trained network.

    Returns:
      The variables for the network with `BatchNorm` of the same `epsilon`.

    Raises:
      ValueError: where two layers would get one name.

    >>> import jax, jax.numpy as jnp
    >>> from mbn_jax import MemorizedBatchNorm
    >>> layer = MemorizedBatchNorm(memory_size=2, decay=1.0, use_running_average=False)
    >>> variables = layer.init(jax.random.key(0), jnp.zeros((2, 1)))
    >>> for x in (jnp.array([[0.0], [2.0]]), jnp.array([[2.0], [4.0]])):
    ...     _, updates = layer.apply(variables, x, mutable=['batch_stats'])
    ...     variables = {**variables, **updates}
    >>> {name: x.tolist() for name, x in to_batch_norm(variables)['batch_stats'].items()}
    {'mean': [2.0], 'var': [2.0]}
    """
    _check_names(variables)
    batch_stats = folded(variables.get("batch_stats", {}))
    return _named_as_batch_norm({**variables, "batch_stats": batch_stats})


def from_batch_norm(batch_norm: PyTree, variables: PyTree) -> PyTree:
    """Starts a network from a checkpoint of the same one with `flax.linen.BatchNorm`.

    Parameters are taken over as they are. The moving averages become the first slot of a memory and
    leave it as newer batches come; in an endless memory they count as one batch. At inference
    the output is that of the checkpoint.

    Args:
      batch_norm: 'params' and 'batch_stats' of the checkpoint.
      variables: what `init` of the new network returned.

    Returns:
      Variables of the tree of `variables`.

    Raises:
      ValueError: where the two are not of the same network, naming what differs.

    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> from mbn_jax import MemorizedBatchNorm
    >>> x = jnp.zeros((2, 1))
    >>> trained = nn.BatchNorm(use_running_average=True).init(jax.random.key(0), x)
    >>> layer = MemorizedBatchNorm(memory_size=3, use_running_average=True)
    >>> fresh = layer.init(jax.random.key(0), x)
    >>> from_batch_norm(trained, fresh)['batch_stats']['count'][:, 0].tolist()
    [1.0, 0.0, 0.0]
    """
    for tree in (batch_norm, variables):
        _check_names(tree)
    return started_from(
        batch_norm, variables, _batch_norm_name, lambda path: path[0] == "batch_stats"
    )


def _batch_norm_name(name: str) -> str:
    # Lifted transforms put their own name in front: VmapMemorizedBatchNorm_0.
    return re.sub(rf"(?:{'|'.join(NAMES)})(?=_\d+$)", "BatchNorm", name)


def _named_as_batch_norm(tree: PyTree) -> PyTree:
    """Renames layers; `tree` has passed `_check_names`."""
    if not isinstance(tree, Mapping):
        return tree
    return {_batch_norm_name(name): _named_as_batch_norm(child) for name, child in tree.items()}


def _check_names(tree: PyTree) -> None:
    """Raises ValueError where two layers would get one name."""
    if not isinstance(tree, Mapping):
        return
    if len(set(map(_batch_norm_name, tree))) < len(tree):
        raise ValueError(
            f"Renamed to BatchNorm, two layers of {sorted(tree)} would have one name; give the "
            "normalization layers of the network names of their own."
        )
    for child in tree.values():
        _check_names(child)
