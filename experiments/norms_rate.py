"""Which learning rate suits batch normalization in the network of norms.py, on held-out images.

mbn-sweep experiments/norms_rate.py --workdir=runs/norms_rate
"""

from mbn_jax.sweeps import Figure, Sweep


def get_sweep():
    """Returns the sweep."""
    return Sweep(
        title="Learning rate by batch size, for batch normalization",
        text="Errors are on training images that are held out.",
        configs={"cifar10": "../configs/cifar.py:resnet8"},
        fields={
            "num_epochs": 5.0,
            "norm.name": "batch",
            "double_forward": "off",
            "dataset.test_split": "train[40000:]",
        },
        axes={
            "batch size, rate": {
                f"{size}, {rate * size:g}": {
                    "batch_size": size,
                    "optimizer.learning_rate": rate * size,
                }
                for size in (2, 8, 32)
                for rate in (0.0025, 0.005, 0.01)
            },
        },
        seeds=1,
        metrics=("test_error", "recalibrated_test_error"),
        figures=[Figure(x="batch size, rate"), Figure(x="batch size, rate", y="train_error")],
    )
