"""Which learning rate suits each batch size, on training images that are held out.

    mbn-sweep experiments/learning_rate.py --workdir=runs/learning_rate --seeds=3

The rates of `batch_size.py` come from here.
"""

from mbn_jax.sweeps import Figure, Sweep


def get_sweep():
    """Returns the sweep."""
    return Sweep(
        title="Learning rate by batch size",
        text="Errors are on a fifth of the training split, which was not trained on.",
        configs={"digits": "../configs/digits.py", "cifar10": "../configs/cifar.py:small_batch"},
        fields={"dataset.test_split": "train[80%:]", "dataset.train_split": "train[:80%]"},
        axes={
            "batch_size": (2, 4, 8, 16, 32, 64, 128),
            "norm": {
                "batch": {"norm.name": "batch", "double_forward": "off"},
                "memorized": {},
            },
            "optimizer.learning_rate": tuple(0.01 * 2**power for power in range(-5, 7)),
        },
        figures=[Figure(x="optimizer.learning_rate", lines="norm", panels="batch_size")],
    )
