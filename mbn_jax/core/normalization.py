"""Normalization by statistics of batches: the numerics of every layer."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from mbn_jax.core.double_forward import Forwards, Record
from mbn_jax.core.gradient import gradient_rule, with_gradient
from mbn_jax.core.memory import Endless, Slots, pool_of_two
from mbn_jax.core.moments import (
    Array,
    AxisName,
    Moments,
    batch_moments,
    common_dtype,
    is_usable,
    select,
)
from mbn_jax.core.transport import transport


@dataclasses.dataclass(frozen=True)
class NormOptions:
    """The options of a normalization layer that its numerics depend on.

    The layers have attributes of the same names; `flax.linen.BatchNorm` documents them too.

    Attributes:
      layer: what error messages call the layer.
      axis: feature axis or axes.
      epsilon: added to the variance.
      dtype: dtype of the result; None: from the input and the parameters.
      param_dtype: dtype of scale and bias.
      axis_name: named axis over which the batch is spread; None: it is not.
      axis_index_groups: groups of indices within that axis.
      use_fast_variance: moments in one pass.
      force_float32_reductions: statistics in float32 at least.
    """

    layer: str
    axis: int | Sequence[int]
    epsilon: float
    dtype: Any
    param_dtype: Any
    axis_name: AxisName | None
    axis_index_groups: Sequence[Sequence[int]] | None
    use_fast_variance: bool
    force_float32_reductions: bool

    @classmethod
    def of(cls, layer: Any, name: str, *, synced: bool) -> "NormOptions":
        """Reads the options from a layer's attributes.

        Args:
          layer: the layer.
          name: its path in its model; '' for a layer on its own.
          synced: whether statistics are synced now; initialization needs no named axis.
        """
        names = (field.name for field in dataclasses.fields(cls) if field.name != "layer")
        options = {name: getattr(layer, name) for name in names}
        if not synced:
            options |= {"axis_name": None, "axis_index_groups": None}
        return cls(layer=f"{type(layer).__name__} {name}".strip(), **options)

    def as_input(self, x: Array) -> Array:
        """Returns the input as an array; raises ValueError unless it is floating point."""
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            raise ValueError(
                f"{self.layer} expected floating-point inputs, got {x.dtype}; cast them."
            )
        return x

    def feature_axes(self, rank: int) -> tuple[int, ...]:
        """Returns the feature axes as non-negative numbers, ascending."""
        return canonical_axes(rank, self.axis)

    def feature_shape(self, x: Array) -> tuple[int, ...]:
        """Returns F, the shape of the features."""
        return tuple(x.shape[i] for i in self.feature_axes(x.ndim))

    def reduced_axes(self, rank: int) -> tuple[int, ...]:
        """Returns the axes that statistics are taken over: all but the features'."""
        features = self.feature_axes(rank)
        return tuple(i for i in range(rank) if i not in features)

    def statistics_dtypes(self, dtype: Any) -> tuple[Any, Any, Any]:
        """Returns the dtypes of mean, variance and count for an input of `dtype`."""
        var_dtype = jnp.dtype(self.param_dtype)
        if self.force_float32_reductions:
            var_dtype = jnp.finfo(common_dtype(self.dtype or dtype, jnp.float32)).dtype
        mean_dtype = var_dtype
        if jnp.issubdtype(dtype, jnp.complexfloating):
            mean_dtype = common_dtype(var_dtype, jnp.complex64)
        return mean_dtype, var_dtype, common_dtype(var_dtype, jnp.float32)

    def moments(self, x: Array, mask: Array | None, center: Array) -> Moments:
        """Returns the moments of a batch `[*F]`, in one pass around `center` if that is wanted."""
        return batch_moments(
            x,
            self.reduced_axes(x.ndim),
            dtype=self.dtype,
            mask=mask,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            center=center,
            use_fast_variance=self.use_fast_variance,
            force_float32_reductions=self.force_float32_reductions,
        )

    def values_per_feature(self, x: Array) -> int:
        """Returns the values of a feature in a batch, over synced devices, masks ignored."""
        values = math.prod(x.shape[axis] for axis in self.reduced_axes(x.ndim))
        if self.axis_name is not None:
            values *= lax.psum(1, self.axis_name, axis_index_groups=self.axis_index_groups)
        return values

    def normalize(
        self,
        x: Array,
        mean: Array,
        var: Array,
        *,
        scale: Array | None,
        bias: Array | None,
        center: Array | None = None,
    ) -> Array:
        """Returns (x - mean) / sqrt(var + epsilon) * scale + bias.

        Computed as (x - center) * multiplier + shift, which is cheap. Where the moments were taken
        around `center`, x - center is there; and the gradient of the mean comes through the shift,
        so that the backward pass needs two sums over the data, of dy and of dy (x - center).

        Args:
          x: inputs.
          mean: `[*F]`.
          var: `[*F]`.
          scale: `[*F]`, or None.
          bias: `[*F]`, or None.
          center: `[*F]`, within some standard deviations of the mean, held constant; default: the
            mean.

        Returns:
          Array of the shape of `x`, in `dtype`.
        """
        axes = self.reduced_axes(x.ndim)
        multiplier = lax.rsqrt(var + jnp.asarray(self.epsilon, var.dtype))
        if scale is not None:
            multiplier = _multiply(multiplier, scale)
        center = lax.stop_gradient(mean if center is None else center)
        shift = _multiply(center - mean, multiplier)
        if bias is not None:
            shift = _promoted(jnp.add, shift, bias)
        y = _promoted(jnp.subtract, x, jnp.expand_dims(center, axes))
        y = _multiply(y, jnp.expand_dims(multiplier, axes))
        y = _promoted(jnp.add, y, jnp.expand_dims(shift, axes))
        return y.astype(self.result_dtype(x, scale, bias))

    def scaled(self, x: Array, z: Array, *, scale: Array | None, bias: Array | None) -> Array:
        """Returns z * scale + bias, in the dtype of the layer's result.

        Args:
          x: inputs.
          z: the inputs normalized.
          scale: `[*F]`, or None.
          bias: `[*F]`, or None.
        """
        axes = self.reduced_axes(z.ndim)
        if scale is not None:
            z = _multiply(z, jnp.expand_dims(scale, axes))
        if bias is not None:
            z = _promoted(jnp.add, z, jnp.expand_dims(bias, axes))
        return z.astype(self.result_dtype(x, scale, bias))

    def result_dtype(self, x: Array, scale: Array | None, bias: Array | None) -> Any:
        """Returns the dtype of the layer's result: `dtype`, or from inputs and parameters."""
        used = [value for value in (x, scale, bias) if value is not None]
        return self.dtype or common_dtype(*(value.dtype for value in used))


