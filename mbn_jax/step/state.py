"""The state that training carries from step to step."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from flax import struct

PyTree = Any


class TrainState(struct.PyTreeNode):
    """All that training carries from step to step, as one pytree of arrays.

    `flax.serialization` can write and read it: its key then becomes an array of integers.

    Attributes:
      step: int32 scalar, number of updates so far.
      params: the parameters.
      batch_stats: the statistics of the normalization layers; `{}` for a model without any.
      opt_state: the optimizer's state.
      key: random key of the run; each step folds its number into it.
    """

    step: jax.Array
    params: PyTree
    batch_stats: PyTree
    opt_state: optax.OptState
    key: jax.Array

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        _register_serialization(cls)

    @classmethod
    def create(
        cls, variables: PyTree, tx: optax.GradientTransformation, key: jax.Array
    ) -> "TrainState":
        """Makes the state before the first step.

        No two of its arrays share a buffer, so that the training step may take it over
        (`donate_argnums`). The parameters and the key are those that are given, without a copy: a
        step that takes the state over deletes them.

        Args:
          variables: what `model.init` returned, a dict or a `FrozenDict`.
          tx: the optimizer.
          key: random key of the run, from `jax.random.key`.

        Returns:
          The `TrainState` at step 0.

        Raises:
          ValueError: if the model has collections that a step would silently lose.
        """
        variables = flax.core.unfreeze(variables)
        unknown = set(variables) - {"params", "batch_stats"}
        if unknown:
            raise ValueError(
                "TrainState carries the collections 'params' and 'batch_stats', the model also has "
                f"{sorted(unknown)}. Take out what the model writes anew in each call, and name it "
                "in make_train_step(mutable=...); bind constants in apply_fn."
            )
        params = variables.get("params", {})
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=variables.get("batch_stats", {}),
            opt_state=_without_shared_buffers(tx.init(params), params),
            key=key,
        )


def _without_shared_buffers(opt_state: PyTree, params: PyTree) -> PyTree:
    """Copies arrays of an optimizer's state that are the parameters themselves, or there twice."""
    seen = {id(leaf) for leaf in jax.tree.leaves(params)}

    def own(leaf: Any) -> Any:
        if id(leaf) in seen and isinstance(leaf, jax.Array):
            return jnp.array(leaf, copy=True)
        seen.add(id(leaf))
        return leaf

    return jax.tree.map(own, opt_state)


def _to_state_dict(state: TrainState) -> dict[str, Any]:
    fields = {name: getattr(state, name) for name in state.__dataclass_fields__}
    if jax.dtypes.issubdtype(state.key.dtype, jax.dtypes.prng_key):
        fields["key"] = jax.random.key_data(state.key)
    return {name: flax.serialization.to_state_dict(value) for name, value in fields.items()}


def _from_state_dict(state: TrainState, fields: dict[str, Any]) -> TrainState:
    key, names = fields["key"], set(state.__dataclass_fields__) - {"key"}
    if jax.dtypes.issubdtype(state.key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(jnp.asarray(key), impl=jax.random.key_impl(state.key))
    restored = {
        name: flax.serialization.from_state_dict(getattr(state, name), fields[name], name=name)
        for name in names
    }
    return state.replace(key=key, **restored)


def _register_serialization(cls: type) -> None:
    flax.serialization.register_serialization_state(
        cls, _to_state_dict, _from_state_dict, override=True
    )


_register_serialization(TrainState)
