"""Memorized Batch Normalization as a drop-in for `flax.linen.BatchNorm`."""

import math
from collections.abc import Sequence
from typing import Any, TypeGuard, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import dtypes
from jax import lax
from jax.nn import initializers

from mbn_jax.core.memory import Average, Slots, memory_rule, pool_of_two
from mbn_jax.core.moments import (
    Array,
    AxisName,
    Moments,
    Schedule,
    batch_moments,
    is_usable,
    select,
)
from mbn_jax.core.records import (
    BATCH_MOMENTS,
    FIRST_BATCH_MOMENTS,
    FIRST_USED,
    PART,
    WHOLE,
    WHOLE_TO_REWRITE,
    part_to_record,
)
from mbn_jax.core.transport import transport

GRADIENTS = ("auto", "renorm", "through")


def statistics_with_gradient(
    batch: Moments,
    mean: Array,
    var: Array,
    *,
    gradient: str,
    epsilon: float,
    r_max: float | None = None,
    d_max: float | None = None,
) -> tuple[Array, Array]:
    """Chooses how gradients flow from the pooled statistics into the current batch.

    `'through'` differentiates the pool as it stands: d mean/d m_B = a_0, d var/d v_B = a_0,
    d var/d m_B = 2 a_0 (m_B - mean).

    `'renorm'` is Batch Renormalization's rule. With s_B = sqrt(v_B + epsilon) and
    s = sqrt(var + epsilon), it differentiates

        x_hat = (x - m_B) / s_B * r + d,    r = s_B / s,    d = (m_B - mean) / s

    with r and d held constant: the backward pass is batch normalization's, scaled by r, and weights
    before the layer stay scale-invariant. Written as statistics, that is S = s_B / r in place of s
    and M = m_B - d S in place of the mean, which have the pool's values, and the gradients

        dM = dm_B - (m_B - mean) / (2 s_B^2) dv_B        d(S^2) = s^2 / s_B^2 dv_B

    Args:
      batch: moments of the current batch, `[*F]`.
      mean: pooled mean, `[*F]`.
      var: pooled variance, `[*F]`.
      gradient: 'through' or 'renorm'.
      epsilon: added to variances.
      r_max: clip r to [1 / r_max, r_max]; with 'renorm' only. A clip that binds changes the values,
        and training no longer normalizes as inference does.
      d_max: clip d to [-d_max, d_max]; likewise.

    Returns:
      (mean, var) to normalize with: the pooled values (but for a clip that binds), with the rule's
      gradient.

    References:
      Ioffe, "Batch Renormalization", arXiv 1702.03275, equations (2) to (6).

    >>> batch = Moments(jnp.array(2.0), jnp.array(1.0), jnp.array(8.0))
    >>> rule = dict(gradient='renorm', epsilon=0.0)
    >>> [float(s) for s in statistics_with_gradient(batch, jnp.array(1.0), jnp.array(4.0), **rule)]
    [1.0, 4.0]
    """
    if gradient == "through":
        return mean, var
    if r_max is None and d_max is None:
        # r and d cancel, and no square root is left, whose gradient is infinite at 0.
        leaning = (batch.mean - mean) / (2 * (batch.var + epsilon))
        ratio = (var + epsilon) / (batch.var + epsilon)
        # Of value 0: the pool's value stays to the last bit, so that training and inference agree.
        of_mean = batch.mean - lax.stop_gradient(batch.mean)
        of_var = batch.var - lax.stop_gradient(batch.var)
        mean, var, leaning, ratio = lax.stop_gradient((mean, var, leaning, ratio))
        return mean + of_mean - leaning * of_var, var + ratio * of_var
    batch_scale = jnp.sqrt(batch.var + epsilon)
    scale = jnp.sqrt(var + epsilon)
    r = lax.stop_gradient(batch_scale / scale)
    d = lax.stop_gradient((batch.mean - mean) / scale)
    if r_max is not None:
        r = jnp.clip(r, 1 / r_max, r_max)
    if d_max is not None:
        size = jnp.abs(d)
        d = d * jnp.where(size > d_max, d_max / jnp.where(size > 0, size, 1), 1)
    renorm_scale = batch_scale / r
    renorm_mean = batch.mean - d * renorm_scale
    renorm_var = (batch.var + epsilon) / lax.square(r) - epsilon
    # A feature that is masked out whole has no r and d to clip.
    seen = batch.count > 0
    return jnp.where(seen, renorm_mean, mean), jnp.where(seen, renorm_var, var)


