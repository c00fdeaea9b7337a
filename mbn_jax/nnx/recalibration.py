"""The statistics of the layers of an NNX model, computed anew over batches."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
from flax import nnx
from flax.traverse_util import unflatten_dict

from mbn_jax.core.batch_stats import add_moments, moments_over, recalibrated, with_moments
from mbn_jax.core.double_forward import RECORDS
from mbn_jax.core.moments import Array, Moments, pool_two
from mbn_jax.core.normalization import input_moments
from mbn_jax.nnx.batch_renorm import BatchRenorm
from mbn_jax.nnx.memorized import BatchMoments, MemorizedBatchNorm
from mbn_jax.nnx.trees import leaves_of, values_of, write

PyTree = Any

LAYERS_WITH_STATISTICS = (MemorizedBatchNorm, BatchRenorm, nnx.BatchNorm)
"""Classes of the layers whose statistics can be recalibrated."""


def recalibrate(
    model: nnx.Module,
    batches: Iterable[PyTree],
    apply: Callable[[nnx.Module, PyTree], Any] = lambda model, batch: model(batch),
) -> None:
    """Computes the statistics of every layer anew over batches, in place.

    Each batch goes forward at inference, with every layer normalizing by the statistics of that
    batch, and the moments of the layers' inputs are pooled over the batches by the law of total
    variance: see `mbn_jax.recalibrate`. It works inside of `nnx.scan`, `nnx.vmap` and `nnx.remat`.
    Layers that the model does not call keep what they have.

    Args:
      model: the model; its statistics are written, its mode is not changed.
      batches: one or more, as `apply` takes them; one compilation for each shape.
      apply: calls the model.

    Raises:
      ValueError: without batches, or where no layer with statistics is called.

    >>> import jax.numpy as jnp
    >>> layer = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
    >>> recalibrate(layer, [jnp.array([[0.0], [2.0]]), jnp.array([[4.0], [6.0]])])
    >>> layer.mean[...].tolist(), layer.var[...].tolist()
    ([3.0], [5.0])
    """
    copy = nnx.clone(model)
    copy.eval()
    for _, layer in nnx.iter_modules(copy):
        if isinstance(layer, LAYERS_WITH_STATISTICS):
            layer.__class__ = _recording(type(layer))  # type: ignore[assignment]
            setattr(layer, RECORDS, BatchMoments(()))
    graphdef, variables = nnx.split(copy)

    @jax.jit
    def add_batch(totals: dict[str, Moments], variables: nnx.State, batch: PyTree):
        called = nnx.merge(graphdef, variables)
        apply(called, batch)
        records = values_of(nnx.state(called, BatchMoments))
        recorded = {
            "/".join(names[:-1]): functools.reduce(pool_two, calls)
            for names, calls in records.items()
            if calls
        }
        return add_moments(totals, recorded)

    totals = moments_over(batches, functools.partial(add_batch, variables=variables), "mbn_jax.nnx")
    batch_stats = unflatten_dict(values_of(nnx.state(model, nnx.BatchStat)))
    write(model, leaves_of(recalibrated(batch_stats, totals)))


@functools.cache
def _recording(layer_type: type[nnx.Module]) -> type[nnx.Module]:
    """Returns a class of layers that record their inputs' moments and normalize by them."""

    class Recording(layer_type):  # type: ignore[misc, valid-type]
        def __call__(self, x: Array, *args: Any, mask: Array | None = None, **kwargs: Any) -> Any:
            moments = input_moments(x, self.axis, mask=mask)
            kept = nnx.All(nnx.BatchStat, nnx.Not(BatchMoments))
            stats = {name: value for (name,), value in values_of(nnx.state(self, kept)).items()}
            write(self, {(name,): value for name, value in with_moments(stats, moments).items()})
            records = getattr(self, RECORDS)
            records.set_value((*records.get_value(), moments))
            return super().__call__(x, use_running_average=True, mask=mask)

    return Recording
