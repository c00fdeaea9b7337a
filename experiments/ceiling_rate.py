"""Which learning rate suits each norm of ceiling.py, on training images that are held out.

mbn-sweep experiments/ceiling_rate.py --workdir=runs/ceiling_rate
"""

from ceiling import FIELDS, memory, moving_average, oracle

from mbn_jax.sweeps import Figure, Sweep

NORMS = {
    "batch, 32": {"norm.name": "batch"},
    "batch, 2": {"norm.name": "batch", "norm.virtual_batch_size": 2},
    "perfect memory, 2": oracle(32, 2),
    "transport, 2": memory(2, "transport"),
    "moving average, 2": moving_average(2),
    "group": {"norm.name": "group"},
}


def get_sweep():
    """Returns the sweep."""
    return Sweep(
        title="Learning rate for each norm at normalization batch 2",
        text="Errors are on training images that are held out, with recomputed statistics.",
        configs={"cifar10": "../configs/cifar.py:resnet8"},
        fields=FIELDS | {"dataset.test_split": "train[40000:]"},
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