def canonical_axes(rank: int, axis: int | Sequence[int]) -> tuple[int, ...]:
    """Returns the feature axes of a layer as non-negative numbers, ascending."""
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    if any(not -rank <= a < rank for a in axes):
        raise ValueError(
            f"The norm expected axis within the rank of its input, got axis={axis} "
            f"for an input of rank {rank}."
        )
    return tuple(sorted({a % rank for a in axes}))


def input_moments(
    x: Array,
    axis: int | Sequence[int],
    *,
    mask: Array | None = None,
    axis_name: AxisName | None = None,
) -> Moments:
    """Returns the moments of a layer's input, exactly: in two passes.

    Args:
      x: inputs.
      axis: feature axis or axes of the layer.
      mask: boolean, broadcastable to `x`: the elements that count; None: all.
      axis_name: named axis over which the batch is spread.
    """
    features = canonical_axes(x.ndim, axis)
    axes = tuple(i for i in range(x.ndim) if i not in features)
    return batch_moments(x, axes, mask=mask, axis_name=axis_name, use_fast_variance=False)


def _same_dtype(*values: Array) -> list[Array]:
    """Casts arrays to their common dtype, also where JAX forbids implicit promotion."""
    dtype = common_dtype(*(value.dtype for value in values))
    return [value.astype(dtype) for value in values]


