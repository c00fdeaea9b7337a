"""Rematerialization: keep less for the backward pass, and compute the rest a second time there."""

from collections.abc import Callable

import jax
from flax import linen as nn

KEPT = ("conv_general_dilated", "dot_general", "psum", "psum_invariant")


def is_kept(primitive, *_, **__) -> bool:
    """Returns whether to keep the result of an operation for the backward pass.

    A policy for `jax.checkpoint`. It keeps convolutions, matrix products, sums over devices and
    reductions, such as the statistics of a batch. Elementwise operations, such as normalization and
    activation, are cheap enough to run a second time.
    """
    return primitive.name in KEPT or primitive.name.startswith("reduce_")


def stage(remat: bool, function: Callable[[nn.Module, jax.Array], jax.Array]) -> Callable:
    """Returns a part of a network, a function of module and input, rematerialized if `remat`."""
    if not remat:
        return function

    def rematerialized(module: nn.Module, x: jax.Array) -> jax.Array:
        return function(module, x)  # A `functools.partial` has no name, for which flax asks.

    return nn.remat(rematerialized, policy=is_kept)
