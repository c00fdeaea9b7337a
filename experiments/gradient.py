"""Test error by the gradient through the statistics.

mbn-sweep experiments/gradient.py --workdir=runs/gradient
"""

from mbn_jax.sweeps import Figure, Sweep


def get_sweep():
    """Returns the sweep."""
    return Sweep(
        title="Gradient through the statistics",
        text="'renorm' keeps batch normalization's gradient, 'through' differentiates the pool, "
        "'auto' takes 'through' where a channel sees at most two values.",
        configs={"digits": "../configs/digits.py", "cifar10": "../configs/cifar.py:small_batch"},
        axes={"norm.gradient": ("auto", "through", "renorm")},
        baseline={"norm.gradient": "auto"},
        figures=[Figure(x="norm.gradient", log_y=True), Figure(lines="norm.gradient", log_y=True)],
    )