class BatchStatisticsNorm(nn.Module):
    """What every layer shares that normalizes by statistics of batches; the options of flax's.

    Attributes:
      use_running_average: if True, normalize by what is kept and leave it alone; here or in the
        call.
      axis: the feature axis or axes; all others are reduced.
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
      use_fast_variance: moments in one pass around the mean that is kept, exact where the plain
        fast variance cancels; around 0, as flax takes them, where nothing is kept yet. False: in
        two passes.
      force_float32_reductions: if False, statistics are kept in `param_dtype`.
    """

    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
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

    def __post_init__(self):
        if self.axis_index_groups is not None and self.axis_name is None:
            raise ValueError("axis_index_groups divides a named axis; give axis_name too.")
        super().__post_init__()

    def _input(self, x: Array) -> tuple[Array, tuple[int, ...], tuple[int, ...]]:
        """Returns the input as an array, the axes to reduce and those of the features."""
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            raise ValueError(
                f"{type(self).__name__} expected floating-point inputs, got {x.dtype}; cast them."
            )
        feature_axes = canonical_axes(x.ndim, self.axis)
        return x, tuple(i for i in range(x.ndim) if i not in feature_axes), feature_axes

    def _statistics_dtypes(self, dtype) -> tuple[Any, Any]:
        """Returns the dtypes of mean and variance for an input of `dtype`."""
        var_dtype = self.param_dtype
        if self.force_float32_reductions:
            var_dtype = jnp.finfo(jnp.promote_types(self.dtype or dtype, jnp.float32)).dtype
        mean_dtype = var_dtype
        if jnp.issubdtype(dtype, jnp.complexfloating):
            mean_dtype = jnp.promote_types(var_dtype, jnp.complex64)
        return mean_dtype, var_dtype

    def _synced(self) -> bool:
        """Returns whether statistics are those of several devices; `init` needs no named axis."""
        return self.axis_name is not None and not self.is_initializing()

    def _batch_moments(self, x, axes, mask, center: Array) -> Moments:
        """Computes the batch's moments, in one pass around `center` where that is asked for."""
        synced = self._synced()
        return batch_moments(
            x,
            axes,
            dtype=self.dtype,
            mask=mask,
            axis_name=self.axis_name if synced else None,
            axis_index_groups=self.axis_index_groups if synced else None,
            center=center,
            use_fast_variance=self.use_fast_variance,
            force_float32_reductions=self.force_float32_reductions,
        )

    def _normalize(self, x, mean, var, axes, feature_axes, center: Array | None = None) -> Array:
        """Returns (x - mean) / sqrt(var + epsilon) * scale + bias.

        Computed as (x - center) * multiplier + shift, which is cheap. Where the moments were taken
        around `center`, x - center is there; and the gradient of the mean comes through the shift,
        so that the backward pass needs two sums over the data, of dy and of dy (x - center).

        Args:
          x: inputs, as `_input` returns them.
          mean: `[*F]`.
          var: `[*F]`.
          axes: that are reduced.
          feature_axes: of F.
          center: `[*F]`, within some standard deviations of the mean, held constant; default: the
            mean.
        """
        feature_shape = tuple(x.shape[i] for i in feature_axes)
        multiplier = lax.rsqrt(var + jnp.asarray(self.epsilon, var.dtype))
        args = [x]
        if self.use_scale:
            scale = self.param("scale", self.scale_init, feature_shape, self.param_dtype)
            multiplier *= scale
            args.append(scale)
        center = lax.stop_gradient(mean if center is None else center)
        shift = (center - mean) * multiplier
        if self.use_bias:
            bias = self.param("bias", self.bias_init, feature_shape, self.param_dtype)
            shift += bias
            args.append(bias)
        y = (x - jnp.expand_dims(center, axes)) * jnp.expand_dims(multiplier, axes)
        y += jnp.expand_dims(shift, axes)
        return y.astype(dtypes.canonicalize_dtype(*args, dtype=self.dtype))


