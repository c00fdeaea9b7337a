"""Which memory costs no accuracy at inference: size, decay, growth.

mbn-sweep experiments/memory_rule.py --workdir=runs/memory_rule
"""

from mbn_jax.sweeps import Figure, Sweep


def get_sweep():
    """Returns the sweep."""
    return Sweep(
        title="The memory's rule",
        text="Test error with the memory, and with statistics recomputed over training batches "
        "for the same parameters. The gap is the memory's own noise and staleness. Errors are on "
        "held-out training images.",
        configs={"cifar10": "../configs/cifar.py:resnet8"},
        fields={
            "dataset.train_split": "train[:5000]",
            "dataset.test_split": "train[40000:]",
            "batch_size": 2,
            "optimizer.learning_rate": 0.01,
            "norm.memory_capacity": 512,
            "double_forward": "off",
            "norm.memory_schedule.start_size": 0,
        },
        axes={
            "memory": {
                "16, decay 1": {"norm.memory_size": 16, "norm.decay": 1.0},
                "64, decay 0.97": {"norm.memory_size": 64, "norm.decay": 0.97},
                "64, decay 1": {"norm.memory_size": 64, "norm.decay": 1.0},
                "256, decay 0.99": {"norm.memory_size": 256, "norm.decay": 0.99},
                "256, decay 1": {"norm.memory_size": 256, "norm.decay": 1.0},
                "16 to 256, decay 1": {
                    "norm.memory_size": 256,
                    "norm.decay": 1.0,
                    "norm.memory_schedule.start_size": 16,
                },
                "64 to 512, decay 1": {
                    "norm.memory_size": 512,
                    "norm.decay": 1.0,
                    "norm.memory_schedule.start_size": 64,
                },
            }
        },
        seeds=3,
        baseline={"memory": "64, decay 0.97"},
        metrics=("test_error", "recalibrated_test_error"),
        figures=[
            Figure(x="memory"),
            Figure(
                x="memory", y="recalibrated_test_error", title="After recomputing the statistics"
            ),
        ],
    )
