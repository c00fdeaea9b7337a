"""Test error by batch size, for batch normalization and memories.

mbn-sweep experiments/batch_size.py --workdir=runs/batch_size
"""

from mbn_jax.sweeps import Figure, Sweep

RATE_PER_EXAMPLE = 0.005  # Close to batch normalization's best at each size: learning_rate.py.


def get_sweep():
    """Returns the sweep."""
    return Sweep(
        title="Batch size",
        text="The learning rate is proportional to the batch size, as suits batch normalization.",
        configs={"digits": "../configs/digits.py", "cifar10": "../configs/cifar.py:small_batch"},
        axes={
            "batch size": {
                str(size): {
                    "batch_size": size,
                    "optimizer.learning_rate": RATE_PER_EXAMPLE * size,
                }
                for size in (2, 4, 8, 16, 32, 64, 128)
            },
            "norm": {
                "batch": {"norm.name": "batch", "double_forward": "off"},
                "memorized, 4 batches": {"norm.memory_size": 4},
                "memorized, 64 batches": {"norm.memory_size": 64},
            },
        },
        baseline={"norm": "batch"},
        figures=[Figure(x="batch size", lines="norm", log_y=True)],
    )
