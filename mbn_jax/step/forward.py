"""One forward of a training step: `loss_fn` with the model bound, and checks of what it returns."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from mbn_jax.core.double_forward import BATCH_MOMENTS
from mbn_jax.core.moments import AxisName

PyTree = Any

EXPECTED = "loss_fn must return (loss, (metrics, updates))"


class BoundApply:
    """The `apply` that `loss_fn` gets: the model with variables and random keys bound.

    Each call starts from the statistics that the call before wrote, so that a loss which applies
    the model twice (to real and generated images, to both inputs of a siamese network) records both
    batches.
    """

    def __init__(
        self,
        apply_fn: Callable,
        variables: Mapping[str, PyTree],
        mutable: Sequence[str],
        rngs: Mapping[str, jax.Array],
        *,
        records: bool,
    ):
        """Applies nothing yet.

        Args:
          apply_fn: `model.apply`.
          variables: collections that the first call starts from.
          mutable: collections that the model may write, beside the statistics.
          rngs: random keys by stream.
          records: whether layers record the moments of their batches.
        """
        self._apply_fn = apply_fn
        self._variables = dict(variables)
        # What each call takes over from the one before.
        self._statistics = ["batch_stats", *([BATCH_MOMENTS] if records else [])]
        self._mutable = [*self._statistics, *mutable]
        self._rngs = dict(rngs)
        self.updates: list[PyTree] = []

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        """Applies the model; returns (outputs, updates)."""
        rngs = self._rngs
        if self.updates:
            rngs = {name: jax.random.fold_in(key, len(self.updates)) for name, key in rngs.items()}
        outputs, updates = self._apply_fn(
            self._variables, *args, mutable=self._mutable, rngs=rngs, **kwargs
        )
        updates = dict(updates)
        self._variables |= self.statistics_in(updates)
        self.updates.append(updates)
        return outputs, updates

    def statistics_in(self, updates: PyTree) -> dict[str, PyTree]:
        """Returns the statistics and records among the updates."""
        return {name: updates[name] for name in self._statistics if name in updates}


def run_loss(
    loss_fn: Callable, apply: BoundApply, batch: PyTree, batch_stats: PyTree, *, frozen: bool
) -> tuple[jax.Array, tuple[dict[str, jax.Array], dict[str, PyTree]]]:
    """Calls `loss_fn` and checks what it returns, while it is traced.

    Args:
      loss_fn: as `make_train_step` takes it.
      apply: the bound model.
      batch: what `loss_fn` is called with.
      batch_stats: the statistics that the forward started from.
      frozen: whether no layer has to write statistics.

    Returns:
      The loss, the metrics, and the statistics and records that the model wrote.

    Raises:
      ValueError: in a sentence, for anything that would lose statistics without a word.
    """
    with _explained_errors():
        returned = loss_fn(apply, batch)
    if not (isinstance(returned, tuple) and len(returned) == 2):
        raise ValueError(f"{EXPECTED}, got {_described(returned)}.")
    loss, aux = returned
    if not (isinstance(aux, tuple | list) and len(aux) == 2):
        raise ValueError(
            f"{EXPECTED}, got {_described(aux)} in place of (metrics, updates); hand back the "
            "updates that apply returned."
        )
    metrics, updates = aux
    if not isinstance(updates, Mapping) or not isinstance(metrics, Mapping):
        raise ValueError(
            f"{EXPECTED} with dicts of metrics and updates, got {_described(metrics)} and "
            f"{_described(updates)}."
        )
    if jnp.ndim(loss):
        raise ValueError(f"The loss must be a scalar, got shape {jnp.shape(loss)}; average it.")
    _check_metrics(metrics)
    if jax.tree.leaves(batch_stats):
        _check_updates(updates, apply.updates, batch_stats, frozen)
    elif jax.tree.leaves(updates.get("batch_stats", {})):
        raise ValueError(
            "The model wrote batch_stats, and the TrainState has none; create it from all that "
            "model.init returned."
        )
    return loss, (dict(metrics), apply.statistics_in(updates))


def _check_metrics(metrics: Mapping[str, Any]) -> None:
    if "loss" in metrics:
        raise ValueError(
            "The metrics of loss_fn hold 'loss', under which the step reports its own; rename it."
        )
    if "batch_stats" in metrics:
        raise ValueError(f"{EXPECTED}, got the updates in place of the metrics; swap them.")
    for name, value in metrics.items():
        if not jax.tree_util.all_leaves([value]) or jnp.ndim(value):
            raise ValueError(f"The metric {name!r} must be a scalar, got {_described(value)}.")


def _check_updates(
    updates: Mapping[str, Any], applied: Sequence[PyTree], batch_stats: PyTree, frozen: bool
) -> None:
    """Raises ValueError where the handed-back statistics are not those that the model wrote."""
    if not applied:
        raise ValueError(f"{EXPECTED}; loss_fn never called apply, so no statistics were written.")
    if "batch_stats" not in updates:
        raise ValueError(
            "The updates of loss_fn must hold 'batch_stats', as the updates of apply do; got "
            f"{sorted(updates) or 'no collection'}. Hand back the updates as apply returned them."
        )
    written = updates["batch_stats"]
    if jax.tree.map(jnp.shape, written) != jax.tree.map(jnp.shape, batch_stats):
        raise ValueError(
            "The batch_stats of loss_fn's updates must have the layers and shapes of the "
            "TrainState's; start from the variables of the same model, and hand back the updates "
            "of one apply, not a stack of several."
        )
    for earlier in applied[:-1]:
        if _is_same(written, earlier.get("batch_stats")):
            raise ValueError(
                "loss_fn applies the model several times and handed back the updates of an earlier "
                "apply; hand back those of the last one, which hold all statistics."
            )
    if not frozen and _is_same(written, batch_stats):
        raise ValueError(
            "No layer wrote statistics: loss_fn must apply the model in training mode (train=True, "
            "or use_running_average=False; in NNX model.train()). To train around frozen "
            "statistics, give make_train_step frozen_statistics=True."
        )


def _is_same(tree: PyTree, other: PyTree) -> bool:
    """Returns whether two trees hold the very same arrays."""
    leaves, others = jax.tree.leaves(tree), jax.tree.leaves(other)
    return len(leaves) == len(others) and all(a is b for a, b in zip(leaves, others, strict=True))


def _described(value: Any) -> str:
    """Returns in words what a value is, for a message."""
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, Mapping):
        return f"a dict with {', '.join(map(repr, sorted(map(str, value)))) or 'no entries'}"
    if isinstance(value, jax.Array):
        return f"an array of shape {jnp.shape(value)}"
    return f"a {type(value).__name__}"


@contextlib.contextmanager
def _explained_errors() -> Iterator[None]:
    """Says what to do about errors of JAX that layers with statistics cause."""
    try:
        yield
    except NameError as error:
        if "unbound axis name" not in str(error):
            raise
        raise ValueError(
            f"A layer syncs over a named axis that is not bound ({error}); map the step over it "
            "with jax.pmap or jax.shard_map and give make_train_step the same axis_name, or leave "
            "the layer's axis_name out."
        ) from error
    except TypeError as error:
        if "branch outputs" not in str(error) or BATCH_MOMENTS not in str(error):
            raise
        raise ValueError(
            "double_forward='transport' and double_forward_fraction need every branch of nn.cond "
            "and nn.switch to call the same layers with statistics; use 'rewrite', or move the "
            "layers out of the branches."
        ) from error


def check_axis_bound(axis_name: AxisName | None) -> None:
    """Raises ValueError where the step's named axis is not bound."""
    if axis_name is None:
        return
    try:
        lax.axis_index(axis_name)
    except NameError as error:
        raise ValueError(
            f"axis_name={axis_name!r} of make_train_step is not bound; map the step over it with "
            "jax.pmap(step, axis_name=...) or jax.shard_map, or leave axis_name out."
        ) from error


