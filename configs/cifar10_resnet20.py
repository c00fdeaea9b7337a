"""ResNet-20 on CIFAR-10 by the recipe of He et al. (2016), section 4.2; a memory of 8 batches.

    mbn-train --config=configs/cifar10_resnet20.py --workdir=runs/cifar10_resnet20

SGD, batch 128, momentum 0.9, 64,000 steps, rate 0.1 divided by 10 twice. Not run here at this
length, which is a day of work for 2 CPU cores; for 4 epochs it was: docs/measurements.md, "The real
size".
"""

from mbn_jax.datasets.standard import standard_dataset
from mbn_jax.training.config import default_config


def get_config():
    """Returns the configuration."""
    config = default_config()
    config.dataset.update(standard_dataset("cifar10"))
    config.model.name = "cifar_resnet20"
    config.batch_size = 128
    config.num_epochs = 164.0
    config.optimizer.learning_rate = 0.1
    config.optimizer.weight_decay = 1e-4
    config.schedule.name = "step"
    config.schedule.step_epochs = (82.0, 123.0)
    config.norm.memory_size = 8
    config.norm.decay = 1.0
    config.recalibrate_batches = 20
    return config