class PooledBatchNorm(BatchStatisticsNorm):
    """What the layers share that normalize by a pool in which the current batch is.

    Attributes, beside those of `BatchStatisticsNorm`:
      gradient: 'renorm' or 'through' (see `statistics_with_gradient`), or 'auto': 'through' where a
        feature sees at most two values (batch x space x synced devices, masks ignored), where batch
        normalization's own gradient vanishes, and 'renorm' elsewhere.
      r_max: clip Batch Renormalization's r; needs 'renorm'. Off by default, and not needed: r is at
        most 1/sqrt(a_0).
      d_max: clip Batch Renormalization's d; likewise, |d| is at most sqrt((1 - a_0) / a_0).
      transport_scale: whether what is kept moves by a scale and an offset where it is transported
        (see `mbn_jax.core.transport`); False: by the offset alone. The batch that is pushed
        after a second forward on a part of it moves by both always.
    """

    gradient: str = "auto"
    r_max: float | None = None
    d_max: float | None = None
    transport_scale: bool = True

    def __post_init__(self):
        if self.gradient not in GRADIENTS:
            raise ValueError(f"gradient must be one of {GRADIENTS}, got {self.gradient!r}.")
        for name, least in (("r_max", 1), ("d_max", 0)):
            limit = getattr(self, name)
            if limit is not None and self.gradient != "renorm":
                raise ValueError(
                    f"{name} clips Batch Renormalization's correction and needs gradient='renorm', "
                    f"got gradient={self.gradient!r}."
                )
            if limit is not None and limit < least:
                raise ValueError(f"{name} must be {least} or more, got {limit}.")
        super().__post_init__()

    def _normalize_by_pool(
        self,
        x: Array,
        use_running_average: bool,
        mask: Array | None,
        variables: Sequence[nn.Variable],
        rule: Slots | Average,
    ) -> Array:
        """Normalizes `x`, and in training keeps what it tells.

        Args:
          x: inputs, as `_input` returns them.
          use_running_average: normalize by what is kept, and keep it.
          mask: the elements that count.
          variables: what is kept: mean, var and count.
          rule: by which.
        """
        x, axes, feature_axes = self._input(x)
        kept = lax.stop_gradient(Moments(*(variable.value for variable in variables)))
        if use_running_average:
            mean, var, _ = rule.pooled(kept)
            return self._normalize(x, mean, var, axes, feature_axes)
        others = rule.remaining(kept), rule.leaving(kept)
        guess = pool_of_two(*others).mean
        batch = self._batch_moments(x, axes, mask, guess)
        first = self._first_moments()
        if first is not None:
            kept, others, batch = self._moved(rule, kept, others, first, batch)
        remaining, leaving = others
        newest = batch._replace(count=jnp.ones_like(batch.count))
        mean, var, _ = pool_of_two(remaining, select(is_usable(batch), newest, leaving))
        mean, var = statistics_with_gradient(
            batch,
            mean,
            var,
            gradient=self._gradient_rule(x, axes),
            epsilon=self.epsilon,
            r_max=self.r_max,
            d_max=self.d_max,
        )
        if not self.is_initializing():
            wanted = part_to_record()
            if wanted is not None:
                part, part_mask = self._part(x, axes, mask, *wanted)
                moments = self._batch_moments(part, axes, part_mask, guess)
                self.sow(BATCH_MOMENTS, PART, moments)
            self.sow(BATCH_MOMENTS, WHOLE, batch)
            if first is not None:
                self.sow(BATCH_MOMENTS, FIRST_USED, True)
            pushed = rule.pushed(kept, batch)
            for variable, value in zip(variables, pushed, strict=True):
                variable.value = lax.stop_gradient(value)
        center = guess if self.use_fast_variance else batch.mean
        return self._normalize(x, mean, var, axes, feature_axes, center)

    def _part(self, x: Array, axes: tuple[int, ...], mask: Array | None, size: int, rows: int):
        """Returns the first `rows` of the `size` examples of the batch, and of its mask."""
        if 0 not in axes or x.shape[0] != size:
            raise ValueError(
                f"double_forward_fraction needs the {size} examples of the batch, in their order, "
                f"on the first axis of every layer's input, and {type(self).__name__} "
                f"{self.name or ''} with axis={self.axis} got an input of shape {x.shape}."
            )
        if mask is not None:
            mask = jnp.broadcast_to(jnp.asarray(mask, bool), x.shape)[:rows]
        return x[:rows], mask

    def _first_moments(self) -> dict[str, tuple[Moments, ...]] | None:
        """Returns what the first forward of this step recorded, by name and call, if handed in."""
        found: dict[str, tuple[Moments, ...]] = {}
        for name in (WHOLE, WHOLE_TO_REWRITE, PART):
            if self.has_variable(FIRST_BATCH_MOMENTS, name):
                found[name] = self.get_variable(FIRST_BATCH_MOMENTS, name)
        return found or None

    def _moved(
        self,
        rule: Slots | Average,
        kept: Moments,
        others: tuple[Moments, Moments],
        first: dict[str, tuple[Moments, ...]],
        batch: Moments,
    ) -> tuple[Moments, tuple[Moments, Moments], Moments]:
        """Moves by what the update did to the inputs of this call.

        Args:
          rule: by which.
          kept: what is kept.
          others: what remains of it in the pool beside a new batch, and what leaves.
          first: what the first forward recorded.
          batch: the moments of the examples that this forward sees.

        Returns:
          What is kept and the others, moved where they are to be, and the moments of the whole
          batch.
        """
        transports = WHOLE in first
        wholes = first[WHOLE if transports else WHOLE_TO_REWRITE]
        call, calls = len(self.get_variable(BATCH_MOMENTS, WHOLE, ())), len(wholes)
        before, after, whole = wholes[call], batch, batch
        if PART in first:
            before = first[PART][call]
            whole = transport(wholes[call], before, after, self.epsilon)
        if not transports:
            return kept, others, whole
        if not self.transport_scale:
            after = after._replace(var=before.var)
        moved = transport(kept, before, after, self.epsilon)
        if calls == 1:
            # A pool moves as its slots do, so that they need not be pooled again.
            remaining, leaving = (transport(x, before, after, self.epsilon) for x in others)
            return moved, (remaining, leaving), whole
        if kept.mean.ndim == before.mean.ndim:
            raise ValueError(
                f"{type(self).__name__} {self.name or ''} is called {calls} times in one forward; "
                "an average cannot tell which call to move; use double_forward='rewrite'."
            )
        # Of the slots behind those of this forward, the ones that this call pushed.
        age = jnp.arange(kept.mean.shape[0]) - call
        own = (age >= 0) & (age % calls == calls - 1 - call)
        own = own.reshape((-1,) + (1,) * before.mean.ndim)
        kept = select(own, moved, kept)
        return kept, (rule.remaining(kept), rule.leaving(kept)), whole

    def _values(self, x: Array, axes: tuple[int, ...]) -> int:
        """Returns how many values a feature has in a batch: masks ignored, over synced devices."""
        values = math.prod(x.shape[axis] for axis in axes)
        if self._synced():
            values *= lax.psum(1, self.axis_name, axis_index_groups=self.axis_index_groups)
        return values

    def _gradient_rule(self, x: Array, axes: tuple[int, ...]) -> str:
        if self.gradient != "auto":
            return self.gradient
        return "through" if self._values(x, axes) <= 2 else "renorm"


