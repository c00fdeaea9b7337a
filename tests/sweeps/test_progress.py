"""What a running sweep shows, on terminals of any kind."""

import contextlib
import fcntl
import os
import pty
import struct
import sys
import termios

import optuna
import pytest

from mbn_jax.sweeps import storage as store
from mbn_jax.sweeps.declaration import Member
from mbn_jax.sweeps.progress import Progress

# The tests play the runner.
pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage:UserWarning")


@pytest.fixture
def show(tmp_path, monkeypatch):
    """Shows a sweep of which one member ends, on a stream; returns the line that stays."""

    def show(stream):
        monkeypatch.setattr(sys, "stderr", stream)
        study = store.open_study(tmp_path)
        members = [Member({"axis": i}, 0, {}) for i in range(3)]
        store.enqueue_missing(study, members)
        progress = Progress(len(members), store.trials_by_member(study))
        trial = study.ask()
        progress.update(store.trials_by_member(study), stopping=False)
        trial.set_user_attr(store.REASON, "no room left")
        trial.set_user_attr(store.OUTCOME, store.FAILED)
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        progress.update(store.trials_by_member(study), stopping=False)
        progress.update(store.trials_by_member(study), stopping=True)
        progress.close()
        return '1/3 {"axis": 0, "seed": 0}: failed: no room left'

    return show


@pytest.fixture
def terminal():
    """A terminal of 40 columns: what a program writes to, and what reads what it wrote."""
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    stream = os.fdopen(writer, "w")

    def written():
        stream.close()
        parts = []
        with contextlib.suppress(OSError):  # At the end; what was written comes in parts.
            while part := os.read(reader, 4096):
                parts.append(part)
        return b"".join(parts).decode()

    yield stream, written
    os.close(reader)


def test_at_40_columns_the_counts_stay_on_one_line(show, terminal, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream, written = terminal
    stays = show(stream)
    text = written()
    parts = text.replace("\r\n", "\n").split("\r\033[K")
    assert parts[0] == ""
    assert parts[1] == "0/3 members, 1 running"
    assert parts[2] == f"{stays}\n"
    assert parts[-1] == "1/3 members, 1 failed, stopping at the \n"[:39] + "\n"
    assert all(len(part.strip()) < 40 for part in parts if not part.startswith(stays))


def test_a_terminal_without_escapes_has_lines_that_stay(show, terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream, written = terminal
    stays = show(stream)
    assert written() == f"{stays}\r\n"


def test_a_file_has_lines_that_stay(show, tmp_path):
    with (tmp_path / "log").open("w") as stream:
        stays = show(stream)
    assert (tmp_path / "log").read_text() == f"{stays}\n"
