"""To and from models with `flax.nnx.BatchNorm`."""

from typing import Any

from flax import nnx
from flax.traverse_util import unflatten_dict

from mbn_jax.core.conversion import folded, started_from
from mbn_jax.nnx.trees import leaves_of, values_of, write

PyTree = Any


def from_batch_norm(batch_norm: nnx.Module, model: nnx.Module) -> None:
    """Starts a model from the same one with `flax.nnx.BatchNorm`, in place.

    All is taken over as it is, but for the moving averages, which become the first slot of a memory
    and leave it as newer batches come; in an average they count as one batch. At inference the
    output is that of `batch_norm`.

    Args:
      batch_norm: the trained model.
      model: the new one; its Variables are written, its random streams are not.

    Raises:
      ValueError: where the two are not of the same structure, naming what differs.

    >>> import jax.numpy as jnp
    >>> from mbn_jax.nnx.memorized import MemorizedBatchNorm
    >>> layer = MemorizedBatchNorm(1, memory_size=3, rngs=nnx.Rngs(0))
    >>> from_batch_norm(nnx.BatchNorm(1, rngs=nnx.Rngs(0)), layer)
    >>> layer.count[:, 0].tolist()
    [1.0, 0.0, 0.0]
    """
    _write_collections(model, started_from(_collections(batch_norm), _collections(model)))


def to_batch_norm(model: nnx.Module, batch_norm: nnx.Module) -> None:
    """Folds a trained model into the same one with `flax.nnx.BatchNorm`, in place.

    Its output at inference is the same: a memory becomes its pooled mean and variance, by the rule
    that it recorded in training.

    Args:
      model: the trained model.
      batch_norm: the model with `nnx.BatchNorm` of the same `epsilon`; its Variables are written,
        its random streams are not.

    Raises:
      ValueError: where the two are not of the same structure, naming what differs.

    >>> import jax.numpy as jnp
    >>> from mbn_jax.nnx.memorized import MemorizedBatchNorm
    >>> layer = MemorizedBatchNorm(1, memory_size=2, decay=1.0, rngs=nnx.Rngs(0))
    >>> for x in (jnp.array([[0.0], [2.0]]), jnp.array([[2.0], [4.0]])):
    ...     _ = layer(x)
    >>> norm = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
    >>> to_batch_norm(layer, norm)
    >>> norm.mean[...].tolist(), norm.var[...].tolist()
    ([2.0], [2.0])
    """
    collections = _collections(model)
    collections["batch_stats"] = folded(collections["batch_stats"])
    _write_collections(batch_norm, started_from(collections, _collections(batch_norm)))


def _collections(model: nnx.Module) -> dict[str, PyTree]:
    """Returns what a model holds, but its random streams: nested dicts, statistics apart."""
    _, stats, others = nnx.state(model, nnx.RngState, nnx.BatchStat, ...)
    return {
        "batch_stats": unflatten_dict(values_of(stats)),
        "params": unflatten_dict(values_of(others)),
    }


def _write_collections(model: nnx.Module, collections: dict[str, PyTree]) -> None:
    for collection in collections.values():
        write(model, leaves_of(collection))
