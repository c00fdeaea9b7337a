"""Test error by the gradient through the statistics.

mbn-sweep experiments/gradient.py --workdir=runs/gradient
"""

from mbn_jax.sweeps import Figure, Sweep


def get_sweep():
    """Returns the sweep."""
    return Sweep(
        title="Gradient through the statistics",
        text="'renorm' keeps batch normalization's gradient, 'through' differentiates the pool, "
        "'auto' takes 'through' where a channel sees at most two values. Clipping is Batch "
        "Renormalization's.",
        configs={"digits": "../configs/digits.py", "cifar10": "../configs/cifar10_small_batch.py"},
        axes={
            "gradient": {
                "auto": {},
                "through": {"norm.gradient": "through"},
                "renorm": {"norm.gradient": "renorm"},
                "renorm, clipped": {
                    "norm.gradient": "renorm",
                    "norm.r_max": 3.0,
                    "norm.d_max": 5.0,
                },
                "renorm, clipped hard": {
                    "norm.gradient": "renorm",
                    "norm.r_max": 1.5,
                    "norm.d_max": 0.5,
                },
            }
        },
        baseline={"gradient": "auto"},
        figures=[Figure(x="gradient", log_y=True), Figure(lines="gradient", log_y=True)],
    )
