"""Memorized Batch Normalization as a drop-in for `flax.nnx.BatchNorm`."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.nn import initializers

from mbn_jax.core.double_forward import RECORDS, USED, current_forwards
from mbn_jax.core.layers import (
    EMPTY,
    check_memorized,
    check_memory,
    counts_steps,
    memory_arrays,
    rule_of_call,
)
from mbn_jax.core.moments import Array, AxisName, Moments, Schedule
from mbn_jax.core.normalization import FirstForward, memorize
from mbn_jax.nnx.layer import NormLayer

FIRST_RECORDS = "first_records"
"""Attribute of a layer in the second forward: what its calls recorded in the first one."""


class BatchMoments(nnx.BatchStat):
    """What the calls of a layer record, as a tuple; only while a training step is traced.

    Derived from `nnx.BatchStat`, so that filters of `nnx.StateAxes` treat it as the statistics.
    """


class MemorizedBatchNorm(NormLayer):
    """Batch normalization by the pooled statistics of the last k mini-batches, for `flax.nnx`.

    Replaces `flax.nnx.BatchNorm` by changing one name (and dropping `momentum`). It computes what
    `mbn_jax.MemorizedBatchNorm` computes, which documents the mathematics. `mean`, `var`, `count`
    (or `weight`) and `rule` are Variables of type `nnx.BatchStat`; so is `steps` where a schedule
    needs it.

    Use with `mbn_jax.nnx.make_train_step`, or without Double Forward in any training loop.

    Args:
      num_features: number of input features; a sequence where `axis` is one.
      memory_size: k, the batches in the pool, the current one included, as for the linen layer: a
        number, a traced value, a function of the training calls, or None. To change it in a model
        that exists, assign `nnx.data(value)`.
      decay: in (0, 1], weight of a slot relative to the next newer one, or a function likewise.
      use_running_average: if True, normalize by the memory and leave it alone; `model.train()` and
        `model.eval()` set it, and a flag in the call takes precedence.
      axis: the feature axis or axes; all others are reduced.
      epsilon: added to the variance.
      dtype: dtype of the result; default: from the input and the parameters. Statistics are
        float32, or wider (float64, complex) where `dtype` or `param_dtype` are.
      param_dtype: dtype of scale and bias.
      use_bias: add a learned bias.
      use_scale: multiply by a learned scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: named axis over which the batch is spread; statistics are those of the whole batch.
      axis_index_groups: groups of indices within that axis, each with statistics of its own.
      use_fast_variance: moments in one pass around the mean of the memory.
      force_float32_reductions: if False, statistics are kept in `param_dtype`.
      memory_capacity: slots that the memory has room for; default: `memory_size`.
      gradient: 'auto', 'renorm' or 'through' (see `mbn_jax.core.gradient`).
      bias_metadata: metadata of the bias Variable.
      scale_metadata: metadata of the scale Variable.
      rngs: random streams, for the initializers.

    Raises:
      ValueError: on construction, for an impossible option.

    >>> layer = MemorizedBatchNorm(1, memory_size=4, rngs=nnx.Rngs(0))
    >>> layer(jnp.array([[1.0], [3.0]])).round(3).tolist()
    [[-1.0], [1.0]]
    >>> layer.mean[:, 0].tolist()
    [2.0, 0.0, 0.0, 0.0]
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        memory_size: Schedule | None = 64,
        decay: Schedule = 0.97,
        use_running_average: bool | None = False,
        axis: int | Sequence[int] = -1,
        epsilon: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Any = initializers.zeros,
        scale_init: Any = initializers.ones,
        axis_name: AxisName | None = None,
        axis_index_groups: Sequence[Sequence[int]] | None = None,
        use_fast_variance: bool = True,
        force_float32_reductions: bool = True,
        memory_capacity: int | None = None,
        gradient: str = "auto",
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        rngs: nnx.Rngs,
    ):
        super().__init__(
            num_features,
            use_running_average=use_running_average,
            axis=axis,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=scale_init,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            force_float32_reductions=force_float32_reductions,
            bias_metadata=bias_metadata,
            scale_metadata=scale_metadata,
            rngs=rngs,
        )
        self.memory_size = memory_size
        self.decay = decay
        self.memory_capacity = memory_capacity
        self.gradient = gradient
        check_memorized(self)
        arrays = memory_arrays(
            self, self._options(), self._feature_shape(), self._statistics_dtype()
        )
        for name, array in arrays.items():
            setattr(self, name, nnx.BatchStat(jnp.full(array.shape, EMPTY[name], array.dtype)))
        if counts_steps(self):
            self.steps = nnx.BatchStat(jnp.zeros((), jnp.int32))
        *_, last = arrays.values()
        self.rule = nnx.BatchStat(self._rule(last.dtype, inference=False)[1])

    def __call__(
        self,
        x: Array,
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
    ) -> Array:
        """Normalizes `x` by the pooled statistics.

        Args:
          x: inputs, `[..., features]` or as `axis` says, floating point or complex.
          use_running_average: takes precedence over the attribute.
          mask: boolean, broadcastable to `x`: the elements that count. Others never change a
            statistic, whatever their value; a feature that is masked out whole pushes no slot.

        Returns:
          Array of the shape of `x`.
        """
        inference = self._is_inference(use_running_average)
        options = self._options()
        x = self._input(x, options)
        arrays = memory_arrays(self, options, self._feature_shape(), x.dtype)
        values = {name: getattr(self, name).get_value() for name in arrays}
        check_memory(values, arrays, options, inference=inference)
        memory = Moments(*values.values())
        rule, numbers = self._rule(memory.count.dtype, inference=inference)
        parameters = self._parameters()
        if inference:
            mean, var, _ = rule.pooled(lax.stop_gradient(memory))
            return options.normalize(x, mean, var, **parameters)
        first = self._first_forward()
        result = memorize(x, mask, memory, rule, options, self.gradient, current_forwards(), first)
        self._record(RECORDS, result.record)
        if first is not None:
            self._record(USED, True)
        for name, value in zip(arrays, result.memory, strict=True):
            getattr(self, name).set_value(value)
        self.rule.set_value(numbers)
        if hasattr(self, "steps"):
            self.steps.set_value(self.steps.get_value() + 1)
        return options.normalize(x, result.mean, result.var, **parameters, center=result.center)

    def _rule(self, dtype: Any, *, inference: bool) -> tuple[Any, Array]:
        steps = self.steps.get_value() if hasattr(self, "steps") else None
        return rule_of_call(self, steps, dtype, inference=inference)

    def _first_forward(self) -> FirstForward | None:
        """Returns what the first forward of this step recorded for this call, if anything."""
        if not hasattr(self, FIRST_RECORDS):
            return None
        records = getattr(self, FIRST_RECORDS).get_value()
        return FirstForward(records, len(getattr(self, RECORDS).get_value()))

    def _record(self, name: str, value: Any) -> None:
        """Records something of this call, where a training step wants it."""
        if hasattr(self, name):
            variable = getattr(self, name)
            variable.set_value((*variable.get_value(), value))
