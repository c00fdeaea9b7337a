"""Named axes of a step: that step and layers mean the same devices."""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from flax import linen as nn
from jax import lax

from mbn_jax.core.moments import AxisName


class LayerCall(NamedTuple):
    """What a call of a layer with batch statistics tells of itself.

    Attributes:
      axis_name: named axis or axes that its statistics are synced over; None: none.
      has_groups: whether that axis is divided into groups.
      training: whether the call normalizes by the batch and writes statistics.
    """

    axis_name: AxisName | None
    has_groups: bool
    training: bool


def check_axis_bound(axis_name: AxisName | None) -> None:
    """Raises ValueError where the step's named axis is not bound."""
    if axis_name is not None and not _is_bound(axis_name):
        raise ValueError(
            f"axis_name={axis_name!r} of make_train_step is not bound; map the step over it with "
            "jax.pmap(step, axis_name=...) or jax.shard_map, or leave axis_name out."
        )


def _is_bound(axis_name: AxisName) -> bool:
    try:
        lax.axis_index(axis_name)
    except NameError:
        return False
    return True


_found: contextvars.ContextVar[dict[str, LayerCall] | None] = contextvars.ContextVar(
    "found", default=None
)


def report_call(path: str, layer: Any, *, training: bool) -> None:
    """Tells `layer_calls` of a call of a layer; does nothing outside of it.

    Args:
      path: path of the layer in its model.
      layer: normalization layer of any Flax API.
      training: whether the call normalizes by the batch and writes statistics.
    """
    found = _found.get()
    if found is not None and (training or path not in found):
        groups = layer.axis_index_groups is not None
        found[path] = LayerCall(layer.axis_name, groups, training)


def has_axes(layer: Any) -> bool:
    """Returns whether a layer is a normalization layer whose statistics can be synced."""
    names = ("axis_name", "axis_index_groups", "use_running_average")
    return all(hasattr(layer, name) for name in names)


@contextlib.contextmanager
def layer_calls() -> Iterator[dict[str, LayerCall]]:
    """Collects the calls of layers with batch statistics, while a forward is traced.

    Layers of linen are found here; an `apply_fn` of another API calls `report_call`.

    Yields:
      The calls by the layer's path; of several calls of a layer one in training, if there is one.
    """
    found: dict[str, LayerCall] = {}

    def interceptor(call, args, kwargs, context):
        module = context.module
        if context.method_name == "__call__" and has_axes(module):
            flag = module.use_running_average
            if flag is None:
                flag = kwargs.get("use_running_average", args[1] if len(args) > 1 else None)
            report_call("/".join(module.path), module, training=not flag)
        return call(*args, **kwargs)

    token = _found.set(found)
    try:
        with nn.intercept_methods(interceptor):
            yield found
    finally:
        _found.reset(token)


def check_axes(
    calls: Mapping[str, LayerCall], axis_name: AxisName | None, *, local_statistics: bool
) -> None:
    """Checks that step and layers mean the same devices.

    Args:
      calls: from `layer_calls`.
      axis_name: the step's.
      local_statistics: whether each device may keep statistics of its own.

    Raises:
      ValueError: naming the axis, or the layers.
    """
    of_step = _names(axis_name)
    training = {path: call for path, call in calls.items() if call.training}
    for name in sorted(set().union(*(_names(c.axis_name) for c in training.values())) - of_step):
        if _is_bound(name):
            raise ValueError(
                f"The layers sync over {name!r}, and make_train_step has axis_name={axis_name!r}: "
                f"gradients would differ between devices; give it {name!r} too."
            )
    if axis_name is None or local_statistics:
        return
    local = sorted(
        path or "the layer"
        for path, call in training.items()
        if call.has_groups or not of_step <= _names(call.axis_name)
    )
    if local:
        raise ValueError(
            f"make_train_step has axis_name={axis_name!r}, and these layers keep statistics of "
            f"their own on each device: {', '.join(local)}. Give the layers the same axis_name to "
            "sync them, or give make_train_step local_statistics=True and pool the batch_stats of "
            "all devices before inference (mbn_jax.pool_batch_stats)."
        )


def _names(axis_name: AxisName | None) -> set[str]:
    if axis_name is None:
        return set()
    return {axis_name} if isinstance(axis_name, str) else set(axis_name)
