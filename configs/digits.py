"""Handwritten digits at batch size 2: where batch normalization fails and a memory does not.

    mbn-train --config=configs/digits.py --workdir=runs/digits
    mbn-train --config=configs/digits.py --workdir=runs/batch --config.norm.name=batch \
        --config.double_forward=off

The method of Guo et al. (AAAI 2018, arXiv 2010.04947). 1,797 real 8x8 images, shipped inside
scikit-learn; a convnet whose last norm sees 1x1 pixels, so that a batch of 2 gives it two values
per channel. About 10 s on 2 CPU cores; test error about 1 % (README.md).
"""

from mbn_jax.training.config import default_config


def get_config():
    """Returns the configuration of the main job."""
    config = default_config()
    config.batch_size = 2
    config.num_epochs = 8.0
    config.optimizer.learning_rate = 0.02
    config.schedule.warmup_epochs = 0.4
    config.log_every_steps = 200
    return config
