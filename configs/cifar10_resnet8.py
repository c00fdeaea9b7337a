"""A small ResNet-8 on 10,000 images of CIFAR-10 at 16x16: norms by batch size, on a small machine.

    mbn-train --config=configs/cifar10_resnet8.py --workdir=runs/cifar10_resnet8

The residual network of He et al. (2016), section 4.2, with one block a stage. Needs the data set
prepared once (docs/framework.md, "Data"). Some 3 minutes on 2 CPU cores. Results:
docs/measurements.md, "Norms by batch size".
"""

from mbn_jax.datasets.standard import standard_dataset
from mbn_jax.training.config import default_config


def get_config():
    """Returns the configuration."""
    config = default_config()
    config.dataset.update(standard_dataset("cifar10"))
    config.dataset.train_split = "train[:10000]"
    config.dataset.image_size = 16
    config.dataset.crop_padding = 2
    config.model.name = "cifar_resnet8"
    config.batch_size = 8
    config.num_epochs = 6.0
    config.optimizer.learning_rate = 0.04
    config.optimizer.weight_decay = 1e-4
    config.schedule.warmup_epochs = 0.25
    config.norm.memory_size = 128
    config.norm.decay = 1.0
    config.norm.memory_schedule.start_size = 16
    config.recalibrate_batches = 20
    config.log_every_steps = 250
    return config
