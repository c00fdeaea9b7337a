"""What goes into the normalization layers of any model: recorded, and made their statistics."""

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from flax import linen as nn
from flax.core import tracers

from mbn_jax.core.batch_stats import add_moments, moments_over, recalibrated, with_moments
from mbn_jax.core.moments import Array, AxisName, Moments, around_zero, pool_two
from mbn_jax.core.normalization import input_moments
from mbn_jax.linen.batch_renorm import BatchRenorm
from mbn_jax.linen.memorized import MemorizedBatchNorm
from mbn_jax.linen.moving_average import MovingAverageBatchNorm
from mbn_jax.linen.virtual_batches import VirtualBatches

PyTree = Any

LAYERS_WITH_STATISTICS = (
    MemorizedBatchNorm,
    BatchRenorm,
    MovingAverageBatchNorm,
    nn.BatchNorm,
    VirtualBatches,
)
"""Classes of the layers whose `batch_stats` can be recalibrated."""


@contextlib.contextmanager
def record_norm_inputs(
    layer_types: tuple[type[nn.Module], ...],
    layers: str = "",
    *,
    mask: Array | None = None,
    axis_name: AxisName | None = None,
    normalize_by_them: bool = False,
) -> Iterator[dict[str, Moments]]:
    """Records the moments of what goes into the normalization layers of any model.

    Args:
      layer_types: the classes that are normalization layers.
      layers: regular expression; a layer counts whose path has a match of it.
      mask: bool `[batch]`, the examples that count.
      axis_name: named axis over which the batch is spread.
      normalize_by_them: first make them the layer's statistics, in place of those that it was
        given; for a model at inference, with `batch_stats` mutable. Layers without statistics are
        left out.

    Yields:
      A dict of `Moments` by the layer's path, that `model.apply` within the block fills; the inputs
      of a layer that is called twice are pooled.
    """
    recorded: dict[str, Moments] = {}
    wanted = re.compile(layers)
    is_inside = False
    depth, trace = 0, None
    is_over = False

    def interceptor(call, args, kwargs, context):
        nonlocal depth
        if is_over:
            return call(*args, **kwargs)
        depth += 1
        try:
            return record(call, args, kwargs, context)
        finally:
            depth -= 1

    def record(call, args, kwargs, context):
        nonlocal is_inside, trace
        if depth == 1:  # The model itself, applied anew.
            trace = tracers.current_trace()
        module = context.module
        path = "/".join(module.path)
        if (
            is_inside  # Of a layer that is made of layers.
            or context.method_name != "__call__"
            or not isinstance(module, layer_types)
            or not wanted.search(path)
            or (normalize_by_them and not _has_statistics(module))
        ):
            return call(*args, **kwargs)
        if tracers.current_trace() != trace:
            raise ValueError(
                f"The inputs of {path} cannot be recorded inside of nn.scan, nn.vmap or nn.remat; "
                "apply a model without these transforms, or name only layers outside of them."
            )
        x = args[0] if args else kwargs["x"]
        moments = _input_moments(module, x, mask, axis_name, kwargs.get("mask"))
        if path in recorded:
            moments = pool_two(recorded[path], moments)
        recorded[path] = moments
        if normalize_by_them:
            stats = module.variables["batch_stats"]
            for name, value in with_moments(stats, moments).items():
                module.put_variable("batch_stats", name, value)
        is_inside = True
        try:
            return call(*args, **kwargs)
        finally:
            is_inside = False

    try:
        with nn.intercept_methods(interceptor):
            yield recorded
    finally:
        is_over = True  # Under `python -O` flax leaves the interceptor in place.


def _has_statistics(module: nn.Module) -> bool:
    return {"mean", "var"} <= set(module.variables.get("batch_stats", {}))


def _attribute(module: nn.Module, name: str, default: Any) -> Any:
    """Returns an attribute of a layer, or of the layer that `VirtualBatches` makes."""
    if not isinstance(module, VirtualBatches):
        return getattr(module, name, default)
    factory = module.norm
    made = getattr(factory, "func", factory)  # A class, or a function, which tells nothing.
    return getattr(factory, "keywords", {}).get(name, getattr(made, name, default))


def _input_moments(
    module: nn.Module,
    x: Array,
    examples: Array | None,
    axis_name: AxisName | None,
    mask: Array | None,
) -> Moments:
    """Returns the moments of a layer's input; around 0, for a layer that subtracts no mean."""
    axis = _attribute(module, "axis", -1)
    if examples is not None:
        examples = examples.reshape(-1, *(1,) * (x.ndim - 1))
        mask = examples if mask is None else mask & examples
    moments = input_moments(x, axis, mask=mask, axis_name=axis_name)
    return moments if _attribute(module, "center", True) else around_zero(moments)


def recalibrate(apply: Callable[..., Any], variables: PyTree, batches: Iterable[PyTree]) -> PyTree:
    """Computes the statistics of every layer anew over batches, with the parameters as they are.

    Each batch goes forward with every layer normalizing by the statistics of that batch, and the
    moments of the layers' inputs are pooled over the batches by the law of total variance. It tells
    how good the parameters are when their statistics are not at fault, and it must follow wherever
    parameters were changed without training, by averaging them for example. Use large batches of
    shuffled examples: each stands for the population. Layers that the model does not call keep what
    they have; those inside `nn.scan`, `nn.vmap` or `nn.remat` cannot be recorded.

    Args:
      apply: `apply(variables, batch, **options)` runs the model at inference:
        `lambda variables, batch, **options: model.apply(variables, batch['x'], False, **options)`.
      variables: 'params' and 'batch_stats'.
      batches: one or more, as `apply` takes them; one compilation for each shape.

    Returns:
      The new `batch_stats`: one batch in a memory, or the averages.

    Raises:
      ValueError: without batches, where no layer keeps statistics, or for a layer inside of a
        lifted transform.

    References:
      Wu and Johnson, "Rethinking 'Batch' in BatchNorm" (arXiv 2105.07576), section 3: PreciseBN.

    >>> import jax.numpy as jnp
    >>> layer = nn.BatchNorm(use_running_average=True, use_scale=False, use_bias=False)
    >>> batches = [jnp.array([[0.0], [2.0]]), jnp.array([[4.0], [6.0]])]
    >>> variables = layer.init(jax.random.key(0), batches[0])
    >>> stats = recalibrate(layer.apply, variables, batches)
    >>> {name: x.tolist() for name, x in stats.items()}
    {'mean': [3.0], 'var': [5.0]}
    """
    if not variables.get("batch_stats"):
        raise ValueError("There is nothing to recalibrate: the variables have no 'batch_stats'.")

    @jax.jit
    def add_batch(totals: dict[str, Moments], variables: PyTree, batch: PyTree):
        with record_norm_inputs(LAYERS_WITH_STATISTICS, normalize_by_them=True) as recorded:
            apply(variables, batch, mutable=["batch_stats"])
        return add_moments(totals, recorded)

    totals = moments_over(batches, functools.partial(add_batch, variables=variables), "mbn_jax")
    return recalibrated(variables["batch_stats"], totals)
