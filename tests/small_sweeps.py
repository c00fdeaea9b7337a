"""Experiment files of small sweeps on part of the digits, and programs that their tests share."""

import functools

from runs import write_config

from mbn_jax.training.config import default_config
from mbn_jax.training.program import Programs


def experiment(folder, data_dir, axes, *, seeds=1, extra="", **fields):
    """Writes an experiment file and its config, ten steps of 16; returns the path of the file."""
    config = default_config()
    config.update_from_flattened_dict(
        {
            "dataset.data_dir": data_dir,
            "dataset.train_split": "train[:160]",
            "dataset.test_split": "test[:100]",
            "batch_size": 16,
            "num_epochs": 1.0,
            "model.features": (4, 4),
            "norm.memory_size": 4,
            "norm.memory_capacity": 8,  # One program for most tests.
            "log_every_steps": 2,
            "eval_every_steps": 5,
            **fields,
        }
    )
    write_config(config, folder / "config.py")
    path = folder / "experiment.py"
    path.write_text(
        "import numpy as np\n"
        "from mbn_jax.sweeps import Figure, Sweep\n"
        "def get_sweep():\n"
        f"  return Sweep(title='Test', configs={{'digits': 'config.py'}}, axes={axes!r},\n"
        f"               seeds={seeds}, {extra})\n"
    )
    return str(path)


@functools.cache
def programs_on_device(device):
    """Returns the programs of a device, compiled once in a session."""
    return Programs([device])
