"""The numbers of a configuration that one compiled program takes as data."""

from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict


class HParams(NamedTuple):
    """Hyperparameters that may differ between runs of one compiled program.

    They are Python numbers on the host, and traced arrays where a device function is compiled.

    Attributes:
      seed: seed of parameters, augmentation and dropout.
      memory_size: batches in the memory; of no effect for an endless memory.
      memory_start_size: memory size at the begin of its schedule; of no effect without a schedule.
      decay: weight of a batch in the memory relative to the next newer one.
      learning_rate: learning rate before its schedule.
      weight_decay: weight decay of the optimizer.
    """

    seed: Any
    memory_size: Any
    memory_start_size: Any
    decay: Any
    learning_rate: Any
    weight_decay: Any

    @classmethod
    def from_config(cls, config: ConfigDict) -> "HParams":
        """Returns the hyperparameters of a run configuration, as Python numbers."""
        return cls(
            seed=config.seed,
            memory_size=config.norm.memory_size,
            memory_start_size=config.norm.memory_schedule.start_size,
            decay=config.norm.decay,
            learning_rate=config.optimizer.learning_rate,
            weight_decay=config.optimizer.weight_decay,
        )

    def as_arrays(self) -> "HParams":
        """Returns the numbers in the dtypes of the compiled program: int32 and float32."""
        dtypes = (np.int32, np.int32, np.int32, np.float32, np.float32, np.float32)
        return HParams(*(dtype(value) for dtype, value in zip(dtypes, self, strict=True)))


HPARAM_FIELDS = (
    "seed",
    "norm.memory_size",
    "norm.memory_schedule.start_size",
    "norm.decay",
    "optimizer.learning_rate",
    "optimizer.weight_decay",
)
"""The config fields that `HParams` holds."""
