"""Data sets and the way from them to batches on the device."""
