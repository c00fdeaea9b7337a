"""ResNet-20 on Fashion-MNIST, a memory of 8 batches.

    mbn-train --config=configs/fashion_mnist_resnet20.py --workdir=runs/fashion_mnist_resnet20

SGD, batch 128, momentum 0.9, 40 epochs, rate decayed to 0. Not run here.
"""

from mbn_jax.datasets.standard import standard_dataset
from mbn_jax.training.config import default_config


def get_config():
    """Returns the configuration."""
    config = default_config()
    config.dataset.update(standard_dataset("fashion_mnist"))
    config.model.name = "cifar_resnet20"
    config.batch_size = 128
    config.num_epochs = 40.0
    config.optimizer.learning_rate = 0.1
    config.optimizer.weight_decay = 1e-4
    config.schedule.warmup_epochs = 1.0
    config.norm.memory_size = 8
    config.norm.decay = 1.0
    config.recalibrate_batches = 20
    return config
