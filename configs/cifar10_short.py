"""ResNet-8 on 3,000 images of CIFAR-10 at 16x16 for 4 epochs: for what is compared over many runs.

    mbn-train --config=configs/cifar10_short.py --workdir=runs/cifar10_short

Small and far from trained out; measures the error of the statistics five times on its way. Needs
the data set prepared once (docs/framework.md, "Data"). Some 15 s on one CPU core. Results:
docs/transport.md.
"""

from mbn_jax.datasets.standard import standard_dataset
from mbn_jax.training.config import default_config


def get_config():
    """Returns the configuration."""
    config = default_config()
    config.dataset.update(standard_dataset("cifar10"))
    config.dataset.train_split = "train[:3000]"
    config.dataset.image_size = 16
    config.dataset.crop_padding = 2
    config.model.name = "cifar_resnet8"
    config.batch_size = 8
    config.num_epochs = 4.0
    config.optimizer.learning_rate = 0.04
    config.optimizer.weight_decay = 1e-4
    config.schedule.name = "constant"
    config.schedule.warmup_epochs = 0.25
    config.norm.memory_size = 64
    config.norm.decay = 0.97
    config.recalibrate_batches = 5
    config.shift.every_steps = 300
    config.shift.examples = 1000
    config.eval_every_steps = 1_000_000  # At the end alone.
    config.checkpoint_every_steps = 1_000_000
    config.log_every_steps = 1_000_000
    return config
