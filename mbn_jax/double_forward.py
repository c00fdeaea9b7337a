"""The double-forward training step: update, then a second forward that rewrites the statistics.

Works for any Flax model and any normalization layer that keeps `batch_stats`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct, traverse_util
from jax import lax

from mbn_jax.batch_stats import layers_with_statistics
from mbn_jax.normalization import BATCH_MOMENTS, FIRST_BATCH_MOMENTS
from mbn_jax.statistics import AxisName

PyTree = Any

DOUBLE_FORWARD = ("off", "rewrite", "transport")


class TrainState(struct.PyTreeNode):
    """All that training carries from step to step, as one pytree of arrays.

    Attributes:
      step: int32 scalar, updates done.
      params: the parameters.
      batch_stats: the statistics of the normalization layers; `{}` for a model without any.
      opt_state: the optimizer's state.
      key: the random key of the run; each step folds its number into it.
    """

    step: jax.Array
    params: PyTree
    batch_stats: PyTree
    opt_state: optax.OptState
    key: jax.Array

    @classmethod
    def create(
        cls, variables: PyTree, tx: optax.GradientTransformation, key: jax.Array
    ) -> "TrainState":
        """Makes the state before the first step.

        Args:
          variables: what `model.init` returned.
          tx: the optimizer.
          key: the random key of the run.

        Returns:
          The `TrainState` at step 0.

        Raises:
          ValueError: if the model has collections that a step would silently lose.
        """
        unknown = set(variables) - {"params", "batch_stats"}
        if unknown:
            raise ValueError(
                f"TrainState carries the collections 'params' and 'batch_stats', the model also "
                f"has {sorted(unknown)}; take them out, or write a step that keeps them."
            )
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=variables.get("params", {}),
            batch_stats=variables.get("batch_stats", {}),
            opt_state=tx.init(variables.get("params", {})),
            key=key,
        )


def make_train_step(
    apply_fn: Callable,
    tx: optax.GradientTransformation,
    loss_fn: Callable,
    *,
    double_forward: str = "rewrite",
    axis_name: AxisName | None = None,
    rng_names: Sequence[str] = ("dropout",),
) -> Callable[[TrainState, PyTree], tuple[TrainState, dict[str, jax.Array]]]:
    """Makes the pure training step of one device. Jit it, or map it over devices.

    From parameters p and statistics S:

        1. loss and gradients of the batch under (p, S); the statistics it writes are dropped
        2. p' = optimizer update of p
        3. second forward of the same batch under (p', S), no gradient, same random keys: writes S'
        4. the new state is (p', S')

    Because the second forward starts from S, it *rewrites* the batch's contribution rather than
    adding one, and no layer needs to know. The compiler drops the part of it that no statistic
    depends on: the loss, the classifier, all of it for a model without `batch_stats`.

    Args:
      apply_fn: `model.apply`.
      tx: the optimizer.
      loss_fn: `loss_fn(apply, batch) -> (loss, (metrics, updates))`, a pure function, traced once
        for each forward. `apply` is `model.apply` bound to the variables, the mutable collections
        and the random keys of this forward; it returns `(outputs, updates)`, and `updates` is to be
        handed back. `metrics` is a dict of scalars.
      double_forward: 'rewrite', as above; 'off': S' is what step 1 wrote; or 'transport': as
        'rewrite', and every `MemorizedBatchNorm` moves its whole memory by the shift between the
        two forwards (see `mbn_jax.statistics.transport`), at no further cost.
      axis_name: named axis of `pmap` or of `shard_map(check_vma=False)`, over which gradients and
        metrics are averaged. Statistics are not: a layer built with `axis_name` syncs its own.
      rng_names: random streams that the model draws from in training.

    Returns:
      `step(state, batch) -> (state, metrics)`; metrics hold 'loss' and those of `loss_fn`, float32,
      averaged over devices.

    Raises:
      ValueError: for an unknown `double_forward`; the step, under `shard_map(check_vma=True)`, and
        in mode 'transport' where a memory would be left where it was.

    References:
      Guo et al., "Double Forward Propagation for Memorized Batch Normalization", AAAI 2018 (arXiv
      2010.04947), Algorithm 1.

    >>> import flax.linen as nn
    >>> from mbn_jax import MemorizedBatchNorm
    >>> layer = MemorizedBatchNorm(memory_size=2)
    >>> def loss_fn(apply, batch):
    ...     y, updates = apply(batch, use_running_average=False)
    ...     return jnp.mean((y - 1) ** 2), ({}, updates)
    >>> tx = optax.sgd(0.1)
    >>> x = jnp.array([[1.0], [3.0]])
    >>> variables = layer.init(jax.random.key(0), x, use_running_average=True)
    >>> state = TrainState.create(variables, tx, jax.random.key(1))
    >>> state, metrics = jax.jit(make_train_step(layer.apply, tx, loss_fn))(state, x)
    >>> int(state.step), round(float(metrics['loss']), 3)
    (1, 2.0)
    """
    if double_forward not in DOUBLE_FORWARD:
        raise ValueError(f"double_forward must be one of {DOUBLE_FORWARD}, got {double_forward!r}.")

    def train_step(state: TrainState, batch: PyTree):
        if any(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(batch)):
            raise ValueError(
                "The step runs under jax.shard_map with check_vma=False only: with its check, "
                "gradients averaged by lax.pmean come out multiplied by the number of devices."
            )
        key = jax.random.fold_in(state.key, state.step)
        if axis_name is not None:
            key = jax.random.fold_in(key, lax.axis_index(axis_name))
        rngs = {name: jax.random.fold_in(key, i) for i, name in enumerate(rng_names)}

        def forward(params: PyTree, **collections: PyTree):
            variables = {"params": params, "batch_stats": state.batch_stats, **collections}
            mutable = ["batch_stats", BATCH_MOMENTS]
            return loss_fn(
                functools.partial(apply_fn, variables, mutable=mutable, rngs=rngs), batch
            )

        (loss, (metrics, first)), grads = jax.value_and_grad(forward, has_aux=True)(state.params)
        if axis_name is not None:
            grads = lax.pmean(grads, axis_name)
        deltas, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, deltas)

        updates = first
        if double_forward == "rewrite":
            _, (_, updates) = forward(params)
        elif double_forward == "transport":
            recorded = first.get(BATCH_MOMENTS, {})
            _, (_, updates) = forward(params, **{FIRST_BATCH_MOMENTS: recorded})
            _check_transported(state.batch_stats, recorded, updates)

        # As floats, because lax.pmean would turn integers into them on some paths only.
        metrics = {k: jnp.asarray(v, jnp.float32) for k, v in {"loss": loss, **metrics}.items()}
        if axis_name is not None:
            metrics = lax.pmean(metrics, axis_name)
        state = state.replace(
            step=state.step + 1,
            params=params,
            batch_stats=updates.get("batch_stats", state.batch_stats),
            opt_state=opt_state,
        )
        return state, metrics

    return train_step


def _check_transported(batch_stats: PyTree, first: PyTree, updates: PyTree) -> None:
    """Raises ValueError unless every call of every layer that wrote its memory has moved it."""

    def calls(recorded: PyTree, name: str) -> dict[str, int]:
        entries = traverse_util.flatten_dict(recorded)
        return {"/".join(path[:-1]): len(x) for path, x in entries.items() if path[-1] == name}

    written = layers_with_statistics(updates.get("batch_stats", {}))
    memories = {
        path: written[path]["mean"] is not stats["mean"]  # Else it is frozen, or was not called.
        for path, stats in layers_with_statistics(batch_stats).items()
        if {"count", "weight"} & set(stats)
    }
    recorded = calls(first, "moments")
    moved = calls(updates.get(BATCH_MOMENTS, {}), "transported")
    left = sorted(
        path
        for path, is_written in memories.items()
        if recorded.get(path, 0) != moved.get(path, 0) or (is_written and not moved.get(path))
    )
    if left or not memories:
        names = ", ".join(name or "the layer" for name in left) or "no layer has a memory"
        raise ValueError(
            f"double_forward='transport' must move every memory, and cannot: {names}. Lifted "
            f"transforms (nn.vmap, nn.scan) need {BATCH_MOMENTS!r} and {FIRST_BATCH_MOMENTS!r} in "
            "their variable_axes; norms without a memory take 'rewrite'."
        )
