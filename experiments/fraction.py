"""How much of the batch the second forward needs.

mbn-sweep experiments/fraction.py --workdir=runs/fraction
"""

from mbn_jax.sweeps import Figure, Sweep


def get_sweep():
    """Returns the sweep."""
    return Sweep(
        title="A second forward on a part of the batch",
        text="Error of the statistics with the second forward on a part of the batch. At a "
        "constant learning rate.",
        configs={"cifar10": "../configs/cifar.py:short"},
        axes={
            "batch size": {  # Odd periods, because the published runs had them.
                "8": {"shift.every_steps": 149},
                "32": {
                    "batch_size": 32,
                    "optimizer.learning_rate": 0.16,
                    "shift.every_steps": 37,
                },
            },
            "second forward": {
                "off": {"double_forward": "off"},
                "rewrite": {},
                "rewrite, 1/4": {"double_forward_fraction": 0.25},
                "transport": {"double_forward": "transport"},
                **{
                    f"transport, 1/{n}": {
                        "double_forward": "transport",
                        "double_forward_fraction": 1 / n,
                    }
                    for n in (2, 4, 8)
                },
            },
        },
        seeds=2,
        baseline={"second forward": "transport"},
        over_steps="mean",
        metrics=("test_error", "recalibrated_test_error", "error_mean", "error_log_variance"),
        figures=[
            Figure(
                y=y,
                x="second forward",
                lines="batch size",
                over_steps="mean",
                log_y=True,
                title=title,
            )
            for y, title in (
                ("error_mean", "Error of the mean, in standard deviations"),
                ("error_log_variance", "Error of the logarithm of the variance"),
            )
        ],
    )
