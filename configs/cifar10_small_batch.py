"""CIFAR-10 at 16x16 and batch size 4, 5,000 images: small batches on harder images than digits.

    mbn-train --config=configs/cifar10_small_batch.py --workdir=runs/cifar10_small_batch

Needs the data set prepared once (docs/framework.md, "Data"). About a minute on 2 CPU cores.
Results: docs/measurements.md.
"""

from mbn_jax.training.config import default_config


def get_config():
    """Returns the configuration."""
    config = default_config()
    config.dataset.name = "cifar10"
    config.dataset.train_split = "train[:5000]"
    config.dataset.test_split = "train[40000:]"  # For choosing defaults: test is not touched.
    config.dataset.image_size = 16
    config.dataset.flip = True
    config.model.features = (32, 64, 64, 128)
    config.batch_size = 4
    config.num_epochs = 10.0
    config.optimizer.learning_rate = 0.02
    config.schedule.warmup_epochs = 0.5
    config.log_every_steps = 250
    return config