class MemorizedBatchNorm(PooledBatchNorm):
    """Batch normalization by the pooled statistics of the last k mini-batches.

    Replaces `flax.linen.BatchNorm` by changing one name (and dropping `momentum`). In training, the
    batch's mean m_B and variance v_B are pushed in front of the memory, the memory is pooled by the
    law of total variance, and the pool normalizes:

        mean = sum_i a_i m_i        var = sum_i a_i (v_i + (m_i - mean)^2)
        y = (x - mean) / sqrt(var + epsilon) * scale + bias,        a_i ~ decay^i

    At inference the memory is pooled by the same weights; there is no moving average. The memory
    lives in the `batch_stats` collection, newest slot first: `mean`, `var` and `count` (elements
    behind the slot, 0 = empty), each `[memory_capacity, *features]`. A fresh memory normalizes by
    mean 0 and variance 1. A layer called twice in one forward pass pushes one slot a call. A batch
    whose statistics are not finite pushes none: it shows in its own outputs, and is gone after.

    Use with `mbn_jax.make_train_step`, or push without Double Forward in any train loop that keeps
    `batch_stats`.

    Attributes, beside those of flax's layer and of `PooledBatchNorm`:
      memory_size: k, the batches in the pool, the current one included; 1 is batch normalization.
        Or a function of the training calls so far, an `optax` schedule for example: a memory that
        grows as the learning rate falls. `batch_stats` then counts them, as `steps`, and inference
        goes by the size of the last one. What is not whole is rounded up, and 1 is the least.
      decay: in (0, 1], weight of a slot against the next newer one; 1 weighs all equally. Or a
        function likewise.
      memory_capacity: slots that the memory has room for; default: `memory_size`. Give it to make
        `memory_size` and `decay` traced values (one compiled program for all of them) or functions.

    Raises:
      ValueError: on construction, where an option is impossible.

    References:
      Guo, Wu, Deng, Chen, Tan, "Double Forward Propagation for Memorized Batch Normalization",
      AAAI 2018 (arXiv 2010.04947). Counting the current batch in k, the geometric weights and
      'auto' are choices of this project.

    >>> layer = MemorizedBatchNorm(memory_size=4, use_running_average=False)
    >>> x = jnp.array([[1.0], [3.0]])
    >>> variables = layer.init(jax.random.key(0), x)
    >>> y, variables = layer.apply(variables, x, mutable=['batch_stats', 'params'])
    >>> y.round(3).tolist()
    [[-1.0], [1.0]]
    >>> variables['batch_stats']['mean'][:, 0].tolist()
    [2.0, 0.0, 0.0, 0.0]
    """

    memory_size: Schedule = 64
    decay: Schedule = 0.97
    memory_capacity: int | None = None

    def __post_init__(self):
        _check_options(self)
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
        use_running_average = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        x, _, feature_axes = self._input(x)
        memory = self._memory(tuple(x.shape[i] for i in feature_axes), x.dtype)
        steps, step = None, jnp.zeros((), jnp.int32)
        if callable(self.memory_size) or callable(self.decay):
            steps = self.variable("batch_stats", "steps", jnp.zeros, (), jnp.int32)
            # Inference goes by the rule of the batch that was normalized last.
            step = jnp.maximum(steps.value - 1, 0) if use_running_average else steps.value
        memory_size, decay = memory_rule(self.memory_size, self.decay, step)

        rule = Slots(memory_size, decay)
        y = self._normalize_by_pool(x, use_running_average, mask, memory, rule)
        if steps is not None and not use_running_average and not self.is_initializing():
            steps.value += 1
        return y

    def _memory(self, feature_shape: tuple[int, ...], dtype) -> list[nn.Variable]:
        """Declares the memory, empty at first, and checks one that was handed in."""
        capacity = self.memory_capacity or int(cast(int, self.memory_size))
        shape = (capacity, *feature_shape)
        mean_dtype, var_dtype = self._statistics_dtypes(dtype)
        count_dtype = jnp.promote_types(var_dtype, jnp.float32)
        memory = [
            self.variable("batch_stats", "mean", jnp.zeros, shape, mean_dtype),
            self.variable("batch_stats", "var", jnp.ones, shape, var_dtype),
            self.variable("batch_stats", "count", jnp.zeros, shape, count_dtype),
        ]
        for variable in memory:
            if variable.value.shape != shape:
                raise ValueError(
                    f"MemorizedBatchNorm {self.name or ''} expected a memory of shape {shape} "
                    f"(slots, *features), got {variable.value.shape}; build the layer with the "
                    "memory_size or memory_capacity that its batch_stats were made with."
                )
        is_complex = jnp.issubdtype(mean_dtype, jnp.complexfloating)
        if is_complex and not jnp.iscomplexobj(memory[0].value):
            raise ValueError(
                f"MemorizedBatchNorm {self.name or ''} got complex inputs, but its memory was "
                "initialized with real ones; initialize it with complex inputs."
            )
        return memory


