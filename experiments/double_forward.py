"""Test error with and without Double Forward, by norm and schedule.

mbn-sweep experiments/double_forward.py --workdir=runs/double_forward
"""

from mbn_jax.sweeps import Figure, Sweep


def get_sweep():
    """Returns the sweep."""
    return Sweep(
        title="Double Forward",
        text="Whether the statistics of a batch are recorded before the update or after it. If the "
        "learning rate ends at 0, so does the shift that this corrects; a constant rate keeps it.",
        configs={"digits": "../configs/digits.py", "cifar10": "../configs/cifar.py:small_batch"},
        axes={
            "norm.name": ("batch", "batch_renorm", "memorized"),
            "schedule.name": ("cosine", "constant"),
            "double_forward": ("off", "rewrite"),
        },
        baseline={"double_forward": "off"},
        figures=[
            Figure(x="double_forward", lines="norm.name", panels="schedule.name", log_y=True),
            Figure(
                lines="double_forward",
                panels="schedule.name",
                fixed={"norm.name": "memorized"},
                log_y=True,
            ),
        ],
    )
