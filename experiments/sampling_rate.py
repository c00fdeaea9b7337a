"""Which learning rate suits each norm of sampling.py, on training images that are held out.

mbn-sweep experiments/sampling_rate.py --workdir=runs/sampling_rate
"""

from sampling import CLASSES, CONFIGS, FIELDS, NORMS

from mbn_jax.sweeps import Figure, Sweep


def get_sweep():
    """Returns the sweep."""
    return Sweep(
        title="Learning rate by norm, for badly sampled batches",
        text="Errors are on a fifth of the training split, which was not trained on.",
        configs=CONFIGS,
        fields=FIELDS | {"dataset.test_split": "train[80%:]", "dataset.train_split": "train[:80%]"},
        axes={
            "norm": NORMS,
            "classes a batch": {name: CLASSES[name] for name in ("2", "4", "8", "all")},
            "optimizer.learning_rate": (0.01, 0.02, 0.04, 0.08, 0.16),
        },
        seeds=3,
        figures=[
            Figure(x="optimizer.learning_rate", lines="norm", panels="classes a batch", log_y=True)
        ],
    )
