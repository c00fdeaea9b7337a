"""VGG-16 with norms on CIFAR-10, a memory of 8 batches.

    mbn-train --config=configs/cifar10_vgg16.py --workdir=runs/cifar10_vgg16

The convolutions of Simonyan and Zisserman (arXiv 1409.1556), a norm after each and one classifier
layer, as is usual for CIFAR. SGD, batch 128, momentum 0.9, rate decayed to 0. Not run here.
"""

from mbn_jax.datasets.standard import standard_dataset
from mbn_jax.training.config import default_config


def get_config():
    """Returns the configuration."""
    config = default_config()
    config.dataset.update(standard_dataset("cifar10"))
    config.model.name = "vgg16"
    config.batch_size = 128
    config.num_epochs = 160.0
    config.optimizer.learning_rate = 0.05
    config.optimizer.weight_decay = 5e-4
    config.schedule.warmup_epochs = 2.0
    config.norm.memory_size = 8
    config.norm.decay = 1.0
    config.recalibrate_batches = 20
    return config
