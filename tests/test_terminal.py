"""The commands on any terminal, into any pipe, in any encoding: they answer, and runs go on."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time

import pytest
from runs import xla_flags

from mbn_jax.training.reporting import Reporter, read_metrics

COMMANDS = ("train", "eval", "sweep", "report")
LIGHT = """
import sys, time
class Heavy:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jax", "flax", "optax", "orbax", "tensorflow_datasets", "optuna",
                                  "pandas", "matplotlib", "numpy"):
            raise AssertionError(f"imported {name}")
sys.meta_path.insert(0, Heavy())
from mbn_jax import main
getattr(main, sys.argv.pop(1))()
"""
"""A command in which importing anything heavy is an error."""


def answer(command, *argv, **options):
    return subprocess.run(
        [sys.executable, "-c", LIGHT, f"{command}_main", *argv],
        capture_output=True,
        text=True,
        **options,
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_comes_before_anything_heavy_is_imported(command):
    begin = time.monotonic()
    told = answer(command, "--help")
    assert time.monotonic() - begin < 5  # Some 0.15 s on a quiet machine.
    assert told.returncode == 0, told.stderr
    assert f"usage: mbn-{command}" in told.stdout


@pytest.mark.parametrize(
    ("command", "argv", "sentence"),
    [
        ("train", ["--wrkdir=x"], "unknown argument --wrkdir=x; did you mean --workdir?"),
        ("train", ["--config=nowhere.py", "--workdir=x"], "there is no file nowhere.py"),
        ("train", ["--config=nowhere.py:a", "--workdir=x"], "there is no file nowhere.py"),
        ("train", ["--workdir=x", "extra"], "unknown argument extra; see --help"),
        (
            "sweep",
            ["e.py", "--workdir=x", "--seed=3"],
            "unknown argument --seed=3; did you mean --se",
        ),
        (
            "eval",
            ["--workdir=hdfs://x"],
            "--workdir must be a folder or an address that begins with gs://",
        ),
        ("report", ["gs://x"], "workdir must be a folder, got gs://x"),
    ],
)
def test_a_mistake_is_answered_before_anything_heavy_is_imported(command, argv, sentence, tmp_path):
    told = answer(command, *argv, cwd=tmp_path)
    assert told.returncode == 2
    assert told.stderr.startswith(f"mbn-{command}: {sentence}")
    assert told.stderr.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_help_into_a_pipe_that_nobody_reads(command):
    reader, writer = os.pipe()
    os.close(reader)
    program = f"from mbn_jax.main import {command}_main; {command}_main()"
    told = subprocess.run(
        [sys.executable, "-c", program, "--help"], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert (told.returncode, told.stderr) == (0, "")


SMALL = """
from mbn_jax.training.config import default_config
def get_config():
    config = default_config()
    config.dataset.data_dir = {data_dir!r}
    config.dataset.train_split, config.dataset.test_split = "train[:64]", "test[:16]"
    config.batch_size, config.num_epochs, config.model.features = 16, 1.0, (4,)
    config.log_every_steps = 1
    return config
"""


@pytest.fixture
def command(data_dir, tmp_path):
    """The command of a run of four steps."""
    (tmp_path / "config.py").write_text(SMALL.format(data_dir=data_dir))
    program = "from mbn_jax.main import train_main; train_main()"
    argv = [f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'grün'}"]
    return [sys.executable, "-c", program, *argv]


@pytest.mark.slow
def test_a_run_trains_with_standard_error_closed_and_ascii_output(command, tmp_path):
    # Standard error closed: files that are opened must not take its place. Output: ASCII only.
    environment = os.environ | {"XLA_FLAGS": xla_flags(), "PYTHONIOENCODING": "ascii"}
    shell = ["sh", "-c", 'exec "$@" 2>&-', "sh"]
    told = subprocess.run([*shell, *command], env=environment, capture_output=True)
    assert told.returncode == 0
    assert b"gr\\xfcn/curves.png" in told.stdout
    assert [record["step"] for record in read_metrics(tmp_path / "grün")] == [1, 2, 3, 4]


BROKEN = """
import os, sys
from mbn_jax.terminal import make_streams_unbreakable
make_streams_unbreakable()
for _ in range(100):
    print("x" * 10_000)
    print("x" * 10_000, file=sys.stderr, flush=True)
open(sys.argv[1], "w").write("went on")
"""


def test_a_pipe_that_nobody_reads_and_a_full_disk_of_the_log_end_nothing(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    for stderr in (writer, os.open("/dev/full", os.O_WRONLY)):
        run = [sys.executable, "-c", BROKEN, str(tmp_path / "file")]
        told = subprocess.run(run, stdout=writer, stderr=stderr)
        assert told.returncode == 0
        assert (tmp_path / "file").read_text() == "went on"
        (tmp_path / "file").unlink()
    # A result that is lost, by contrast, is an error.
    run = [sys.executable, "-c", BROKEN, str(tmp_path / "file")]
    told = subprocess.run(run, stdout=os.open("/dev/full", os.O_WRONLY), stderr=subprocess.PIPE)
    assert told.returncode != 0
    assert not (tmp_path / "file").exists()


def read_all(reader):
    """What was written to a terminal that is closed; it comes in parts."""
    parts = []
    with contextlib.suppress(OSError):  # At the end.
        while part := os.read(reader, 4096):
            parts.append(part)
    os.close(reader)
    return b"".join(parts).decode()


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_progress_on_a_terminal_of_forty_columns(tmp_path, monkeypatch, term):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    monkeypatch.setenv("TERM", term)
    with monkeypatch.context() as patch, os.fdopen(theirs, "w") as terminal:
        patch.setattr(sys, "stderr", terminal)
        reporter = Reporter(tmp_path, first_step=0, total_steps=4)
        values = {"train_loss": 1.0, "train_error": 0.5, "images_per_second": 1e6}
        for step in range(4):
            reporter.progress(step, values)
        reporter.say("a line that stays")
        reporter.close()
    text = read_all(ours)
    lines = re.split(r"\r\x1b\[K|\r\n", text)
    progress = [line for line in lines if re.match(r"step \d/4  loss", line)]
    assert len(progress) == 4
    assert "a line that stays" in lines
    assert ("\x1b" in text) == (term == "xterm")
    assert term == "dumb" or max(map(len, progress)) < 40