_axes_found: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar(
    "axes_found", default=None
)


def report_axes(path: str, layer: Any) -> None:
    """Tells `axes_of_layers` the named axis of a layer with batch statistics; nothing outside it.

    Args:
      path: names that lead to the layer, separated by '/'.
      layer: with `axis_name` and `axis_index_groups`.
    """
    found = _axes_found.get()
    if found is not None:
        found[path or type(layer).__name__] = (layer.axis_name, layer.axis_index_groups)


def has_axes(layer: Any) -> bool:
    """Returns whether a layer has the attributes of a normalization layer that can sync."""
    return all(hasattr(layer, name) for name in ("axis_name", "axis_index_groups", "axis"))


@contextlib.contextmanager
def axes_of_layers() -> Iterator[dict[str, Any]]:
    """Collects the named axes of the layers with batch statistics that are called within.

    Layers of linen are found here; an `apply_fn` of another API calls `report_axes`.

    Yields:
      For each layer, by path, its (axis_name, axis_index_groups); filled while a forward is traced.
    """
    found: dict[str, Any] = {}

    def interceptor(call, args, kwargs, context):
        module = context.module
        if (
            context.method_name == "__call__"
            and has_axes(module)
            and module.has_variable("batch_stats", "mean")
        ):
            report_axes("/".join(module.path), module)
        return call(*args, **kwargs)

    token = _axes_found.set(found)
    try:
        with nn.intercept_methods(interceptor):
            yield found
    finally:
        _axes_found.reset(token)


def check_axes(
    layers: Mapping[str, Any], axis_name: AxisName | None, *, local_statistics: bool
) -> None:
    """Checks that step and layers mean the same devices.

    Args:
      layers: from `axes_of_layers`.
      axis_name: the step's.
      local_statistics: whether each device may keep statistics of its own.

    Raises:
      ValueError: naming the layers.
    """
    names = {name for name, _ in layers.values() if name is not None}
    for name in sorted(names - {axis_name}, key=str):
        if axis_name is None and _is_bound(name):
            raise ValueError(
                f"The layers sync over {name!r}, and make_train_step has no axis_name: gradients "
                f"would differ between devices; give it axis_name={name!r}."
            )
    if axis_name is None or local_statistics:
        return
    local = sorted(path for path, (name, groups) in layers.items() if name is None or groups)
    if local:
        raise ValueError(
            f"make_train_step has axis_name={axis_name!r}, and these layers keep statistics of "
            f"their own on each device: {', '.join(local)}. Give the layers the same axis_name to "
            "sync them, or give make_train_step local_statistics=True and pool the batch_stats of "
            "all devices before inference (mbn_jax.pool_batch_stats)."
        )


def _is_bound(axis_name: AxisName) -> bool:
    try:
        lax.axis_index(axis_name)
    except NameError:
        return False
    return True
