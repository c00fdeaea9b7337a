"""Memorized Batch Normalization with Double Forward, for JAX and Flax.

The layers, the training step and functions over their statistics, for a model of your own. The
framework for experiments is `mbn_jax.training`, and `mbn-train --help` on the command line; nothing
here imports it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mbn_jax.core.batch_stats import pool_batch_stats
    from mbn_jax.linen.batch_renorm import BatchRenorm
    from mbn_jax.linen.memorized import MemorizedBatchNorm
    from mbn_jax.linen.moving_average import MovingAverageBatchNorm
    from mbn_jax.linen.virtual_batches import VirtualBatches
    from mbn_jax.statistics.batch_norm import from_batch_norm, to_batch_norm
    from mbn_jax.statistics.recalibration import recalibrate
    from mbn_jax.step.state import TrainState
    from mbn_jax.step.train_step import make_train_step

__version__ = "0.1.0"

__all__ = [
    "BatchRenorm",
    "MemorizedBatchNorm",
    "MovingAverageBatchNorm",
    "TrainState",
    "VirtualBatches",
    "from_batch_norm",
    "make_train_step",
    "pool_batch_stats",
    "recalibrate",
    "to_batch_norm",
]

_MODULES = {
    "BatchRenorm": "mbn_jax.linen.batch_renorm",
    "MemorizedBatchNorm": "mbn_jax.linen.memorized",
    "MovingAverageBatchNorm": "mbn_jax.linen.moving_average",
    "TrainState": "mbn_jax.step.state",
    "VirtualBatches": "mbn_jax.linen.virtual_batches",
    "from_batch_norm": "mbn_jax.statistics.batch_norm",
    "make_train_step": "mbn_jax.step.train_step",
    "pool_batch_stats": "mbn_jax.core.batch_stats",
    "recalibrate": "mbn_jax.statistics.recalibration",
    "to_batch_norm": "mbn_jax.statistics.batch_norm",
}


def __getattr__(name: str) -> Any:
    # On first use: `mbn-train --help` imports this package, and must not wait for JAX.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
