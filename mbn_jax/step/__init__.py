"""The training step with Double Forward."""
