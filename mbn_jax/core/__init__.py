"""Numerics: pure functions on arrays, with jax and numpy alone."""
