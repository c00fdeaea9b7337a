"""Layers, training step and functions over statistics for models of `flax.nnx`."""

from mbn_jax.nnx.batch_norm import from_batch_norm, to_batch_norm
from mbn_jax.nnx.batch_renorm import BatchRenorm
from mbn_jax.nnx.functional import functional, update_model
from mbn_jax.nnx.memorized import BatchMoments, MemorizedBatchNorm
from mbn_jax.nnx.recalibration import recalibrate
from mbn_jax.nnx.train_step import make_train_step

__all__ = [
    "BatchMoments",
    "BatchRenorm",
    "MemorizedBatchNorm",
    "from_batch_norm",
    "functional",
    "make_train_step",
    "recalibrate",
    "to_batch_norm",
    "update_model",
]
