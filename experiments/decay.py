"""Test error by decay: how fast should a memory forget?

mbn-sweep experiments/decay.py --workdir=runs/decay
"""

from mbn_jax.sweeps import Figure, Sweep


def get_sweep():
    """Returns the sweep."""
    return Sweep(
        title="Decay",
        text="The weight of a batch in the memory against the next newer one; 1 weighs all alike.",
        configs={"digits": "../configs/digits.py", "cifar10": "../configs/cifar.py:small_batch"},
        axes={"norm.decay": (0.5, 0.8, 0.9, 0.95, 0.97, 0.99, 1.0)},
        baseline={"norm.decay": 0.97},
        figures=[Figure(x="norm.decay", log_y=True), Figure(lines="norm.decay", log_y=True)],
    )
