"""Which memory suits transport: how many batches, by batch size and learning rate.

mbn-sweep experiments/transport_memory.py --workdir=runs/transport_memory
"""

from mbn_jax.sweeps import Figure, Sweep


def get_sweep():
    """Returns the sweep."""
    return Sweep(
        title="The memory of transport",
        text="Error of the statistics used at inference, averaged over training at a constant "
        "rate, and final test error. All batches in the memory have equal weight, except in the "
        "last memory.",
        configs={"cifar10": "../configs/cifar.py:short"},
        fields={"norm.memory_capacity": 256},
        axes={
            "batch size, rate": {
                "2, 0.01": {
                    "batch_size": 2,
                    "optimizer.learning_rate": 0.01,
                    "shift.every_steps": 1200,
                },
                "8, 0.04": {},
                "8, 0.16": {"optimizer.learning_rate": 0.16},
                "32, 0.16": {
                    "batch_size": 32,
                    "optimizer.learning_rate": 0.16,
                    "shift.every_steps": 74,
                },
            },
            "memory": {
                **{
                    str(size): {"norm.memory_size": size, "norm.decay": 1.0}
                    for size in (1, 4, 16, 64, 256)
                },
                "256, decay 0.97": {"norm.memory_size": 256},
            },
            "double_forward": ("off", "rewrite", "transport"),
        },
        seeds=2,
        baseline={"double_forward": "off"},
        over_steps="mean",
        metrics=("test_error", "recalibrated_test_error", "error_mean", "error_log_variance"),
        figures=[
            Figure(
                y=y,
                x="memory",
                lines="double_forward",
                panels="batch size, rate",
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
