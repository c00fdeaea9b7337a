"""The double-forward training step: update, then a second forward that rewrites the statistics.

Works for any Flax model and any normalization layer that keeps `batch_stats`.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jax import lax

from mbn_jax.core.batch_stats import layers_with_statistics
from mbn_jax.core.moments import AxisName
from mbn_jax.core.records import (
    BATCH_MOMENTS,
    FIRST_BATCH_MOMENTS,
    FIRST_USED,
    PART,
    WHOLE,
    WHOLE_TO_REWRITE,
    record_part,
    rows_of_part,
)
from mbn_jax.step.state import TrainState

PyTree = Any

DOUBLE_FORWARD = ("off", "rewrite", "transport")


def check_second_forward(double_forward: str, fraction: float, every: int) -> None:
    """Raises ValueError where these options of `make_train_step` are impossible."""
    if double_forward not in DOUBLE_FORWARD:
        raise ValueError(f"double_forward must be one of {DOUBLE_FORWARD}, got {double_forward!r}.")
    if not 0 < fraction <= 1:
        raise ValueError(f"double_forward_fraction must be in (0, 1], got {fraction}.")
    if every < 1:
        raise ValueError(f"double_forward_every must be 1 or more, got {every}.")
    if double_forward == "off" and (fraction, every) != (1, 1):
        raise ValueError(
            "double_forward_fraction and double_forward_every need a second forward, and "
            "double_forward is 'off'."
        )


def make_train_step(
    apply_fn: Callable,
    tx: optax.GradientTransformation,
    loss_fn: Callable,
    *,
    double_forward: str = "rewrite",
    double_forward_fraction: float = 1.0,
    double_forward_every: int = 1,
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
        two forwards (see `mbn_jax.core.transport`), at no further cost.
      double_forward_fraction: how much of a device's batch the second forward sees, its first
        examples. The shift that it measures there stands for that of the whole batch, whose moments
        of the first forward move by it (a control variate), bounded as in
        `mbn_jax.core.transport`. Every array of the batch, and the input of every layer with
        statistics, must have the examples on its first axis, in their order, and the layers must be
        `MemorizedBatchNorm` or `AveragedBatchNorm`. 1: all of the batch, and nothing of this holds.
      double_forward_every: a second forward in every so many steps. The others are as 'off': their
        slots stay as the first forward wrote them, and their shift moves nothing.
      axis_name: named axis of `pmap` or of `shard_map(check_vma=False)`, over which gradients and
        metrics are averaged. Statistics are not: a layer built with `axis_name` syncs its own.
      rng_names: random streams that the model draws from in training.

    Returns:
      `step(state, batch) -> (state, metrics)`; metrics hold 'loss' and those of `loss_fn`, float32,
      averaged over devices.

    Raises:
      ValueError: for options that are impossible; the step, under `shard_map(check_vma=True)`, and
        where a layer cannot do what the mode or the fraction asks of it.

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
    check_second_forward(double_forward, double_forward_fraction, double_forward_every)

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

        def forward(params: PyTree, batch: PyTree = batch, **collections: PyTree):
            variables = {"params": params, "batch_stats": state.batch_stats, **collections}
            mutable = ["batch_stats", BATCH_MOMENTS]
            return loss_fn(
                functools.partial(apply_fn, variables, mutable=mutable, rngs=rngs), batch
            )

        part = batch
        recording: contextlib.AbstractContextManager = contextlib.nullcontext()
        if double_forward_fraction < 1:
            size = _examples(batch)
            rows = rows_of_part(size, double_forward_fraction)
            part, recording = jax.tree.map(lambda x: x[:rows], batch), record_part(size, rows)
        with recording:
            first_forward = jax.value_and_grad(forward, has_aux=True)
            (loss, (metrics, first)), grads = first_forward(state.params)
        if axis_name is not None:
            grads = lax.pmean(grads, axis_name)
        deltas, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, deltas)

        def after_first() -> PyTree:
            return first.get("batch_stats", state.batch_stats)

        def after_second() -> PyTree:
            handed: dict[str, PyTree] = {}
            if double_forward == "transport" or double_forward_fraction < 1:
                handed = _handed_over(first.get(BATCH_MOMENTS, {}), double_forward)
            _, (_, second) = forward(params, part, **handed)
            if handed:
                _check_first_used(
                    state.batch_stats, first, second, double_forward, double_forward_fraction
                )
            return second.get("batch_stats", state.batch_stats)

        if double_forward == "off":
            batch_stats = after_first()
        elif double_forward_every == 1:
            batch_stats = after_second()
        else:
            due = (state.step + 1) % double_forward_every == 0
            batch_stats = lax.cond(due, after_second, after_first)

        # As floats, because lax.pmean would turn integers into them on some paths only.
        metrics = {k: jnp.asarray(v, jnp.float32) for k, v in {"loss": loss, **metrics}.items()}
        if axis_name is not None:
            metrics = lax.pmean(metrics, axis_name)
        state = state.replace(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        return state, metrics

    return train_step


def _examples(batch: PyTree) -> int:
    """Returns how many examples a device's batch has; raises ValueError where arrays disagree."""
    shapes = [jnp.shape(x) for x in jax.tree.leaves(batch)]
    if len({shape[:1] for shape in shapes}) != 1 or () in shapes:
        raise ValueError(
            "double_forward_fraction needs the examples on the first axis of every array of the "
            f"batch, got arrays of {shapes}."
        )
    return shapes[0][0]


