"""One forward of a training step: `loss_fn` with the model bound, and checks of what it returns."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import tracers

from mbn_jax.core.double_forward import BATCH_MOMENTS

PyTree = Any

EXPECTED = "loss_fn must return (loss, (metrics, updates))"


class BoundApply:
    """The `apply` that `loss_fn` gets: the model with variables and random keys bound.

    Each call starts from the statistics that the call before wrote, so that a loss which applies
    the model twice (to real and generated images, to both inputs of a siamese network) records both
    batches. Calls that write no statistics (`train=False`) change nothing.
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
        self._mutable = ["batch_stats", *([BATCH_MOMENTS] if records else []), *mutable]
        self._rngs = dict(rngs)
        self._trace = tracers.current_trace()
        self.calls = 0
        self.outdated = [self.batch_stats]

    @property
    def batch_stats(self) -> PyTree:
        """The statistics after the calls so far."""
        return self._variables.get("batch_stats", {})

    @property
    def records(self) -> PyTree:
        """What the layers recorded in the calls so far."""
        return self._variables.get(BATCH_MOMENTS, {})

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        """Applies the model; returns (outputs, updates)."""
        bound = {"mutable", "rngs"} & set(kwargs)
        if bound:
            raise ValueError(
                f"apply of loss_fn has {', '.join(sorted(bound))} bound already; leave it out, and "
                "name further collections or streams in make_train_step (mutable, rng_names)."
            )
        rngs = self._rngs
        if self.calls:
            rngs = {name: jax.random.fold_in(key, self.calls) for name, key in rngs.items()}
        self.calls += 1
        outputs, updates = self._apply_fn(
            self._variables, *args, mutable=self._mutable, rngs=rngs, **kwargs
        )
        updates = dict(updates)
        written = updates.get("batch_stats", {})
        if not is_same(written, self.batch_stats):
            if tracers.current_trace() != self._trace:
                raise ValueError(
                    "loss_fn applies the model in training mode inside of jax.jit, jax.checkpoint, "
                    "jax.grad, jax.vmap or a loop of jax.lax, where its statistics could be lost. "
                    "Apply it outside of them; inside of the model nn.remat, nn.jit, nn.vmap and "
                    "nn.scan are fine, and so is train=False anywhere."
                )
            self.outdated.append(written)
            self._variables["batch_stats"] = written
        if BATCH_MOMENTS in updates:
            self._variables[BATCH_MOMENTS] = updates[BATCH_MOMENTS]
        return outputs, updates


def run_loss(
    loss_fn: Callable, apply: BoundApply, batch: PyTree, *, frozen: bool
) -> tuple[jax.Array, tuple[dict[str, jax.Array], dict[str, PyTree]]]:
    """Calls `loss_fn` and checks what it returns, while it is traced.

    Args:
      loss_fn: as `make_train_step` takes it.
      apply: the bound model, not called yet.
      batch: what `loss_fn` is called with.
      frozen: True: no error where no layer writes statistics.

    Returns:
      The loss, the metrics, and 'batch_stats' with the records of the layers.

    Raises:
      ValueError: if the return value is malformed, or would drop statistics.
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
    if jax.tree.leaves(apply.outdated[0]):
        _check_updates(updates, apply, frozen)
    elif jax.tree.leaves(updates.get("batch_stats", {})):
        raise ValueError(
            "The model wrote batch_stats, and the TrainState has none; create it from all that "
            "model.init returned."
        )
    statistics = {BATCH_MOMENTS: apply.records, "batch_stats": updates.get("batch_stats", {})}
    return loss, (dict(metrics), statistics)


def _check_metrics(metrics: Mapping[str, Any]) -> None:
    if "loss" in metrics:
        raise ValueError(
            "The metrics of loss_fn hold 'loss', under which the step reports its own; rename it."
        )
    if "batch_stats" in metrics:
        raise ValueError(f"{EXPECTED}, got the updates in place of the metrics; swap them.")
    for name, value in metrics.items():
        is_number = (jax.tree_util.all_leaves([value]) and hasattr(value, "dtype")) or isinstance(
            value, int | float
        )
        if not is_number or jnp.ndim(value):
            raise ValueError(f"The metric {name!r} must be a scalar, got {_described(value)}.")


def _check_updates(updates: Mapping[str, Any], apply: BoundApply, frozen: bool) -> None:
    """Raises ValueError where the handed-back statistics are not those that the model wrote."""
    before = apply.outdated[0]
    if not apply.calls:
        raise ValueError(f"{EXPECTED}; loss_fn never called apply, so no statistics were written.")
    if "batch_stats" not in updates:
        raise ValueError(
            "The updates of loss_fn must hold 'batch_stats', as the updates of apply do; got "
            f"{sorted(updates) or 'no collection'}. Hand back the updates as apply returned them."
        )
    written = updates["batch_stats"]

    def described(x: Any) -> tuple:
        return jnp.shape(x), jnp.result_type(x)

    if jax.tree.map(described, written) != jax.tree.map(described, before):
        raise ValueError(
            "The batch_stats of loss_fn's updates must have the layers, shapes and dtypes of the "
            "TrainState's; start from the variables of the same model, and hand back the updates "
            "of one apply as they are, not a stack of several."
        )
    if is_same(written, apply.batch_stats):
        if not frozen and is_same(written, before):
            raise ValueError(
                "No layer wrote statistics: loss_fn must apply the model in training mode "
                "(train=True, or use_running_average=False; in NNX model.train()). To train around "
                "frozen statistics, give make_train_step frozen_statistics=True."
            )
    elif any(is_same(written, earlier) for earlier in apply.outdated):
        raise ValueError(
            "loss_fn applies the model several times and handed back the updates of an earlier "
            "apply; hand back those of the last one, which hold all statistics."
        )


def is_same(tree: PyTree, other: PyTree) -> bool:
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
