"""An NNX model as a pure function of its variables, as `mbn_jax.make_train_step` takes one."""

import contextlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from flax.traverse_util import unflatten_dict

from mbn_jax.core.double_forward import BATCH_MOMENTS, FIRST_BATCH_MOMENTS, RECORDS, USED
from mbn_jax.nnx.memorized import FIRST_RECORDS, BatchMoments, MemorizedBatchNorm
from mbn_jax.nnx.trees import (
    Names,
    leaves_of,
    names_of,
    paths_of,
    subtree,
    values_of,
    write,
)
from mbn_jax.step.axes import has_axes, report_call
from mbn_jax.step.state import TrainState

PyTree = Any

SOWN = {nnx.variable_name_from_type(kind) for kind in (nnx.Intermediate, nnx.Perturbation)}
"""Collections of what a forward only shows."""


def functional(model: nnx.Module, *, wrt: Any = nnx.Param) -> tuple[Callable, dict[str, PyTree]]:
    """Makes of a model what `make_train_step` and `TrainState.create` take.

    The mode of the model is fixed: call `model.train()` before. Random streams are seeded anew in
    each forward, from the keys of the `TrainState`; a stream whose name is not among `rng_names`
    gets a key made from theirs. All other Variables stay as they are now.

    Args:
      model: the model, with `MemorizedBatchNorm` of `mbn_jax.nnx` or any other norm of NNX.
      wrt: filter of the Variables to train, as `nnx.Optimizer` takes it.

    Returns:
      `apply_fn(variables, *args, mutable, rngs, **kwargs)`, which calls the model as flax's
      `model.apply` does; and `{'params': ..., 'batch_stats': ...}`, nested dicts of arrays. The
      arrays are the model's own: a step that is jitted with `donate_argnums` takes them over, and
      `update_model` gives the model new ones.

    >>> import jax.numpy as jnp, optax
    >>> from mbn_jax import make_train_step
    >>> model = MemorizedBatchNorm(1, memory_size=2, rngs=nnx.Rngs(0))
    >>> apply_fn, variables = functional(model)
    >>> def loss_fn(apply, batch):
    ...     y, updates = apply(batch)
    ...     return jnp.mean((y - 1) ** 2), ({}, updates)
    >>> tx = optax.sgd(0.1)
    >>> state = TrainState.create(variables, tx, jax.random.key(0))
    >>> step = jax.jit(make_train_step(apply_fn, tx, loss_fn, double_forward='transport'))
    >>> state, metrics = step(state, jnp.array([[1.0], [3.0]]))
    >>> update_model(model, state)
    >>> model.mean[:, 0].tolist()
    [2.0, 0.0]
    """
    function = ModelFunction(model, wrt, lambda model, *args, **kwargs: model(*args, **kwargs))
    params = unflatten_dict(leaves_of(function.params))
    return function.apply, {"params": params, "batch_stats": function.batch_stats}


def update_model(model: nnx.Module, state: TrainState) -> None:
    """Writes parameters and statistics of a `TrainState` into the model that it was made from.

    Args:
      model: any model of that structure.
      state: of one device.

    Raises:
      ValueError: where an array has no place in the model.
    """
    write(model, {**leaves_of(state.params), **leaves_of(state.batch_stats)})


