"""The training step with Double Forward in NNX's own style, with `nnx.Optimizer`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from mbn_jax.core.double_forward import SecondForward
from mbn_jax.core.moments import AxisName
from mbn_jax.nnx.functional import ModelFunction, random_streams
from mbn_jax.nnx.trees import leaves_of, write
from mbn_jax.step.state import TrainState
from mbn_jax.step.train_step import make_train_step as make_functional_step

PyTree = Any


def make_train_step(
    loss_fn: Callable,
    *,
    double_forward: str = "rewrite",
    double_forward_fraction: float = 1.0,
    axis_name: AxisName | None = None,
    local_statistics: bool = False,
    frozen_statistics: bool = False,
    mutable: Sequence[str] = (),
) -> Callable[[nnx.Module, nnx.Optimizer, PyTree], dict[str, jax.Array]]:
    """Makes the training step of one device, which updates a model and its optimizer in place.

    It is `mbn_jax.make_train_step`, which documents the method and the options, around a model. Use
    it inside `nnx.jit`, `nnx.pmap` or `nnx.shard_map`.

    Args:
      loss_fn: `loss_fn(model, batch) -> (loss, metrics)`, called once for each forward; `metrics`
        is a dict of scalars. It may call the model, in training mode, in any way.
      double_forward: 'rewrite', 'off' or 'transport'.
      double_forward_fraction: share of the batch that the second forward sees.
      axis_name: named axis over which the step is mapped.
      local_statistics: whether each device may keep statistics of its own.
      frozen_statistics: whether no layer has to write statistics.
      mutable: names of further collections that the model may write; the step keeps none of them.

    Returns:
      `train_step(model, optimizer, batch) -> metrics`, which hold 'loss'. It trains the Variables
      of the optimizer's `wrt`. Both forwards draw the same random numbers, from keys made of the
      model's random streams and the optimizer's `step`; the streams themselves stay as they are.

    Raises:
      ValueError: as `mbn_jax.make_train_step` and its step.

    >>> import jax.numpy as jnp, optax
    >>> from mbn_jax.nnx.memorized import MemorizedBatchNorm
    >>> model = MemorizedBatchNorm(1, memory_size=2, rngs=nnx.Rngs(0))
    >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    >>> def loss_fn(model, batch):
    ...     return jnp.mean((model(batch) - 1) ** 2), {}
    >>> train_step = nnx.jit(make_train_step(loss_fn, double_forward='transport'))
    >>> metrics = train_step(model, optimizer, jnp.array([[1.0], [3.0]]))
    >>> round(float(metrics['loss']), 3), model.mean[:, 0].tolist()
    (2.0, [2.0, 0.0])
    """
    SecondForward(double_forward, double_forward_fraction)

    def call(model: nnx.Module, batch: PyTree) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        returned = loss_fn(model, batch)
        if not (
            isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping)
        ):
            raise ValueError(
                "loss_fn must return (loss, metrics), with a dict of metrics, got a "
                f"{type(returned).__name__}."
            )
        return returned

    def bound_loss(apply: Callable, batch: PyTree):
        (loss, metrics), updates = apply(batch)
        return loss, (metrics, updates)

    def train_step(
        model: nnx.Module, optimizer: nnx.Optimizer, batch: PyTree
    ) -> dict[str, jax.Array]:
        if type(optimizer).update is not nnx.Optimizer.update:
            raise ValueError(
                "The step updates as nnx.Optimizer does, and cannot use the update of "
                f"{type(optimizer).__name__}; give an nnx.Optimizer, or use mbn_jax.nnx.functional."
            )
        function = ModelFunction(model, optimizer.wrt, call)
        step = make_functional_step(
            function.apply,
            optimizer.tx,
            bound_loss,
            double_forward=double_forward,
            double_forward_fraction=double_forward_fraction,
            axis_name=axis_name,
            local_statistics=local_statistics,
            frozen_statistics=frozen_statistics,
            mutable=mutable,
        )
        state = TrainState(
            step=optimizer.step.get_value(),
            params=function.params,
            batch_stats=function.batch_stats,
            opt_state=nnx.as_pure(optimizer.opt_state),
            key=_key(model),
        )
        state, metrics = step(state, batch)
        nnx.update(model, state.params)
        write(model, leaves_of(state.batch_stats))
        nnx.update(optimizer.opt_state, nnx.state(state.opt_state))
        optimizer.step.set_value(state.step)
        return metrics

    return train_step


def _key(model: nnx.Module) -> jax.Array:
    """Returns a random key that depends on every random stream of a model."""
    key = jax.random.key(0)
    for stream in random_streams(model):
        own, count = (value.get_value().reshape(-1)[0] for value in (stream.key, stream.count))
        key = jax.random.fold_in(key, jax.random.bits(jax.random.fold_in(own, count)))
    return key
