"""The state of training."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

PyTree = Any


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
