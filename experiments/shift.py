"""What an update does to the statistics, and how wrong the pooled ones are.

mbn-sweep experiments/shift.py --workdir=runs/shift
"""

from mbn_jax.sweeps import Figure, Sweep


def get_sweep():
    """Returns the sweep."""
    return Sweep(
        title="The distribution shift",
        text="Shift: change of the mean and standard deviation of a batch's inputs to each norm "
        "layer by the update that the batch caused. Error: of the statistics used at inference, "
        "against those of the training images under the current parameters. Both averaged over "
        "the layers, at a constant learning rate.",
        configs={"digits": "../configs/digits.py", "cifar10": "../configs/cifar.py:small_batch"},
        fields={
            "schedule.name": "constant",
            "shift.every_steps": 500,
            "shift.examples": 2000,
            "eval_every_steps": 500,
        },
        axes={
            "statistics": {
                "moving average": {"norm.name": "batch"},
                "4 batches": {"norm.memory_size": 4},
                "16 batches": {"norm.memory_size": 16},
                "64 batches": {"norm.memory_size": 64},
                "256 batches": {"norm.memory_size": 256},
            },
            "optimizer.learning_rate": (0.005, 0.02),
            "double_forward": ("off", "rewrite"),
        },
        baseline={"double_forward": "off"},
        over_steps="mean",
        metrics=("test_error", "error_mean", "error_log_variance", "shift_mean", "shift_kl"),
        figures=[
            *(
                Figure(
                    y=y,
                    x="statistics",
                    lines="double_forward",
                    panels="optimizer.learning_rate",
                    over_steps="mean",
                    log_y=True,
                    title=title,
                )
                for y, title in (
                    ("error_mean", "Error of the mean, in standard deviations of the population"),
                    ("error_log_variance", "Error of the logarithm of the variance"),
                )
            ),
            *(
                Figure(
                    y=y,
                    lines="statistics",
                    panels="optimizer.learning_rate",
                    fixed={"double_forward": "rewrite"},
                    log_y=True,
                    title=title,
                )
                for y, title in (
                    ("shift_mean", "Shift of a batch's mean by its update, in standard deviations"),
                    ("shift_std", "Shift of a batch's standard deviation, likewise"),
                    ("shift_kl", "Divergence of the batch after its update from before, nats"),
                )
            ),
        ],
    )
