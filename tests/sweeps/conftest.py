"""Experiment files for small sweeps, and members that take no time."""

import functools
import json
import pathlib

import pytest
from small_sweeps import experiment, programs_on_device

from mbn_jax.sweeps import runner


@pytest.fixture
def share_programs(monkeypatch):
    """What one test has compiled serves the next."""
    monkeypatch.setattr(runner, "Programs", lambda devices: programs_on_device(*devices))


@pytest.fixture
def write_sweep(data_dir, tmp_path):
    """Writes an experiment file and its config into the test's folder."""
    return functools.partial(experiment, tmp_path, data_dir)


@pytest.fixture
def fake_train(monkeypatch):
    """Members take no time: they record two evaluations, with the values that a test adds."""
    added = {}

    def train(config, folder, **_):
        values = {"train_loss": 2.0, "learning_rate": 0.125, "test_error": 0.25, **added}
        lines = [json.dumps({"step": step, **values}) + "\n" for step in (5, 10)]
        (pathlib.Path(folder) / "metrics.jsonl").write_text("".join(lines))
        return values

    monkeypatch.setattr(runner, "train", train)
    return added
