"""Which learning rate suits each setting of ceiling.py, on training images that are held out.

mbn-sweep experiments/ceiling_rate.py --workdir=runs/ceiling_rate
"""

from ceiling import FIELDS, at_rate, settings

from mbn_jax.sweeps import Sweep

RATES = (0.04, 0.08, 0.16, 0.32)
LOWER_RATES = dict.fromkeys(
    (
        "batch 32, standardized",
        "group, plain",
        "group, standardized",
        "batch 4, plain",
        "batch 4, standardized",
        "batch 8, plain",
        "transport 8, standardized",
        "moving average 2, centered",
        "moving average 4, standardized",
        "moving average 8, standardized",
    ),
    (0.01, 0.02),
)
"""Tried as well where 0.04 was the best of the four."""


def get_sweep():
    """Returns the sweep."""
    return Sweep(
        title="Learning rate for each setting of the ceiling",
        text="Errors are on training images that are held out, with recomputed statistics.",
        configs={"cifar10": "../configs/cifar.py:resnet8"},
        fields=FIELDS | {"dataset.test_split": "train[40000:]"},
        axes={
            "norm": {
                f"{name}, rate {rate}": at_rate(fields, rate)
                for name, fields in settings().items()
                for rate in (*LOWER_RATES.get(name, ()), *RATES)
            }
        },
        seeds=1,
        metrics=("test_error", "recalibrated_test_error"),
    )
