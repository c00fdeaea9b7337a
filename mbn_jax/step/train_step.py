"""The training step with Double Forward: update, then a second forward under the new parameters.

Works for any Flax model and any normalization layer that keeps `batch_stats`.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict
from jax import lax

from mbn_jax.core.batch_stats import layers_with_statistics, layout_of, overlay
from mbn_jax.core.double_forward import (
    BATCH_MOMENTS,
    FIRST_BATCH_MOMENTS,
    RECORDS,
    USED,
    SecondForward,
    forwards_of,
)
from mbn_jax.core.moments import AxisName
from mbn_jax.core.moving_average import BACKWARD_SUMS, zero_sums
from mbn_jax.step.axes import LayerCall, check_axes, check_axis_bound, layer_calls
from mbn_jax.step.forward import BoundApply, run_loss
from mbn_jax.step.state import TrainState

PyTree = Any


def make_train_step(
    apply_fn: Callable,
    tx: optax.GradientTransformation,
    loss_fn: Callable,
    *,
    double_forward: str = "rewrite",
    double_forward_fraction: float = 1.0,
    axis_name: AxisName | None = None,
    local_statistics: bool = False,
    frozen_statistics: bool = False,
    mutable: Sequence[str] = (),
    rng_names: Sequence[str] = ("dropout",),
) -> Callable[[TrainState, PyTree], tuple[TrainState, dict[str, jax.Array]]]:
    """Makes the pure training step of one device. Jit it, or map it over devices.

    From parameters p and statistics S:

        1. loss and gradients of the batch under (p, S); the statistics it writes are dropped
        2. p' = optimizer update of p
        3. second forward of the same batch under (p', S), no gradient, same random keys: writes S'
        4. the new state is (p', S')

    Because the second forward starts from S, it *rewrites* the batch's contribution instead of
    adding one, and no layer needs to know. The compiler drops the part of it that no statistic
    depends on: the loss, the classifier, all of it for a model without `batch_stats`.

    Args:
      apply_fn: `model.apply`.
      tx: the optimizer. Its `update` also gets `value` (the loss), `grad` and `value_fn` (the loss
        of this batch as a function of the parameters), if it takes them.
      loss_fn: `loss_fn(apply, batch) -> (loss, (metrics, updates))`, a pure function, traced once
        for each forward. `apply` is `model.apply` bound to the variables, the mutable collections
        and the random keys of this forward; it returns `(outputs, updates)`. `metrics` is a dict of
        scalars, `updates` is what the last apply returned. A loss may apply the model several
        times: each apply starts from the statistics that the one before wrote.
      double_forward: 'rewrite', as above; 'off': S' is what step 1 wrote; or 'transport': as
        'rewrite', and every `MemorizedBatchNorm` moves its whole memory by the shift between the
        two forwards (see `mbn_jax.core.transport`), at no further cost.
      double_forward_fraction: share of a device's batch that the second forward sees: its first
        examples. The shift that it measures there stands for that of the whole batch, whose moments
        of the first forward move by it (a control variate), bounded as in `mbn_jax.core.transport`.
        Every array of the batch, and the input of every layer with statistics, must have the
        examples on its first axis, in their order, and the layers must be `MemorizedBatchNorm`.
      axis_name: named axis of `pmap` or of `shard_map(check_vma=False)`, over which gradients and
        metrics are averaged. Statistics are not: a layer built with `axis_name` syncs its own.
      local_statistics: whether each device may keep statistics of its own (layers without
        `axis_name`, or with `axis_index_groups`). Pool them over devices before inference.
      frozen_statistics: True: no error where no layer writes statistics (all norms are frozen).
      mutable: further collections that the model may write, such as sown auxiliary losses.
        `loss_fn` finds them in the updates of each apply; the step keeps none of them.
      rng_names: random streams that the model draws from in training.

    Returns:
      `train_step(state, batch) -> (state, metrics)`; metrics hold 'loss' and those of `loss_fn`,
      float32, averaged over devices.

    Raises:
      ValueError: for impossible options. The step raises ValueError while it is traced: for a state
        that is not a `TrainState`, under `shard_map(check_vma=True)`, where `loss_fn` returns
        something else, where step and layers disagree about devices, and where a layer cannot do
        what the mode or the fraction asks of it.

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
    second = SecondForward(double_forward, double_forward_fraction)
    mutable, rng_names = _names(mutable), _names(rng_names)
    extra_names = _extra_arguments(tx)

    def train_step(state: TrainState, batch: PyTree) -> tuple[TrainState, dict[str, jax.Array]]:
        _check_state(state)
        _check_varying_axes(batch)
        check_axis_bound(axis_name)
        rngs = _step_keys(state, axis_name, rng_names)
        size = _batch_size(batch) if second.is_partial else 0
        # Layers that average backward statistics get those of this step by their gradients.
        sinks = zero_sums(state.batch_stats)

        def forward(params: PyTree, sinks: PyTree, batch: PyTree, **collections: PyTree):
            variables = {"params": params, "batch_stats": state.batch_stats, **collections}
            if sinks:
                variables[BACKWARD_SUMS] = sinks
            apply = BoundApply(apply_fn, variables, mutable, rngs, records=second.needs_records)
            return run_loss(loss_fn, apply, batch, frozen=frozen_statistics)

        with forwards_of(second, size), layer_calls() as calls:
            first_forward = jax.value_and_grad(forward, argnums=(0, 1), has_aux=True)
            (loss, (metrics, first)), (grads, sums) = first_forward(state.params, sinks, batch)
        check_axes(calls, axis_name, local_statistics=local_statistics)
        # As floats, because lax.pmean would turn integers into them on some paths only.
        metrics = {k: jnp.asarray(v, jnp.float32) for k, v in {"loss": loss, **metrics}.items()}
        if axis_name is not None:
            grads, metrics = lax.pmean((grads, metrics), axis_name)
        extra = {
            "value": metrics["loss"],
            "grad": grads,
            "value_fn": _value_fn(lambda params: forward(params, sinks, batch)[0], axis_name),
        }
        taken = {name: extra[name] for name in extra_names}
        deltas, opt_state = tx.update(grads, state.opt_state, state.params, **taken)
        params = optax.apply_updates(state.params, deltas)

        written = first
        if double_forward != "off":
            seen, records = batch, {}
            if second.is_partial:
                seen = jax.tree.map(lambda x: x[: second.num_examples(size)], batch)
            if second.needs_records:
                records = {FIRST_BATCH_MOMENTS: first[BATCH_MOMENTS]}
            with forwards_of(second):  # Not differentiated: it needs no sinks.
                _, (_, written) = forward(params, {}, seen, **records)
            if second.needs_records:
                _check_first_used(state.batch_stats, first, written, second, calls)
        state = state.replace(
            step=state.step + 1,
            params=params,
            batch_stats=overlay(written["batch_stats"], sums),
            opt_state=opt_state,
        )
        return state, metrics

    return train_step


def _names(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _check_state(state: Any) -> None:
    if not isinstance(state, TrainState):
        raise ValueError(
            f"The step expected a mbn_jax.TrainState, got {type(state).__module__}."
            f"{type(state).__name__}; make one with TrainState.create(variables, tx, key)."
        )


def _check_varying_axes(batch: PyTree) -> None:
    """Raises ValueError under `shard_map(check_vma=True)`, where gradients would come out wrong."""

    def varying(x: Any) -> Any:
        aval = jax.typeof(x)
        if hasattr(aval, "manual_axis_type"):
            return aval.manual_axis_type.varying
        return getattr(aval, "vma", ())  # JAX before 0.10.

    if any(varying(x) for x in jax.tree.leaves(batch)):
        raise ValueError(
            "The step runs under jax.shard_map with check_vma=False only: with its check, "
            "gradients averaged by lax.pmean come out multiplied by the number of devices."
        )


def _step_keys(
    state: TrainState, axis_name: AxisName | None, rng_names: Sequence[str]
) -> dict[str, jax.Array]:
    """Returns the random key of each stream, for this step and device."""
    key = jax.random.fold_in(state.key, state.step)
    if axis_name is not None:
        key = jax.random.fold_in(key, lax.axis_index(axis_name))
    return {name: jax.random.fold_in(key, i) for i, name in enumerate(rng_names)}


def _extra_arguments(tx: optax.GradientTransformation) -> list[str]:
    """Returns which of the step's extra arguments an optimizer takes."""
    names = ["value", "grad", "value_fn"]
    taken = inspect.signature(tx.update).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        return names
    return [name for name in names if name in taken]


def _value_fn(loss: Callable[[PyTree], jax.Array], axis_name: AxisName | None) -> Callable:
    """Returns the loss of a batch as a function of the parameters, for optimizers that search.

    Over devices, its value and its gradient are averages, as those of the step are.
    """
    if axis_name is None:
        return loss

    @jax.custom_vjp
    def value(params: PyTree) -> jax.Array:
        return lax.pmean(loss(params), axis_name)

    def forward(params: PyTree) -> tuple[jax.Array, PyTree]:
        local, grads = jax.value_and_grad(loss)(params)
        return lax.pmean((local, grads), axis_name)

    def backward(grads: PyTree, cotangent: jax.Array) -> tuple[PyTree]:
        return (jax.tree.map(lambda g: g * cotangent, grads),)

    value.defvjp(forward, backward)
    return value


def _batch_size(batch: PyTree) -> int:
    """Returns how many examples a device's batch has; raises ValueError where arrays disagree."""
    shapes = [jnp.shape(x) for x in jax.tree.leaves(batch)]
    if len({shape[:1] for shape in shapes}) != 1 or () in shapes:
        raise ValueError(
            "double_forward_fraction needs the examples on the first axis of every array of the "
            f"batch, got arrays of {shapes}."
        )
    return shapes[0][0]


def _check_first_used(
    batch_stats: PyTree,
    first: Mapping[str, PyTree],
    written: Mapping[str, PyTree],
    second: SecondForward,
    calls: Mapping[str, LayerCall],
) -> None:
    """Raises ValueError unless every call of every layer has used its own record."""
    records = _calls(first, RECORDS)
    recorded = {path: len(found) for path, found in records.items()}
    used = {path: len(found) for path, found in _calls(written, USED).items()}
    after = layers_with_statistics(written["batch_stats"])
    frozen = {path for path, call in calls.items() if not call.training}
    layers = {
        # Else it was not called.
        path: after[path]["mean"] is not stats["mean"] and path not in frozen
        for path, stats in layers_with_statistics(batch_stats).items()
        # A whole batch needs nothing of the first forward but to move a memory.
        if second.is_partial or "rule" in stats
    }
    left = sorted(
        path
        for path, is_written in layers.items()
        if recorded.get(path, 0) != used.get(path, 0) or (is_written and not used.get(path))
    )
    names = ", ".join(name or "the layer" for name in left)
    lifted = (
        f"Lifted transforms (nn.vmap, nn.scan) need {BATCH_MOMENTS!r} and {FIRST_BATCH_MOMENTS!r} "
        "in their variable_axes; nnx.bridge.ToNNX and ToLinen cannot hand them on"
    )
    if left and second.is_partial:
        raise ValueError(
            "double_forward_fraction needs layers that pool batches (MemorizedBatchNorm), and "
            f"cannot be used with: {names}. {lifted}."
        )
    if left or (not layers and second.moves_memory):
        raise ValueError(
            f"double_forward='transport' must move every memory, and cannot: "
            f"{names or 'no layer has a memory'}. {lifted}; norms without a memory take 'rewrite'."
        )
    _check_not_carried(batch_stats, records)


def _check_not_carried(batch_stats: PyTree, records: Mapping[str, Sequence[Any]]) -> None:
    """Raises ValueError where one memory goes through the iterations of an `nn.scan`.

    Its slots would have to move iteration by iteration, and each iteration sees only its own
    record.
    """
    carried = []
    for path, stats in layers_with_statistics(batch_stats).items():
        if path not in records:
            continue
        layout = layout_of(stats)
        for record in records[path]:
            leading = (layout.stacked or 0) + layout.has_groups
            if record.batch.mean.ndim != leading + (layout.feature_rank or 0):
                carried.append(path or "the layer")
    if carried:
        raise ValueError(
            "double_forward='transport' and double_forward_fraction cannot be used with a memory "
            f"that nn.scan carries from iteration to iteration: {', '.join(sorted(set(carried)))}. "
            "Use double_forward='rewrite', or unroll the loop."
        )


def _calls(updates: Mapping[str, PyTree], name: str) -> dict[str, Sequence[Any]]:
    """Returns what each call of each layer recorded under a name, by the layer's path."""
    recorded = flatten_dict(updates.get(BATCH_MOMENTS, {}))
    return {
        "/".join(path): calls
        for (*path, key), calls in recorded.items()
        if key == name and isinstance(calls, tuple)
    }
