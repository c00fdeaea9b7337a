"""CIFAR-10 and CIFAR-100: full recipes, and small ones for comparing norms on a CPU.

    mbn-train --config=configs/cifar.py:resnet20,cifar10 --workdir=runs/resnet20

The argument after the colon is one of:

* `resnet20,cifar10`, `resnet56,cifar100`: the recipe of He et al. (2016, arXiv 1512.03385), section
  4.2: SGD, batch 128, momentum 0.9, 64,000 steps, rate 0.1 divided by 10 twice. ResNet-20 takes
  about a day on 2 CPU cores; it was run here for a few epochs only (docs/results/real_size.md).
  ResNet-56 was not run.
* `vgg16,cifar10`: the convolutions of Simonyan and Zisserman (arXiv 1409.1556), a norm after each
  and one classifier layer, as is usual for CIFAR; rate decayed to 0. Not run here.
* `resnet8`: ResNet-8 on 10,000 images at 16x16, batch 8. About 3 minutes on 2 CPU cores. Results:
  docs/results/batch_size.md.
* `short`: ResNet-8 on 3,000 images at 16x16, 4 epochs, far from converged; measures the error of
  the statistics five times. About 15 s on one CPU core. Results:
  docs/results/transport_statistics.md.
* `small_batch`: a small convnet on 5,000 images at 16x16, batch 4. About a minute on 2 CPU cores.
  Results: docs/results/batch_size.md.

Prepare the data set once: docs/guides/training.md, "Data". The memory of the full recipes holds
8 batches.
"""

from mbn_jax.datasets.standard import standard_dataset
from mbn_jax.training.config import default_config
from mbn_jax.training.presets import use_preset


def get_config(argument="resnet20,cifar10"):
    """Returns the configuration that `argument` names; raises ValueError for an unknown one."""
    if argument not in ARGUMENTS:
        raise ValueError(f"expected one of {'; '.join(ARGUMENTS)} after the colon, got {argument}")
    return ARGUMENTS[argument]()


def resnet(depth, dataset):
    """Returns the recipe of He et al. for CIFAR."""
    config = full_size(dataset)
    config.model.name = f"cifar_resnet{depth}"
    config.num_epochs = 164.0
    config.optimizer.learning_rate = 0.1
    config.optimizer.weight_decay = 1e-4
    config.schedule.name = "step"
    config.schedule.step_epochs = (82.0, 123.0)
    return config


def vgg16():
    """Returns a usual recipe for VGG-16 on CIFAR-10."""
    config = full_size("cifar10")
    config.model.name = "vgg16"
    config.num_epochs = 160.0
    config.optimizer.learning_rate = 0.05
    config.optimizer.weight_decay = 5e-4
    config.schedule.warmup_epochs = 2.0
    return config


def full_size(dataset):
    """Returns what the full recipes share."""
    config = default_config()
    config.dataset.update(standard_dataset(dataset))
    config.batch_size = 128
    use_preset(config, "paper")
    config.recalibrate_batches = 20
    return config


def small_resnet(examples):
    """Returns what the recipes with ResNet-8 share."""
    config = default_config()
    config.dataset.update(standard_dataset("cifar10"))
    config.dataset.train_split = f"train[:{examples}]"
    config.dataset.image_size = 16
    config.dataset.crop_padding = 2
    config.model.name = "cifar_resnet8"
    config.batch_size = 8
    config.optimizer.learning_rate = 0.04
    config.optimizer.weight_decay = 1e-4
    config.schedule.warmup_epochs = 0.25
    return config


def resnet8():
    """Returns the recipe for norms by batch size."""
    config = small_resnet(10_000)
    config.num_epochs = 6.0
    config.norm.memory_size = 128
    config.norm.decay = 1.0
    config.norm.memory_schedule.start_size = 16
    config.recalibrate_batches = 20
    config.log_every_steps = 250
    return config


def short():
    """Returns the recipe for comparisons over many runs."""
    config = small_resnet(3_000)
    config.num_epochs = 4.0
    config.schedule.name = "constant"
    config.norm.memory_size = 64
    config.norm.decay = 0.97
    config.recalibrate_batches = 5
    config.shift.every_steps = 300
    config.shift.examples = 1000
    config.eval_every_steps = 1_000_000  # At the end alone.
    config.checkpoint_every_steps = 1_000_000
    config.log_every_steps = 1_000_000
    return config


def small_batch():
    """Returns the recipe for small batches of images that are harder than digits."""
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


ARGUMENTS = {
    "resnet20,cifar10": lambda: resnet(20, "cifar10"),
    "resnet56,cifar100": lambda: resnet(56, "cifar100"),
    "vgg16,cifar10": vgg16,
    "resnet8": resnet8,
    "short": short,
    "small_batch": small_batch,
}
