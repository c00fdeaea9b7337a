"""Networks that keep less between forward and backward, and compute it once more."""

from collections.abc import Callable

import jax
from flax import linen as nn

KEPT = ("conv_general_dilated", "dot_general", "psum", "psum_invariant")


def is_kept(primitive, *_, **__) -> bool:
    """Returns whether the backward pass finds the result of an operation, or computes it anew.

    A policy for `jax.checkpoint`. Kept are convolutions, matrix products, sums over devices and
    reductions, such as the statistics of a batch; elementwise operations, such as normalization and
    activation, are cheap enough to run once more.
    """
    return primitive.name in KEPT or primitive.name.startswith("reduce_")


def stage(remat: bool, function: Callable[[nn.Module, jax.Array], jax.Array]) -> Callable:
    """Returns a part of a network, a function of module and input, rematerialized or as it is."""
    return nn.remat(function, policy=is_kept) if remat else function
