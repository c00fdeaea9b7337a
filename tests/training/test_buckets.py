"""Runs whose workdir is in a bucket, of an emulator: as exact as on a disk."""

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import pytest
from runs import assert_same_bits, final_state, forty_steps, records, write_config, xla_flags

from mbn_jax.command_line import is_bucket
from mbn_jax.errors import StoppedError, UserError
from mbn_jax.training.arguments import eval_command
from mbn_jax.training.buckets import Bucket, local_copy
from mbn_jax.training.loop import train as train_anew
from mbn_jax.training.program import Programs

ONE_DEVICE = Programs(jax.devices()[:1])
train = functools.partial(train_anew, programs=ONE_DEVICE)


@pytest.fixture
def config(data_dir):
    fields = {
        "model.features": (4,),
        "log_every_steps": 7,
        "eval_every_steps": 20,
        "keep_checkpoints": 2,
    }
    return forty_steps(data_dir, **fields)


def names_in(address, folder):
    return Bucket(address, folder)._names()


def assert_same_run(config, folder, address):
    with local_copy(address) as found:
        assert records(folder) == records(found.folder)
        assert_same_bits(*(final_state(ONE_DEVICE, config, x) for x in (folder, found.folder)))


@pytest.mark.slow
def test_a_run_in_a_bucket_is_stopped_and_resumes_on_another_machine(
    config, tmp_path, bucket, capsys
):
    address = f"{bucket}/stopped"
    train(config, tmp_path)
    with pytest.raises(StoppedError, match="after step 13, which is saved"):
        train(config, address, stop_asked=lambda first, last: last == 13)
    names = names_in(address, tmp_path)
    assert "checkpoints/13/checksums.json" in names
    # Nothing is left here: the next one finds all in the bucket.
    values = train(config, address)
    assert values == train(config, tmp_path)
    assert_same_run(config, tmp_path, address)
    names = names_in(address, tmp_path)
    assert {name.split("/")[1] for name in names if "/" in name} == {"30", "40"}
    assert {"config.json", "metrics.jsonl", "curves.png"} <= set(names)
    assert sum(".tfevents." in name for name in names) == 2
    assert eval_command([f"--workdir={address}"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["error"] == values["test_error"]
    config.seed += 1
    with pytest.raises(UserError, match=f"^{address} is a run of another config"):
        train(config, address)


KILLED = """
import os, signal
import mbn_jax.main
from mbn_jax.training.buckets import Bucket

write, count = Bucket._write, [0]

def die_at(self, path):
    count[0] += {step!r} in path.parts
    if {step!r} in path.parts and {last}:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, path)

Bucket._write = die_at
mbn_jax.main.train_main()
"""


@pytest.mark.slow
def test_a_run_that_is_killed_within_a_copy_resumes_from_the_checkpoint_before(
    config, tmp_path, bucket
):
    address = f"{bucket}/killed"
    write_config(config, tmp_path / "config.py")
    told = []
    # After two files of a checkpoint, and after all but its seal.
    for step, last in (("20", "count[0] == 3"), ("30", "path.name == 'checksums.json'")):
        killed = subprocess.run(
            [
                sys.executable,
                "-c",
                KILLED.format(step=step, last=last),
                f"--config={tmp_path / 'config.py'}",
                f"--workdir={address}",
            ],
            env=os.environ | {"XLA_FLAGS": xla_flags()},
            capture_output=True,
            text=True,
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        told.append(killed.stderr)
        names = names_in(address, tmp_path)
        assert any(name.startswith(f"checkpoints/{step}/") for name in names)
        assert f"checkpoints/{step}/checksums.json" not in names
    assert "only one run writes to gs://tests/killed" in told[0]
    assert "Skipped the checkpoint of step 20: it was not finished" in told[1]
    train(config, address)
    train(config, tmp_path / "whole")
    assert_same_run(config, tmp_path / "whole", address)
    # What was there in part is gone.
    steps = {name.split("/")[1] for name in names_in(address, tmp_path) if "/" in name}
    assert steps == {"30", "40"}


def test_an_address_in_a_path_is_refused():
    with pytest.raises(UserError, match="A workdir in a bucket must be a str, got PosixPath"):
        is_bucket(pathlib.Path("gs://bucket/run"))


def test_other_runs_below_the_address_are_left_where_they_are(tmp_path, bucket):
    with local_copy(f"{bucket}/runs/one") as one:
        (one.folder / "config.json").write_text("{}")
        one.store()
    with local_copy(f"{bucket}/runs") as above:
        assert list(above.folder.iterdir()) == []


def test_a_bucket_that_is_not_there_is_told(config, tmp_path):
    with pytest.raises(UserError, match=r"Cannot use --workdir=gs://a: .*Invalid GCS bucket name"):
        train(config, "gs://a")


def test_a_bucket_that_cannot_be_written_is_told(config, tmp_path, bucket, monkeypatch):
    address = f"{bucket}/refused"

    def refuse(*_):
        raise PermissionError("PERMISSION_DENIED: no access")

    class Refusing:
        def __init__(self, store):
            self._store = store
            self.write = refuse

        def __getattr__(self, name):
            return getattr(self._store, name)

    opened = Bucket.__init__

    def open_read_only(self, *args):
        opened(self, *args)
        self._store = Refusing(self._store)

    monkeypatch.setattr(Bucket, "__init__", open_read_only)
    with pytest.raises(UserError, match=f"Cannot use --workdir={address}: PERMISSION_DENIED"):
        train(config, address)
