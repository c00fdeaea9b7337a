"""Transport against Double Forward on digits, where the last norm sees one pixel of each image.

mbn-sweep experiments/transport_digits.py --workdir=runs/transport_digits
"""

from mbn_jax.sweeps import Figure, Sweep


def get_sweep():
    """Returns the sweep."""
    return Sweep(
        title="Transport on digits",
        text="Final test error, and error of the statistics used at inference, averaged over "
        "training.",
        configs={"digits": "../configs/digits.py", "cifar10": "../configs/cifar.py:short"},
        fields={"shift.examples": 0, "eval_every_steps": 1_000_000},
        axes={
            "schedule.name": ("constant", "cosine"),
            "batch size": {
                "2": {"shift.every_steps": 1000},
                "8": {
                    "batch_size": 8,
                    "optimizer.learning_rate": 0.04,
                    "shift.every_steps": 250,
                },
            },
            "norm": {
                "memorized, off": {"double_forward": "off"},
                "memorized, rewrite": {},
                "memorized, transport": {"double_forward": "transport"},
                "averaged, transport": {
                    "norm.memory_size": 0,  # An endless memory: the exponential average.
                    "double_forward": "transport",
                },
            },
        },
        seeds=10,
        baseline={"norm": "memorized, off"},
        over_steps="mean",
        metrics=("test_error", "error_mean", "error_log_variance"),
        figures=[
            Figure(x="batch size", lines="norm", panels="schedule.name"),
            Figure(
                y="error_mean",
                x="batch size",
                lines="norm",
                panels="schedule.name",
                over_steps="mean",
                log_y=True,
                title="Error of the mean, in standard deviations",
            ),
        ],
    )
