"""Data sets: opened through TFDS, cut into batches, augmented on the device."""
