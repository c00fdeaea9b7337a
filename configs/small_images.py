"""ResNet-20 on Fashion-MNIST or SVHN, a memory of 8 batches.

    mbn-train --config=configs/small_images.py:fashion_mnist --workdir=runs/fashion_mnist

The argument after the colon is `fashion_mnist` or `svhn` (its train split without the extra one).
The network of He et al. (2016, arXiv 1512.03385), section 4.2: SGD, batch 128, momentum 0.9, 40
epochs; the rate is decayed to 0 for Fashion-MNIST and divided by 10 twice for SVHN. Not run here;
by the speed in docs/results/cost.md it takes 4 to 5 hours on one CPU core. Prepare the data set
once: docs/guides/training.md, "Data".
"""

from mbn_jax.datasets.standard import standard_dataset
from mbn_jax.training.config import default_config
from mbn_jax.training.presets import use_preset

ARGUMENTS = {"fashion_mnist": "fashion_mnist", "svhn": "svhn_cropped"}
"""The data sets, with their names in TFDS."""


def get_config(argument="fashion_mnist"):
    """Returns the configuration for a data set; raises ValueError for an unknown one."""
    if argument not in ARGUMENTS:
        raise ValueError(f"expected one of {'; '.join(ARGUMENTS)} after the colon, got {argument}")
    config = default_config()
    config.dataset.update(standard_dataset(ARGUMENTS[argument]))
    config.model.name = "cifar_resnet20"
    config.batch_size = 128
    config.num_epochs = 40.0
    config.optimizer.learning_rate = 0.1
    config.optimizer.weight_decay = 1e-4
    if argument == "svhn":
        config.schedule.name = "step"
        config.schedule.step_epochs = (20.0, 30.0)
    else:
        config.schedule.warmup_epochs = 1.0
    use_preset(config, "paper")
    config.recalibrate_batches = 20
    return config
