"""What the layers for every Flax API share: checks of their options, the arrays of a memory.

`layer` is a layer of any API, with attributes of the names that its class documents.
"""

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax

from mbn_jax.core.gradient import GRADIENTS
from mbn_jax.core.memory import Endless, Slots, rule_at
from mbn_jax.core.moments import Array
from mbn_jax.core.normalization import NormOptions

EMPTY = {"mean": 0, "var": 1, "count": 0, "weight": 0}
"""What the arrays of an empty memory are filled with."""


def is_number(value: Any) -> bool:
    """Returns whether an option is a number that can be checked: not traced, not a function."""
    return not callable(value) and not isinstance(value, jax.core.Tracer)


def check_memorized(layer: Any) -> None:
    """Raises ValueError for an impossible option of a `MemorizedBatchNorm`."""
    _check_axis_groups(layer)
    _check_memory_options(layer.memory_size, layer.decay, layer.memory_capacity)
    if layer.gradient not in GRADIENTS:
        raise ValueError(f"gradient must be one of {GRADIENTS}, got {layer.gradient!r}.")


def check_renorm(layer: Any) -> None:
    """Raises ValueError for an impossible option of a `BatchRenorm`."""
    _check_axis_groups(layer)
    if not 0 <= layer.momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {layer.momentum}.")
    for name, least in (("r_max", 1), ("d_max", 0)):
        limit = getattr(layer, name)
        if is_number(limit) and limit < least:
            raise ValueError(f"{name} must be {least} or more, got {limit}.")


def _check_axis_groups(layer: Any) -> None:
    if layer.axis_index_groups is not None and layer.axis_name is None:
        raise ValueError("axis_index_groups divides a named axis; give axis_name too.")


def _check_memory_options(size: Any, decay: Any, capacity: int | None) -> None:
    """Raises ValueError where a number is impossible; traced ones and functions are trusted."""
    if capacity is not None and (size is None or capacity < 1):
        needs = "must be 1 or more" if size is not None else "needs a memory_size that is not None"
        raise ValueError(f"memory_capacity {needs}, got {capacity}.")
    if size is not None and not is_number(size) and capacity is None:
        raise ValueError(
            "A memory_size that is traced or a function needs memory_capacity, the number of slots "
            "to make room for."
        )
    if size is not None and is_number(size) and (int(size) != size or size < 1):
        raise ValueError(
            "memory_size must be a whole number of 1 or more (it counts the current batch), or "
            f"None for an endless memory, got {size}."
        )
    if size is not None and is_number(size) and capacity is not None and size > capacity:
        raise ValueError(f"memory_size must be at most memory_capacity={capacity}, got {size}.")
    if is_number(decay) and not 0 < decay <= 1:
        raise ValueError(f"decay must be in (0, 1], got {decay}.")


def memory_arrays(
    layer: Any, options: NormOptions, features: tuple[int, ...], dtype: Any
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape and dtype of the arrays of a memory, by name, in the order of `Moments`.

    Args:
      layer: a `MemorizedBatchNorm`.
      options: of the layer.
      features: shape of the features.
      dtype: of the inputs.
    """
    is_endless = layer.memory_size is None
    names = ("mean", "var", "weight" if is_endless else "count")
    slots = () if is_endless else (layer.memory_capacity or int(cast(int, layer.memory_size)),)
    return {
        name: jax.ShapeDtypeStruct((*slots, *features), dtype)
        for name, dtype in zip(names, options.statistics_dtypes(dtype), strict=True)
    }


def check_memory(
    memory: Mapping[str, Array],
    expected: Mapping[str, jax.ShapeDtypeStruct],
    options: NormOptions,
    *,
    inference: bool,
) -> None:
    """Raises ValueError for a memory that does not fit its layer and input.

    Args:
      memory: the arrays that the layer keeps.
      expected: from `memory_arrays`.
      options: of the layer.
      inference: whether the memory stays as it is, so that fewer digits do no harm.
    """
    wanted = "(*features)" if "weight" in expected else "(slots, *features)"
    for name, array in expected.items():
        value = memory[name]
        if value.shape != array.shape:
            raise ValueError(
                f"{options.layer} expected a memory of shape {array.shape} {wanted}, "
                f"got {value.shape}; build the layer with the memory_size or "
                "memory_capacity that its batch_stats were made with."
            )
        if not inference and jnp.finfo(value.dtype).bits < jnp.finfo(array.dtype).bits:
            raise ValueError(
                f"{options.layer} expected a memory of {array.dtype}, got {value.dtype}; "
                "initialize it with inputs of this dtype (in NNX, give it the dtype), and leave "
                "batch_stats out of a policy that casts variables."
            )
    is_complex = jnp.issubdtype(expected["mean"].dtype, jnp.complexfloating)
    if is_complex and not jnp.iscomplexobj(memory["mean"]):
        raise ValueError(
            f"{options.layer} got complex inputs, but its memory was initialized with real "
            "ones; initialize it with complex inputs (in NNX, give it the dtype)."
        )


def counts_steps(layer: Any) -> bool:
    """Returns whether a layer needs the number of its training calls: for a schedule."""
    return callable(layer.memory_size) or callable(layer.decay)


def rule_of_call(
    layer: Any, steps: Array | None, dtype: Any, *, inference: bool
) -> tuple[Slots | Endless, Array]:
    """Returns the memory's rule in one call, and what `batch_stats` record of it, `[2]`.

    Args:
      layer: a `MemorizedBatchNorm`.
      steps: training calls so far, where `counts_steps(layer)`.
      dtype: of the record.
      inference: whether the call is one at inference, which uses the rule of the last training
        call.
    """
    step = jnp.zeros((), jnp.int32)
    if steps is not None:
        step = jnp.maximum(steps - 1, 0) if inference else steps
    size, decay = rule_at(layer.memory_size, layer.decay, step)
    shown = jnp.inf if size is None else size
    numbers = jnp.stack([jnp.asarray(value, dtype) for value in (shown, decay)])
    rule: Slots | Endless = Endless(decay) if size is None else Slots(size, decay)
    return rule, lax.stop_gradient(numbers)