def _promoted(function: Any, *values: Array) -> Array:
    return function(*_same_dtype(*values))


def _multiply(*values: Array) -> Array:
    return _promoted(jnp.multiply, *values)


class FirstForward(NamedTuple):
    """What one call of a layer finds, in the second forward, of the first one.

    Attributes:
      records: of all calls of the layer in the first forward.
      call: which of them this call repeats, from 0.
    """

    records: Sequence[Record]
    call: int


class Memorized(NamedTuple):
    """What a training call of a layer with a memory computes.

    Attributes:
      mean: pooled mean to normalize by, `[*F]`, with the gradient of the layer's rule.
      var: pooled variance, likewise.
      center: what the batch's moments were taken around, `[*F]`.
      memory: the memory after this call.
      record: for the second forward of the step.
    """

    mean: Array
    var: Array
    center: Array
    memory: Moments
    record: Record


def memorize(
    x: Array,
    mask: Array | None,
    memory: Moments,
    rule: Slots | Endless,
    options: NormOptions,
    gradient: str,
    forwards: Forwards,
    first: FirstForward | None,
) -> Memorized:
    """Pools a batch with the memory, and puts it there.

    Args:
      x: inputs.
      mask: boolean, broadcastable to `x`: the elements that count; None: all.
      memory: as `rule` keeps it, held constant.
      rule: the kind of memory, with its size and decay.
      options: of the layer.
      gradient: one of `mbn_jax.core.gradient.GRADIENTS`.
      forwards: the forwards of this step.
      first: None in a first forward, or where the second one needs no record.

    Returns:
      The statistics to normalize by, and what is kept.
    """
    memory = lax.stop_gradient(memory)
    staying, leaving = rule.without_oldest(memory), rule.oldest(memory)
    guess = pool_of_two(staying, leaving).mean
    batch = options.moments(x, mask, guess)
    record, in_turn = Record(batch, None), False
    if first is not None:
        before, after = first.records[first.call], batch
        if before.part is not None:
            batch = transport(before.batch, before.part, after, options.epsilon)
            before = Record(before.part, None)
        record = Record(batch, None)
        if forwards.second.moves_memory:
            calls, shift = len(first.records), (before.batch, after, options.epsilon)
            memory = rule.transported(memory, *shift, first.call, calls)
            in_turn = calls > 1
            if not in_turn:
                # A pool moves as its slots do, so that they need not be pooled again.
                staying, leaving = transport(staying, *shift), transport(leaving, *shift)
            else:
                staying, leaving = rule.without_oldest(memory), rule.oldest(memory)
                leaving = leaving._replace(count=jnp.zeros_like(leaving.count))
    elif forwards.batch_size:
        record = Record(batch, _part_moments(x, mask, options, forwards, guess))
    newest = batch._replace(count=jnp.ones_like(batch.count))
    mean, var, _ = pool_of_two(staying, select(is_usable(batch), newest, leaving))
    mean, var = with_gradient(
        batch,
        mean,
        var,
        gradient=gradient_rule(gradient, options.values_per_feature(x)),
        epsilon=options.epsilon,
    )
    center = guess if options.use_fast_variance else batch.mean
    memory = lax.stop_gradient(rule.pushed(memory, batch, in_turn=in_turn))
    return Memorized(mean, var, center, memory, record)


def _part_moments(
    x: Array, mask: Array | None, options: NormOptions, forwards: Forwards, center: Array
) -> Moments:
    """Returns the moments of the examples that the second forward sees."""
    size = forwards.batch_size
    if 0 in options.feature_axes(x.ndim) or x.shape[0] != size:
        raise ValueError(
            f"double_forward_fraction needs the {size} examples of the batch, in their order, on "
            f"the first axis of every layer's input, and {options.layer} with axis={options.axis} "
            f"got an input of shape {x.shape}."
        )
    examples = forwards.second.num_examples(size)
    if mask is not None:
        mask = jnp.broadcast_to(jnp.asarray(mask, bool), x.shape)[:examples]
    return options.moments(x[:examples], mask, center)