def _handed_over(recorded: PyTree, double_forward: str) -> PyTree:
    """Returns what the second forward finds of that which the first one recorded."""
    if double_forward == "rewrite":
        entries = traverse_util.flatten_dict(recorded)
        recorded = traverse_util.unflatten_dict(
            {
                (*path[:-1], WHOLE_TO_REWRITE if path[-1] == WHOLE else path[-1]): calls
                for path, calls in entries.items()
            }
        )
    return {FIRST_BATCH_MOMENTS: recorded}


def _check_first_used(
    batch_stats: PyTree, first: PyTree, second: PyTree, double_forward: str, fraction: float
) -> None:
    """Raises ValueError unless every call of every layer has used what it recorded."""

    def calls(updates: PyTree, name: str) -> dict[str, int]:
        entries = traverse_util.flatten_dict(updates.get(BATCH_MOMENTS, {}))
        return {"/".join(path[:-1]): len(x) for path, x in entries.items() if path[-1] == name}

    recorded, used = calls(first, WHOLE if fraction == 1 else PART), calls(second, FIRST_USED)
    written = layers_with_statistics(second.get("batch_stats", {}))
    layers = {
        path: written[path]["mean"] is not stats["mean"]  # Else it is frozen, or was not called.
        for path, stats in layers_with_statistics(batch_stats).items()
        # A whole batch needs nothing of the first forward but to move a memory.
        if fraction < 1 or {"count", "weight"} & set(stats)
    }
    left = sorted(
        path
        for path, is_written in layers.items()
        if recorded.get(path, 0) != used.get(path, 0) or (is_written and not used.get(path))
    )
    names = ", ".join(name or "the layer" for name in left)
    lifted = (
        f"Lifted transforms (nn.vmap, nn.scan) need {BATCH_MOMENTS!r} and {FIRST_BATCH_MOMENTS!r} "
        "in their variable_axes"
    )
    if left and fraction < 1:
        raise ValueError(
            "double_forward_fraction needs layers that pool batches (MemorizedBatchNorm, "
            f"AveragedBatchNorm), and cannot be used with: {names}. {lifted}."
        )
    if left or (not layers and double_forward == "transport"):
        raise ValueError(
            f"double_forward='transport' must move every memory, and cannot: "
            f"{names or 'no layer has a memory'}. {lifted}; norms without a memory take 'rewrite'."
        )
