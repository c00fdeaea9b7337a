"""Norms in ResNet-20 on all of CIFAR-10 at its own size, in a short training.

mbn-sweep experiments/real_size.py --workdir=runs/real_size
"""

from mbn_jax.sweeps import Sweep
from mbn_jax.training.presets import PRESETS


def get_sweep():
    """Returns the sweep."""
    return Sweep(
        title="The real size",
        text="ResNet-20 on 50,000 CIFAR-10 images at 32x32, batch 128, a short training with a "
        "learning rate that decays to 0 along a cosine.",
        configs={"cifar10": "../configs/cifar.py:resnet20,cifar10"},
        fields={
            "num_epochs": 2.0,
            "schedule.name": "cosine",
            "eval_every_steps": 1_000_000,  # At the end alone.
            "checkpoint_every_steps": 1_000_000,
        },
        axes={
            "norm": {
                "batch": {"norm.name": "batch", "double_forward": "off"},
                "memory of 8, rewrite": dict(PRESETS["paper"]),
                "memory of 64, transport": dict(PRESETS["recommended"]),
            }
        },
        seeds=3,
        baseline={"norm": "batch"},
        metrics=("test_error", "recalibrated_test_error"),
    )
