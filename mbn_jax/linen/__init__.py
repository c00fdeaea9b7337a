"""Normalization layers for flax.linen."""