class ModelFunction:
    """A model as a function of its parameters and statistics.

    Attributes:
      params: the arrays of the Variables to train, an `nnx.State`.
      batch_stats: those of the statistics, nested dicts.
    """

    def __init__(self, model: nnx.Module, wrt: Any, call: Callable):
        """Splits a model.

        Args:
          model: the model.
          wrt: filter of the Variables to train.
          call: `call(model, *args, **kwargs)`, what applying the model means.
        """
        self._wrt, self._call = wrt, call
        self._graphdef, *states = nnx.split(model, wrt, nnx.BatchStat, ...)
        self.params, batch_stats, self._rest = map(nnx.as_pure, states)
        self.batch_stats = unflatten_dict(leaves_of(batch_stats))
        self._paths = {"params": paths_of(states[0]), "batch_stats": paths_of(states[1])}

    def apply(
        self,
        variables: Mapping[str, PyTree],
        *args: Any,
        mutable: bool | str | Sequence[str] = False,
        rngs: Mapping[str, jax.Array] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Calls the model with variables and random keys of the caller.

        Args:
          variables: 'params' and 'batch_stats', and within a training step the layers' records.
          *args: of the call.
          mutable: collections to return, named as `nnx.variable_name_from_type` names the types.
          rngs: random keys by stream; None: the streams go on from the model's own state.
          **kwargs: of the call.

        Returns:
          The outputs; or (outputs, updates) where `mutable` is not False.

        Raises:
          ValueError: for variables of another model, and where the call wrote a Variable that
            would be lost.
        """
        mutable = (mutable,) if isinstance(mutable, str) else mutable
        states = [self._state(variables, name) for name in ("params", "batch_stats")]
        model = nnx.merge(self._graphdef, *states, self._rest)
        if rngs is not None:
            _reseed(model, rngs)
        _report_axes(model)
        if mutable is False:
            return self._call(model, *args, **kwargs)
        names = ("batch_stats",) if mutable is True else tuple(mutable)
        if BATCH_MOMENTS in names:
            _put_records(model, variables)
        before = self._collections(model)
        with _explained_errors(BATCH_MOMENTS in names):
            outputs = self._call(model, *args, **kwargs)
        after = self._collections(model)
        _check_written(before, after, {*names, "batch_stats"})
        return outputs, {name: unflatten_dict(after[name]) for name in names if after.get(name)}

    def _state(self, variables: Mapping[str, PyTree], name: str) -> nnx.State:
        """Returns a collection with the paths of the model."""
        tree, paths = variables.get(name, {}), self._paths[name]
        if isinstance(tree, nnx.State):
            return tree
        leaves = leaves_of(tree)
        differing = ["/".join(names) for names in sorted(set(leaves) ^ set(paths))]
        if differing:
            raise ValueError(
                f"The {name!r} must be those of the model that was given to `functional`, and "
                f"differ in {', '.join(differing[:5])}."
            )
        return nnx.from_flat_state({paths[names]: leaf for names, leaf in leaves.items()})

    def _collections(self, model: nnx.Module) -> dict[str, dict[Names, Any]]:
        """Returns what the Variables of a model hold, but parameters and random streams."""
        fixed = nnx.Any(nnx.Param, self._wrt, nnx.RngState, lambda _, leaf: not _is_variable(leaf))
        records, _, stats, others = nnx.state(model, BatchMoments, fixed, nnx.BatchStat, ...)
        found = {
            "batch_stats": values_of(stats),
            BATCH_MOMENTS: {
                names: calls
                for names, calls in values_of(records).items()
                if calls and names[-1] in (RECORDS, USED)
            },
        }
        for path, variable in nnx.to_flat_state(others):
            name = nnx.variable_name_from_type(type(variable), allow_register=True)
            found.setdefault(name, {})[names_of(path)] = variable.get_value()
        return found


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def random_streams(model: nnx.Module) -> list[nnx.RngStream]:
    """Returns the random streams of a model."""
    return [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.RngStream)]


def _reseed(model: nnx.Module, rngs: Mapping[str, jax.Array]) -> None:
    """Gives every random stream of a model a new key."""
    tags = {stream.tag for stream in random_streams(model)}
    if tags and not rngs:
        raise ValueError(
            f"The model has random streams ({', '.join(sorted(tags))}), and rng_names is empty: "
            "each step would draw the same numbers; name one."
        )
    keys: dict[str, Any] = dict(rngs)
    for tag in tags - set(keys):
        first = next(iter(rngs.values()))
        keys[tag] = jax.random.fold_in(first, zlib.crc32(tag.encode()))
    nnx.reseed(model, policy="match_shape", **keys)


def _report_axes(model: nnx.Module) -> None:
    """Tells the training step which named axes the layers of a model sync over."""
    for path, module in nnx.iter_modules(model):
        if has_axes(module) and isinstance(getattr(module, "mean", None), nnx.BatchStat):
            training = not getattr(module, "use_running_average", False)
            report_call("/".join(names_of(path)), module, training=training)


def _put_records(model: nnx.Module, variables: Mapping[str, PyTree]) -> None:
    """Makes the layers record, and gives them what was recorded so far."""
    for path, layer in nnx.iter_modules(model):
        if isinstance(layer, MemorizedBatchNorm):
            so_far = subtree(variables.get(BATCH_MOMENTS, {}), names_of(path))
            first = subtree(variables.get(FIRST_BATCH_MOMENTS, {}), names_of(path))
            # Both exist before the call: transforms of NNX carry Variables of any content.
            for name in (RECORDS, USED):
                setattr(layer, name, BatchMoments(so_far.get(name, ())))
            if first:
                setattr(layer, FIRST_RECORDS, BatchMoments(first[RECORDS]))


def _check_written(
    before: Mapping[str, Mapping[Names, Any]],
    after: Mapping[str, Mapping[Names, Any]],
    kept: set[str],
) -> None:
    """Raises ValueError where a call wrote or made a Variable that the step would lose.

    What `sow` and `perturb` make is lost without harm, as in `flax.linen`.
    """
    for name in sorted({*before, *after} - kept - {BATCH_MOMENTS, *SOWN}):
        collections = before.get(name, {}), after.get(name, {})
        for names in sorted(set().union(*collections)):
            # What was written is another array: two tracers cannot be compared by value.
            old, new = ([id(x) for x in jax.tree.leaves(found.get(names))] for found in collections)
            if old != new:
                raise ValueError(
                    f"The model wrote {'/'.join(names)}, a Variable of the collection {name!r}, "
                    "and the step would lose it; if that does no harm, name it in mutable="
                    f"({name!r},)."
                )


@contextlib.contextmanager
def _explained_errors(records: bool) -> Iterator[None]:
    """Says what to do where a transform cannot carry the records of layers."""
    try:
        yield
    except TypeError as error:
        message = str(error)
        if not records or "same pytree structure" not in message or "tuple" not in message:
            raise
        raise ValueError(
            "double_forward='transport' and double_forward_fraction cannot be used with a memory "
            "that nnx.scan, nnx.fori_loop or nnx.while_loop carries from iteration to iteration, "
            "nor where the branches of nnx.cond or nnx.switch differ in the layers that they call. "
            "Use double_forward='rewrite', scan over the layers (in_axes=0), or move the layers "
            "out of the branches."
        ) from error