def canonical_axes(rank: int, axis: int | Sequence[int]) -> tuple[int, ...]:
    """Returns the feature axes of a layer as non-negative numbers, ascending."""
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    if any(not -rank <= a < rank for a in axes):
        raise ValueError(
            f"The norm expected axis within the rank of its input, got axis={axis} "
            f"for an input of rank {rank}."
        )
    return tuple(sorted({a % rank for a in axes}))


def is_number(value: Schedule) -> TypeGuard[float]:
    """Returns whether a schedule is a number that can be checked before anything is traced."""
    return not callable(value) and not isinstance(value, jax.core.Tracer)


def _check_options(layer: MemorizedBatchNorm) -> None:
    """Raises ValueError where a number is impossible; traced ones and functions are trusted."""
    size, decay, capacity = layer.memory_size, layer.decay, layer.memory_capacity
    if capacity is not None and capacity < 1:
        raise ValueError(f"memory_capacity must be 1 or more, got {capacity}.")
    if not is_number(size) and capacity is None:
        raise ValueError(
            "A memory_size that is traced or a function needs memory_capacity, the number of slots "
            "to make room for."
        )
    if is_number(size) and (int(size) != size or size < 1):
        raise ValueError(
            "memory_size must be a whole number of 1 or more (it counts the current batch), "
            f"got {size}."
        )
    if is_number(size) and capacity is not None and size > capacity:
        raise ValueError(f"memory_size must be at most memory_capacity={capacity}, got {size}.")
    if is_number(decay) and not 0 < decay <= 1:
        raise ValueError(f"decay must be in (0, 1], got {decay}.")
