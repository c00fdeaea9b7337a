"""Memorized Batch Normalization with Double Forward, for JAX and Flax.

The layer and the step, for a model of your own. The experiments are in `mbn_jax.train` and on the
command line (`mbn-train --help`); nothing here imports them.
"""

from mbn_jax.double_forward import TrainState, make_train_step
from mbn_jax.normalization import MemorizedBatchNorm

__version__ = "0.1.0"

__all__ = ["MemorizedBatchNorm", "TrainState", "make_train_step"]
