"""Memorized Batch Normalization with Double Forward, for JAX and Flax.

The layers, the step and what is done to their statistics, for a model of your own. The experiments
are in `mbn_jax.train` and on the command line (`mbn-train --help`); nothing here imports them.
"""

from mbn_jax.averaged import AveragedBatchNorm
from mbn_jax.batch_renorm import BatchRenorm
from mbn_jax.batch_stats import from_batch_norm, to_batch_norm
from mbn_jax.double_forward import TrainState, make_train_step
from mbn_jax.norm_inputs import recalibrate
from mbn_jax.normalization import MemorizedBatchNorm
from mbn_jax.virtual_batches import VirtualBatches

__version__ = "0.1.0"

__all__ = [
    "AveragedBatchNorm",
    "BatchRenorm",
    "MemorizedBatchNorm",
    "TrainState",
    "VirtualBatches",
    "from_batch_norm",
    "make_train_step",
    "recalibrate",
    "to_batch_norm",
]
