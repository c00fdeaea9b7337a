"""Transport against Double Forward and other norms: statistics over training, and test error.

mbn-sweep experiments/transport.py --workdir=runs/transport
"""

from mbn_jax.sweeps import Figure, Sweep


def get_sweep():
    """Returns the sweep."""
    return Sweep(
        title="Transport",
        text="Error of the statistics used at inference, against those of the training images "
        "under the current parameters, over training; and final test error, with the statistics "
        "of the run and with recomputed ones. Memories of 64 batches, decay 0.97; the average has "
        "the same decay and no slots.",
        configs={"cifar10": "../configs/cifar.py:short"},
        axes={
            "schedule.name": ("constant", "cosine"),
            # Rates close to batch normalization's best at each size (norms_rate.py).
            "batch size": {
                "2": {
                    "batch_size": 2,
                    "optimizer.learning_rate": 0.01,
                    "shift.every_steps": 1200,
                },
                "8": {},
                "32": {
                    "batch_size": 32,
                    "optimizer.learning_rate": 0.16,
                    "shift.every_steps": 74,
                },
            },
            "norm": {
                "batch": {"norm.name": "batch", "double_forward": "off"},
                "batch_renorm": {"norm.name": "batch_renorm", "double_forward": "off"},
                "group": {"norm.name": "group", "double_forward": "off"},
                "memorized, off": {"double_forward": "off"},
                "memorized, rewrite": {},
                "memorized, transport": {"double_forward": "transport"},
                "averaged, transport": {
                    "norm.memory_size": 0,  # An endless memory: the exponential average.
                    "double_forward": "transport",
                },
            },
        },
        seeds=5,
        baseline={"norm": "memorized, off"},
        metrics=("test_error", "recalibrated_test_error", "error_mean", "error_log_variance"),
        figures=[
            Figure(x="batch size", lines="norm", panels="schedule.name"),
            Figure(
                y="recalibrated_test_error",
                x="batch size",
                lines="norm",
                panels="schedule.name",
                title="After recomputing the statistics",
            ),
            *(
                Figure(
                    y=y,
                    lines="norm",
                    panels="batch size",
                    fixed={"schedule.name": schedule},
                    log_y=True,
                    title=f"{title}, {schedule} rate",
                )
                for schedule in ("constant", "cosine")
                for y, title in (
                    ("error_mean", "Error of the mean, in standard deviations"),
                    ("error_log_variance", "Error of the logarithm of the variance"),
                )
            ),
        ],
    )
