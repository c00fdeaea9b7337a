"""Memorized Batch Normalization as a drop-in for `flax.linen.BatchNorm`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.nn import initializers

from mbn_jax.core.double_forward import (
    BATCH_MOMENTS,
    FIRST_BATCH_MOMENTS,
    RECORDS,
    USED,
    Record,
    current_forwards,
)
from mbn_jax.core.layers import (
    EMPTY,
    check_memorized,
    check_memory,
    counts_steps,
    memory_arrays,
    rule_of_call,
)
from mbn_jax.core.memory import Endless, Slots
from mbn_jax.core.moments import Array, AxisName, Moments, Schedule
from mbn_jax.core.normalization import FirstForward, NormOptions, memorize
from mbn_jax.linen.layer import is_inference, options_of, scale_and_bias


class MemorizedBatchNorm(nn.Module):
    """Batch normalization by the pooled statistics of the last k mini-batches.

    Replaces `flax.linen.BatchNorm` by changing one name (and dropping `momentum`). In training, the
    batch's mean m_B and variance v_B are pushed in front of the memory, the memory is pooled by the
    law of total variance, and the pool normalizes::

        mean = sum_i a_i m_i        var = sum_i a_i (v_i + (m_i - mean)^2)
        y = (x - mean) / sqrt(var + epsilon) * scale + bias,        a_i ~ decay^i

    At inference the memory is pooled by the same weights; there is no moving average. A fresh
    memory normalizes by mean 0 and variance 1. A layer called twice in one forward pass pushes one
    slot a call. A batch whose statistics are not finite pushes none (where several calls move
    with transport, an empty one): it shows in its own outputs
    only.

    The `batch_stats` collection holds `mean`, `var` and `count` (elements behind the slot, 0 =
    empty), each `[memory_capacity, *features]`, newest slot first; and `rule`, `[2]`: memory size
    and decay of the last training call, by which the memory is folded and pooled outside the layer.

    `memory_size=None` is an endless memory: w weighs all batches in units of the newest, and
    with each batch::

        w    <- decay w + 1        a = 1 / w
        var  <- (1 - a) var + a v_B + a (1 - a) |m_B - mean|^2
        mean <- mean + a (m_B - mean)

    `batch_stats` then holds `mean`, `var` and `weight` (w), each `[*features]`, and `rule`. It is
    not the moving average of `flax.linen.BatchNorm`: the current batch is in the pool, in training
    and at inference alike, and the first steps weigh only what there is.

    Use with `mbn_jax.make_train_step`, or without Double Forward in any training loop that keeps
    `batch_stats`.

    Attributes:
      use_running_average: if True, normalize by the memory and leave it alone; here or in the call.
      axis: the feature axis or axes; all others are reduced. Further attributes are keyword-only.
      epsilon: added to the variance.
      dtype: dtype of the result; default: from the input and the parameters. Statistics are always
        float32 or wider (see `force_float32_reductions`).
      param_dtype: dtype of scale and bias.
      use_bias: add a learned bias.
      use_scale: multiply by a learned scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: named axis over which the batch is spread; statistics are those of the whole batch.
      axis_index_groups: groups of indices within that axis, each with statistics of its own.
      use_fast_variance: moments in one pass around the mean of the memory, exact where the plain
        fast variance cancels; around 0, as in flax, while the memory is empty. False: in two
        passes.
      force_float32_reductions: if False, statistics are kept in `param_dtype`.
      memory_size: k, the batches in the pool, the current one included; 1 is batch normalization.
        Or a function of the training calls so far, an `optax` schedule for example: a memory that
        grows as the learning rate falls. `batch_stats` then counts the calls, as `steps`, and
        inference uses the size of the last one. Fractions are rounded up, and 1 is the least. None:
        an endless memory.
      decay: in (0, 1], weight of a slot relative to the next newer one; 1 weighs all equally. Or a
        function likewise.
      memory_capacity: slots that the memory has room for; default: `memory_size`. Give it to make
        `memory_size` and `decay` traced values (one compiled program for all of them) or functions.
      gradient: 'renorm' or 'through' (see `mbn_jax.core.gradient`), or 'auto': 'through' where a
        feature sees at most two values (batch x space x synced devices, masks ignored), where batch
        normalization's own gradient vanishes, and 'renorm' elsewhere.

    Raises:
      ValueError: on construction, for an impossible option.

    References:
      Guo, Wu, Deng, Chen, Tan, "Double Forward Propagation for Memorized Batch Normalization",
      AAAI 2018 (arXiv 2010.04947). Counting the current batch in k, the geometric weights, 'auto'
      and the endless memory are choices of this project.

    >>> import jax
    >>> layer = MemorizedBatchNorm(memory_size=4, use_running_average=False)
    >>> x = jnp.array([[1.0], [3.0]])
    >>> variables = layer.init(jax.random.key(0), x)
    >>> y, variables = layer.apply(variables, x, mutable=['batch_stats', 'params'])
    >>> y.round(3).tolist()
    [[-1.0], [1.0]]
    >>> variables['batch_stats']['mean'][:, 0].tolist()
    [2.0, 0.0, 0.0, 0.0]
    """

    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
    _: dataclasses.KW_ONLY  # The third of flax's is momentum, which has no meaning here.
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Any = initializers.zeros
    scale_init: Any = initializers.ones
    axis_name: AxisName | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    memory_size: Schedule | None = 64
    decay: Schedule = 0.97
    memory_capacity: int | None = None
    gradient: str = "auto"

    def __post_init__(self):
        check_memorized(self)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Array,
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
    ) -> Array:
        """Normalizes `x` by the pooled statistics.

        `init` pushes nothing and needs no named axis, and its batch size binds nothing.

        Args:
          x: inputs, `[..., features]` or as `axis` says, floating point or complex.
          use_running_average: as the attribute; give one of the two.
          mask: boolean, broadcastable to `x`: the elements that count. Others never change a
            statistic, whatever their value; a feature that is masked out whole pushes no slot.

        Returns:
          Array of the shape of `x`.
        """
        inference = is_inference(self, use_running_average)
        options = options_of(self)
        x = options.as_input(x)
        variables = _memory(self, options, x, inference)
        memory = Moments(*(variable.value for variable in variables))
        rule, count_call = _rule(self, inference, memory.count.dtype)
        parameters = scale_and_bias(self, options.feature_shape(x))
        if inference:
            mean, var, _ = rule.pooled(lax.stop_gradient(memory))
            return options.normalize(x, mean, var, **parameters)
        first = _first_forward(self)
        result = memorize(x, mask, memory, rule, options, self.gradient, current_forwards(), first)
        if not self.is_initializing():
            self.sow(BATCH_MOMENTS, RECORDS, result.record)
            if first is not None:
                self.sow(BATCH_MOMENTS, USED, True)
            for variable, value in zip(variables, result.memory, strict=True):
                variable.value = value
            count_call()
        return options.normalize(x, result.mean, result.var, **parameters, center=result.center)


# Functions, not methods: flax runs each method of a module on its own to count its FLOPs.


def _memory(
    layer: MemorizedBatchNorm, options: NormOptions, x: Array, inference: bool
) -> list[nn.Variable]:
    """Declares the memory, empty at first, and checks one that was handed in."""
    arrays = memory_arrays(layer, options, options.feature_shape(x), x.dtype)
    missing = [name for name in arrays if not layer.has_variable("batch_stats", name)]
    if missing and layer.has_variable("batch_stats", "mean"):
        raise ValueError(
            f"{options.layer} expected a memory with {missing[0]!r}, got the statistics of "
            "another layer; start from a BatchNorm checkpoint by mbn_jax.from_batch_norm."
        )
    variables = {
        name: layer.variable("batch_stats", name, jnp.full, array.shape, EMPTY[name], array.dtype)
        for name, array in arrays.items()
    }
    memory = {name: variable.value for name, variable in variables.items()}
    check_memory(memory, arrays, options, inference=inference)
    return list(variables.values())


def _rule(layer: MemorizedBatchNorm, inference: bool, dtype: Any) -> tuple[Slots | Endless, Any]:
    """Returns the memory's rule in this call, and a function that records the call."""
    steps = None
    if counts_steps(layer):
        steps = layer.variable("batch_stats", "steps", jnp.zeros, (), jnp.int32)
    count = None if steps is None else steps.value
    rule, numbers = rule_of_call(layer, count, dtype, inference=inference)
    if not inference or layer.is_initializing():
        recorded = layer.variable("batch_stats", "rule", lambda: numbers)

    def count_call() -> None:
        recorded.value = numbers
        if steps is not None:
            steps.value += 1

    return rule, count_call


def _first_forward(layer: MemorizedBatchNorm) -> FirstForward | None:
    """Returns what the first forward of this step recorded for this call, if anything."""
    if not layer.has_variable(FIRST_BATCH_MOMENTS, RECORDS):
        return None
    if not layer.is_mutable_collection(BATCH_MOMENTS):
        raise ValueError(
            f"{options_of(layer).layer} finds {FIRST_BATCH_MOMENTS!r} and cannot count its calls; "
            f"make {BATCH_MOMENTS!r} mutable in this apply too, and name both collections in the "
            "variable_axes of lifted transforms."
        )
    records: tuple[Record, ...] = layer.get_variable(FIRST_BATCH_MOMENTS, RECORDS)
    return FirstForward(records, len(layer.get_variable(BATCH_MOMENTS, RECORDS, ())))
