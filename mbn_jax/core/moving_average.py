"""Moving averages of both passes: what a training call of `MovingAverageBatchNorm` computes.

Batch normalization takes two statistics of a batch backward, too: the means of the gradient g and
of g z, for the normalized input z. This layer averages them over earlier batches. A gradient cannot
write a variable. So the layer has one more input, of zeros, whose "gradient" is the statistics of
this batch; the training step hands it to the layer of the next step.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mbn_jax.core.memory import pool, push
from mbn_jax.core.moments import Array, Moments, around_zero, batch_moments, select
from mbn_jax.core.normalization import NormOptions

PyTree = Any

BACKWARD_SUMS = "backward_sums"
"""Name, in a layer's `batch_stats`, of the backward statistics of the last batch.

Also of the collection of zeros that a training step differentiates in their place.
"""


class MovingAverages(NamedTuple):
    """What a layer keeps, beside the moving average for inference.

    Attributes:
      forward: mean, variance, and 1 where there is a batch, of the last batches, newest first:
        `[forward_batches, 3, *F]`.
      backward: means of g and of g z, and likewise, of the last batches:
        `[backward_batches, 3, *F]`.
      backward_sums: of the newest batch, `[3, *F]`: the two means, summed over the calls of the
        layer in one forward, and the number of these calls.
      steps: training calls so far, int32.
    """

    forward: Array
    backward: Array
    backward_sums: Array
    steps: Array


class Averaged(NamedTuple):
    """What a training call computes.

    Attributes:
      z: normalized input.
      mean: that was subtracted, `[*F]`.
      var: that was divided by, `[*F]`.
      kept: averages after this call.
    """

    z: Array
    mean: Array
    var: Array
    kept: MovingAverages


def average_both_passes(
    x: Array,
    mask: Array | None,
    kept: MovingAverages,
    running_var: Array,
    sink: Array | None,
    options: NormOptions,
    layer: Any,
) -> Averaged:
    """Normalizes by averages over the last batches, forward and backward.

    Args:
      x: inputs.
      mask: boolean, broadcastable to `x`: the elements that count; None: all.
      kept: averages before this call.
      running_var: moving average for inference, `[*F]`.
      sink: zeros `[3, *F]`, differentiated in place of `backward_sums`; None: this is no forward of
        a training step, and cannot be differentiated.
      options: of the layer.
      layer: `MovingAverageBatchNorm`.

    Returns:
      The normalized input, and what is kept.
    """
    x = x.astype(kept.forward.dtype)
    axes = options.reduced_axes(x.ndim)
    forward, backward = _slots(kept.forward), _slots(kept.backward)
    # Around the mean of the memory, where the one-pass variance does not cancel.
    guess = pool(forward, forward.count).mean
    batch = lax.stop_gradient(options.moments(x, mask, guess))
    batch = batch._replace(count=jnp.minimum(batch.count, 1))
    forward = push(forward, batch)
    first, second, calls = kept.backward_sums
    count = jnp.maximum(calls, 1)
    # No moments, but kept in the same way: two numbers a feature, and whether there are any.
    backward = push(backward, Moments(first / count, second / count, jnp.minimum(calls, 1)))
    # At first by the newest alone, as batch normalization does.
    is_warm = kept.steps >= layer.warmup_steps
    centered = (lambda moments: moments) if layer.center else around_zero
    mean, var, _ = select(is_warm, pool(centered(forward), forward.count), centered(batch))
    there = jnp.where(is_warm, backward.count[:-1], 0)
    share = 1 / (1 + there.sum(0))
    earlier = share[None] * jnp.stack(
        [(there * value[:-1]).sum(0) for value in (backward.mean, backward.var)]
    )
    ratio = jnp.sqrt((var + options.epsilon) / (running_var + options.epsilon))
    ratio = jnp.clip(ratio, 1 / layer.r_max, layer.r_max)
    ratio = jnp.where(kept.steps < layer.correction_steps, 1, ratio)
    scale = lax.rsqrt(var + options.epsilon)
    normalize = _normalization(options, axes, center=layer.center, is_step=sink is not None)
    sink = jnp.zeros_like(kept.backward_sums) if sink is None else sink
    z = normalize(x, mask, mean, scale, ratio, earlier, share, sink)
    stacks = jnp.stack(forward, 1), jnp.stack(backward, 1)
    after = MovingAverages(*stacks, jnp.zeros_like(sink), kept.steps + 1)
    return Averaged(z, mean, var, after)


def _slots(batches: Array) -> Moments:
    """Returns a stack `[batches, 3, *F]` as slots of a memory, each of count 0 or 1."""
    return Moments(*jnp.moveaxis(batches, 1, 0))


def _normalization(
    options: NormOptions, axes: tuple[int, ...], *, center: bool, is_step: bool
) -> Callable[..., Array]:
    """Returns z of (x, mask, mean, scale, ratio, earlier, share, sink), with its own gradient.

    z = ratio n for n = (x - mean) scale. With h = ratio dz, for a gradient dz,

        dx = scale (h - a - n b)        (a, b) = earlier + share (E[h], E[h n])

    a is 0 without centering. The "gradient" of the sink is (E[h], E[h n], 1).
    """

    def wide(value: Array) -> Array:
        return jnp.expand_dims(value, axes)

    def normalized(x: Array, mean: Array, scale: Array) -> Array:
        return (x - wide(mean)) * wide(scale)

    @jax.custom_vjp
    def normalize(x, mask, mean, scale, ratio, earlier, share, sink):
        return wide(ratio) * normalized(x, mean, scale)

    def forward(x, mask, mean, scale, ratio, earlier, share, sink):
        saved = x, mask, mean, scale, ratio, earlier, share
        return wide(ratio) * normalized(x, mean, scale), saved

    def backward(saved, gradient):
        if not is_step:
            raise ValueError(
                f"The gradient of {options.layer} needs the training step of "
                "mbn_jax.make_train_step, which carries its backward statistics to the next step; "
                f"inside of nn.vmap and nn.scan also {BACKWARD_SUMS!r} in their variable_axes."
            )
        x, mask, mean, scale, ratio, earlier, share = saved
        h, n = wide(ratio) * gradient, normalized(x, mean, scale)

        def average(value: Array):
            return batch_moments(
                value,
                axes,
                mask=mask,
                axis_name=options.axis_name,
                axis_index_groups=options.axis_index_groups,
            )

        first, second = average(h), average(h * n)
        # Each device has the mean loss of its own examples. Kept is what one device would find.
        devices = 1
        if options.axis_name is not None:
            devices = lax.psum(1, options.axis_name, axis_index_groups=options.axis_index_groups)
        sums = jnp.stack([first.mean, second.mean]) / devices
        a, b = devices * (earlier + share[None] * sums)
        pull = wide(b) * n + (wide(a) if center else 0)
        if mask is not None:
            pull = jnp.where(mask, pull, 0)
        counted = (first.count > 0).astype(sums.dtype)
        return wide(scale) * (h - pull), *[None] * 6, jnp.stack([*sums, counted])

    normalize.defvjp(forward, backward)
    return normalize


def zero_sums(batch_stats: PyTree) -> PyTree:
    """Returns zeros in the places of all `BACKWARD_SUMS` of a model, and nothing else.

    >>> zero_sums({'a': {'norm': {'mean': 0, 'backward_sums': jnp.ones(2)}}, 'b': {'mean': 0}})
    {'a': {'norm': {'backward_sums': Array([0., 0.], dtype=float32)}}}
    """
    found = {}
    for name, child in batch_stats.items():
        if isinstance(child, Mapping):
            below = zero_sums(child)
            if below:
                found[name] = below
        elif name == BACKWARD_SUMS:
            found[name] = jnp.zeros_like(child)
    return found
