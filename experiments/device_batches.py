r"""Two examples on each of eight devices: local statistics, synced ones, and memories of both.

mbn-sweep experiments/device_batches.py --workdir=runs/device_batches

A device of its own is a virtual batch here, which trains the same network on one device. What each
norm sends over the links is counted by

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python experiments/scripts/pod_cost.py \
        --config=configs/cifar.py:resnet8 --config.batch_size=16 --image 16 16 3 --classes 10
"""

from ceiling import FIELDS

from mbn_jax.sweeps import Sweep

LOCAL = {"norm.virtual_batch_size": 2}


def get_sweep():
    """Returns the sweep."""
    return Sweep(
        title="Small batches on many devices",
        text="ResNet-8 on 10,000 CIFAR-10 images at 16x16, 5 epochs of SGD with batch 16. Local "
        "statistics are those of two examples, synced ones of sixteen.",
        configs={"cifar10": "../configs/cifar.py:resnet8"},
        fields=FIELDS | {"batch_size": 16, "optimizer.learning_rate": 0.08},
        axes={
            "norm": {
                "batch, local": {"norm.name": "batch"} | LOCAL,
                "batch, synced": {"norm.name": "batch"},
                "memory, local, off": LOCAL,
                "memory, local, transport": {"double_forward": "transport"} | LOCAL,
                "memory, synced, transport": {"double_forward": "transport"},
            }
        },
        seeds=5,
        baseline={"norm": "batch, local"},
        metrics=("test_error", "recalibrated_test_error"),
    )
