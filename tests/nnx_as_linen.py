"""Layers of `mbn_jax.nnx` as linen modules, so that the contract tests run over both kinds."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax import nnx


class AsLinen(nn.Module):
    """Carries the Variables of an NNX layer in the collections that the linen layer has."""

    make: Callable[..., nnx.Module]
    options: Any
    use_running_average: bool | None

    @nn.compact
    def __call__(self, x, use_running_average=None, *, mask=None):
        inference = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        axis = self.options.get("axis", -1)
        axes = sorted(a % x.ndim for a in ((axis,) if isinstance(axis, int) else axis))
        layer = self.make([x.shape[a] for a in axes], rngs=nnx.Rngs(0), **self.options)
        variables = {}
        for (name,), variable in nnx.to_flat_state(nnx.state(layer)):
            value = variable.get_value()
            if isinstance(variable, nnx.Param):
                getattr(layer, name).set_value(self.param(name, lambda _, value=value: value))
            else:
                variables[name] = self.variable("batch_stats", name, lambda value=value: value)
                getattr(layer, name).set_value(variables[name].value)
        if self.is_initializing():  # A layer of NNX is made, not initialized by a call.
            return jnp.asarray(x)
        y = layer(x, use_running_average=inference, mask=mask)
        if not inference:
            for name, variable in variables.items():
                variable.value = getattr(layer, name).get_value()
        return y


def as_linen(make):
    """Returns what makes the linen module, called with the options of a layer."""

    def linen_layer(use_running_average=None, **options):
        return AsLinen(make, options, use_running_average)

    return linen_layer
