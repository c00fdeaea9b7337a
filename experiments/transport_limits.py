"""Where transport could fail: rates, momentum, first steps, depth, badly sampled batches.

mbn-sweep experiments/transport_limits.py --workdir=runs/transport_limits
"""

from mbn_jax.sweeps import Figure, Sweep


def get_sweep():
    """Returns the sweep."""
    return Sweep(
        title="The limits of transport",
        text="Error of the statistics used at inference, averaged over training at a constant "
        "rate and batch size 8, and final test error.",
        configs={"cifar10": "../configs/cifar.py:short"},
        axes={
            "setting": {
                "as it is": {},
                "rate x 8": {"optimizer.learning_rate": 0.32},
                "momentum 0": {"optimizer.momentum": 0.0, "optimizer.learning_rate": 0.4},
                "momentum 0.99": {"optimizer.momentum": 0.99, "optimizer.learning_rate": 0.004},
                "first 100 steps": {
                    "num_epochs": 0.27,
                    "schedule.warmup_epochs": 0.0,
                    "shift.every_steps": 10,
                },
                "2 classes a batch": {"dataset.classes_per_batch": 2},
                "ResNet-56": {"model.name": "cifar_resnet56"},
            },
            "double_forward": ("off", "rewrite", "transport"),
        },
        seeds=3,
        baseline={"double_forward": "off"},
        over_steps="mean",
        metrics=("test_error", "recalibrated_test_error", "error_mean", "error_log_variance"),
        figures=[
            Figure(
                y=y,
                x="setting",
                lines="double_forward",
                over_steps=over_steps,
                log_y=y != "test_error",
                title=title,
            )
            for y, over_steps, title in (
                ("error_mean", "mean", "Error of the mean, in standard deviations"),
                ("error_log_variance", "mean", "Error of the logarithm of the variance"),
                ("test_error", "last", "Test error"),
            )
        ],
    )
