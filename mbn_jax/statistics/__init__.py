"""What is done to `batch_stats` beside training."""
