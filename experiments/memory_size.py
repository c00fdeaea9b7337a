"""Test error by memory size: how many batches should a memory hold?

mbn-sweep experiments/memory_size.py --workdir=runs/memory_size
"""

from mbn_jax.sweeps import Figure, Sweep


def get_sweep():
    """Returns the sweep."""
    return Sweep(
        title="Memory size",
        text="The last k batches are pooled; k = 1 is batch normalization without moving averages.",
        configs={"digits": "../configs/digits.py", "cifar10": "../configs/cifar.py:small_batch"},
        axes={"norm.memory_size": (1, 2, 4, 8, 16, 32, 64)},
        baseline={"norm.memory_size": 64},
        figures=[
            Figure(x="norm.memory_size", log_y=True),
            Figure(lines="norm.memory_size", log_y=True),
            Figure(y="train_loss", lines="norm.memory_size", log_y=True),
        ],
    )
