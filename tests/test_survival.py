"""What a run survives: kills, signals, damaged files, a full disk, lost hosts, bad numbers."""

import functools
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mbn_jax.checkpoints import Checkpoints
from mbn_jax.config import default_config
from mbn_jax.double_forward import TrainState
from mbn_jax.parallel import replicate
from mbn_jax.preemption import StoppedError
from mbn_jax.program import Programs
from mbn_jax.reporting import read_metrics
from mbn_jax.train import train as train_anew
from mbn_jax.workdir import CHECKPOINTS

ONE_DEVICE = Programs(jax.devices()[:1])
train = functools.partial(train_anew, programs=ONE_DEVICE)


@pytest.fixture
def config(data_dir):
    """Forty steps on part of the digits, with a checkpoint every ten."""
    config = default_config()
    config.update_from_flattened_dict(
        {
            "dataset.data_dir": data_dir,
            "dataset.train_split": "train[:640]",
            "dataset.test_split": "test[:100]",
            "dataset.crop_padding": 1,
            "batch_size": 16,
            "num_epochs": 1.0,
            "model.features": (8, 8),
            "log_every_steps": 7,
            "eval_every_steps": 20,
            "checkpoint_every_steps": 10,
        }
    )
    return config


def records(workdir):
    return [
        {k: v for k, v in record.items() if k != "images_per_second"}
        for record in read_metrics(workdir)
    ]


def final_state(config, workdir):
    program = ONE_DEVICE.get(config)
    checkpoints = Checkpoints(workdir / CHECKPOINTS)
    state = checkpoints.restore(
        program.initial_state(config), local_statistics=False, devices=ONE_DEVICE.devices
    )
    checkpoints.close()
    return jax.device_get(state.replace(key=jax.random.key_data(state.key)))


def assert_same_run(config, a, b):
    assert records(a) == records(b)
    states = final_state(config, a), final_state(config, b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), *states)


@pytest.mark.parametrize("step", [3, 10, 13, 39])
def test_a_run_that_is_asked_to_stop_saves_there_and_goes_on_bit_for_bit(config, tmp_path, step):
    train(config, tmp_path / "whole")
    with pytest.raises(StoppedError, match=f"after step {step}, which is saved"):
        train(config, tmp_path / "stopped", stop_asked=lambda first, last: first <= step <= last)
    assert (tmp_path / "stopped" / CHECKPOINTS / str(step)).exists()
    train(config, tmp_path / "stopped")
    assert_same_run(config, tmp_path / "whole", tmp_path / "stopped")


def test_a_run_that_is_asked_to_stop_in_its_last_step_is_done(config, tmp_path):
    assert train(config, tmp_path, stop_asked=lambda first, last: last == 40)["step"] == 40


def small_state():
    tx = optax.sgd(0.1, momentum=0.9)
    variables = {
        "params": {"kernel": jnp.arange(600.0).reshape(20, 30)},
        "batch_stats": {"norm": {"mean": jnp.ones((4, 30))}},
    }
    return TrainState.create(variables, tx, jax.random.key(0))


@pytest.fixture(scope="module")
def three_checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    checkpoints = Checkpoints(folder)
    for step in (1, 2, 3):
        state = small_state().replace(step=jnp.int32(step))
        checkpoints.save(replicate(state), local_statistics=False, notes={"restores": step})
    checkpoints.close()
    return folder


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_in_half(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


DAMAGE = {"flipped": flip_a_bit, "cut": cut_in_half, "deleted": pathlib.Path.unlink}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_to_any_file_of_a_checkpoint_is_named_and_the_one_before_restored(
    three_checkpoints, tmp_path, caplog, damage
):
    names = [
        path.relative_to(three_checkpoints)
        for path in sorted((three_checkpoints / "3").rglob("*"))
        if path.is_file()
    ]
    assert len(names) > 10
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        shutil.copytree(three_checkpoints, folder)
        size = (folder / name).stat().st_size
        if not size and damage is not DAMAGE["deleted"]:
            continue  # Nothing to damage.
        damage(folder / name)
        caplog.clear()
        checkpoints = Checkpoints(folder)
        restored = checkpoints.restore(small_state(), local_statistics=False)
        assert "Skipped the checkpoint of step 3: " in caplog.text, name
        assert int(restored.step[0]) == checkpoints.notes["restores"] == 2
        checkpoints.discard_damaged()
        assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]
        checkpoints.close()
