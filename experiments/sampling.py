"""Test error when a batch sees only a few of the classes.

mbn-sweep experiments/sampling.py --workdir=runs/sampling

The rate comes from `sampling_rate.py`. --config.optimizer.learning_rate=0.08, which suits batches
drawn at random, is too high for two classes.
"""

from mbn_jax.sweeps import Figure, Sweep

CONFIGS = {"digits": "../configs/digits.py", "cifar10": "../configs/cifar.py:small_batch"}

FIELDS = {"batch_size": 40, "log_every_steps": 35}

NORMS = {
    "batch": {"norm.name": "batch", "double_forward": "off"},
    "memorized, 4 batches": {"norm.memory_size": 4},
    "memorized, 64 batches": {},
    "memorized, 64 batches, transport": {"double_forward": "transport"},
    "group": {"norm.name": "group", "double_forward": "off"},
    "none": {"norm.name": "none", "double_forward": "off"},
}

CLASSES = {
    "1": {"dataset.classes_per_batch": 1},
    "2": {"dataset.classes_per_batch": 2},
    "4": {"dataset.classes_per_batch": 4},
    "8": {"dataset.classes_per_batch": 8},
    "all": {},
}


def get_sweep():
    """Returns the sweep."""
    return Sweep(
        title="Badly sampled batches",
        text="Each batch of 40 has images of this many of the ten classes; 'all': drawn at random.",
        configs=CONFIGS,
        fields=FIELDS | {"optimizer.learning_rate": 0.02},
        axes={"norm": NORMS, "classes a batch": CLASSES},
        baseline={"norm": "batch"},
        figures=[Figure(x="classes a batch", lines="norm", log_y=True)],
    )
