"""Sweeps: declare a grid of runs, run what is missing of it, report it."""

from mbn_jax.sweeps.declaration import Figure, Sweep

__all__ = ["Figure", "Sweep"]
