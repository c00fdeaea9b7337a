"""A small U-Net at batch size 2; about 20 s on 2 CPU cores.

mbn-train --config=examples/segmentation/config.py --workdir=runs/segmentation
"""

from segmentation import PixelLoss, Shapes, UNet

from mbn_jax.training.config import default_config
from mbn_jax.training.presets import use_preset


def get_config():
    """Returns the configuration."""
    config = default_config()
    config.dataset.name = Shapes
    config.model.name = UNet
    config.loss.name = PixelLoss
    config.optimizer.name = "segmentation:adamw"  # What has no name of its own: by a text.
    config.optimizer.learning_rate = 0.005
    config.optimizer.weight_decay = 1e-4
    config.batch_size = 2
    config.num_epochs = 6.0
    use_preset(config, "recommended")
    return config
