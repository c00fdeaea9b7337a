"""ResNet-50 (v1.5) on ImageNet, for 8 accelerators; a memory of 8 batches on each.

    mbn-train --config=configs/imagenet.py --workdir=runs/imagenet

The recipe of Goyal et al. (arXiv 1706.02677): batch 256 at rate 0.1 (scale the rate with the batch
size), warm-up of 5 epochs, 90 epochs, the last scale of each block 0 at first; but the rate decayed
to 0 along a cosine. Each device keeps its own statistics, of 32 images a batch: batches that small
are where a memory helps. Not run here, so neither runtime nor result is known. Prepare the data set
once: docs/guides/training.md, "Data". A smaller network: --config.model.name=resnet18.
"""

from mbn_jax.datasets.standard import standard_dataset
from mbn_jax.training.config import default_config
from mbn_jax.training.presets import use_preset


def get_config():
    """Returns the configuration."""
    config = default_config()
    config.dataset.update(standard_dataset("imagenet2012"))
    config.model.name = "resnet50"
    config.model.zero_init_last_scale = True
    config.model.dtype = "bfloat16"
    config.batch_size = 256
    config.num_epochs = 90.0
    config.optimizer.learning_rate = 0.1
    config.optimizer.weight_decay = 1e-4
    config.schedule.warmup_epochs = 5.0
    config.norm.sync = "local"
    use_preset(config, "paper")
    config.recalibrate_batches = 50
    config.eval_batch_size = 1024
    return config
