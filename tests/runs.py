"""What a run leaves (records, its last state), config files, and flags of further processes."""

import os
import pathlib

import jax
import numpy as np

from mbn_jax.training.checkpoints import Checkpoints
from mbn_jax.training.config import default_config
from mbn_jax.training.reporting import read_metrics
from mbn_jax.training.workdir import CHECKPOINTS


def digits_config(data_dir, **fields):
    """A config that trains on the digits, cropped at random, 16 at a time."""
    config = default_config()
    shared = {"dataset.data_dir": data_dir, "dataset.crop_padding": 1, "batch_size": 16}
    config.update_from_flattened_dict({**shared, **fields})
    return config


def forty_steps(data_dir, **fields):
    """A config of forty steps on part of the digits, with a checkpoint every ten."""
    short = {
        "dataset.train_split": "train[:640]",
        "dataset.test_split": "test[:100]",
        "num_epochs": 1.0,
        "checkpoint_every_steps": 10,
    }
    return digits_config(data_dir, **{**short, **fields})


def records(workdir):
    """The records of a run, times apart."""
    return [
        {k: v for k, v in record.items() if k != "images_per_second"}
        for record in read_metrics(pathlib.Path(workdir))
    ]


def final_state(programs, config, workdir, **options):
    """The state of a run's newest checkpoint on the host, its key as an array of integers."""
    program = programs.get(config)
    checkpoints = Checkpoints(pathlib.Path(workdir) / CHECKPOINTS)
    state = checkpoints.restore(
        program.init_state(config),
        local_statistics=program.task.local_statistics,
        devices=programs.devices,
        **options,
    )
    checkpoints.close()
    return jax.device_get(state.replace(key=jax.random.key_data(state.key)))


def xla_flags(devices=1):
    """The flags of the tests, for a process of its own with so many devices."""
    return os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")


def assert_same_bits(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), a, b)


def write_config(config, path):
    """Writes a config file that returns this very config."""
    path.write_text(
        "import json\nfrom ml_collections import ConfigDict\n"
        f"def get_config():\n  return ConfigDict(json.loads({config.to_json()!r}))\n"
    )
