"""Numerics of the layers: pure functions on arrays, with jax alone."""
