"""Norms by batch size in a residual network, with and without Double Forward and transport.

mbn-sweep experiments/norms.py --workdir=runs/norms
"""

from mbn_jax.sweeps import Figure, Sweep

RATE_PER_EXAMPLE = 0.005  # Close to batch normalization's best at each size: norms_rate.py.

# At batch size 2 the choice of memory_rule.py; at the others as many examples.
EXAMPLES_IN_MEMORY = {"start": 128, "end": 1024}


def get_sweep():
    """Returns the sweep."""
    return Sweep(
        title="Norms by batch size",
        text="Test error with the statistics of the run, and with statistics recomputed over "
        "training batches for the same parameters, which shows how good the parameters are.",
        configs={"cifar10": "../configs/cifar.py:resnet8"},
        fields={"num_epochs": 5.0, "norm.decay": 1.0},
        axes={
            "batch size": {
                str(size): {
                    "batch_size": size,
                    "optimizer.learning_rate": RATE_PER_EXAMPLE * size,
                    "norm.memory_size": EXAMPLES_IN_MEMORY["end"] // size,
                    "norm.memory_schedule.start_size": EXAMPLES_IN_MEMORY["start"] // size,
                }
                for size in (2, 8, 32)
            },
            "norm": {
                "batch": {"norm.name": "batch", "double_forward": "off"},
                "batch, rewrite": {"norm.name": "batch"},
                "batch_renorm": {"norm.name": "batch_renorm", "double_forward": "off"},
                "group": {"norm.name": "group", "double_forward": "off"},
                "memorized": {"double_forward": "off"},
                "memorized, rewrite": {},
                "memorized, transport": {"double_forward": "transport"},
            },
        },
        seeds=3,
        baseline={"norm": "batch"},
        metrics=("test_error", "recalibrated_test_error"),
        figures=[
            Figure(x="batch size", lines="norm"),
            Figure(
                x="batch size",
                lines="norm",
                y="recalibrated_test_error",
                title="After recomputing the statistics",
            ),
        ],
    )
