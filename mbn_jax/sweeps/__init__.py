"""Sweeps: declare a grid of runs, run what is missing of it, report it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mbn_jax.sweeps.declaration import Figure, Sweep

__all__ = ["Figure", "Sweep"]


def __getattr__(name: str):
    # `mbn-sweep --help` imports this package, and must not wait for JAX.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mbn_jax.sweeps import declaration

    return getattr(declaration, name)
