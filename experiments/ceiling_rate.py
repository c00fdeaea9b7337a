"""Which learning rate suits each norm of ceiling.py, on training images that are held out.

mbn-sweep experiments/ceiling_rate.py --workdir=runs/ceiling_rate
"""

from mbn_jax.sweeps import Figure, Sweep

ORACLE = "experiments.layers.oracle:OracleBatchNorm"
NORMS = {
    "batch, 32": {"norm.name": "batch"},
    "batch, 2": {"norm.name": "batch", "norm.virtual_batch_size": 2},
    "perfect memory, 2": {
        "norm.name": ORACLE,
        "norm.kwargs.forward_size": 32,
        "norm.kwargs.backward_size": 2,
    },
    "transport, 2": {"norm.virtual_batch_size": 2, "double_forward": "transport"},
    "moving average, 2": {
        "norm.name": "moving_average",
        "norm.momentum": 0.98,
        "norm.virtual_batch_size": 2,
    },
    "group": {"norm.name": "group"},
}


def get_sweep():
    """Returns the sweep."""
    return Sweep(
        title="Learning rate for each norm at normalization batch 2",
        text="Errors are on training images that are held out, with recomputed statistics.",
        configs={"cifar10": "../configs/cifar.py:resnet8"},
        fields={
            "dataset.test_split": "train[40000:]",
            "num_epochs": 5.0,
            "batch_size": 32,
            "double_forward": "off",
            "norm.memory_size": 64,
            "norm.decay": 0.97,
            "norm.memory_schedule.start_size": 0,
            "eval_every_steps": 1_000_000,  # At the end alone.
            "checkpoint_every_steps": 1_000_000,
        },
        axes={
            "norm": NORMS,
            "model.conv": ("plain", "standardized"),
            "optimizer.learning_rate": (0.04, 0.08, 0.16, 0.32),
        },
        seeds=1,
        metrics=("test_error", "recalibrated_test_error"),
        figures=[
            Figure(
                x="optimizer.learning_rate",
                lines="norm",
                panels="model.conv",
                y="recalibrated_test_error",
            )
        ],
    )
