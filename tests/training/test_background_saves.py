"""Checkpoints are written and sealed while training goes on: exactly, and never silently not."""

import concurrent.futures
import errno
import functools
import os
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore
from runs import assert_same_bits, final_state, forty_steps, records

from mbn_jax.errors import StoppedError, UserError
from mbn_jax.parallel.devices import first_device, replicate
from mbn_jax.step.state import TrainState
from mbn_jax.training import checkpoints as checkpoints_module
from mbn_jax.training import loop
from mbn_jax.training.checkpoints import Checkpoints
from mbn_jax.training.loop import train as train_anew
from mbn_jax.training.program import Programs
from mbn_jax.training.seal import SEAL
from mbn_jax.training.workdir import CHECKPOINTS

ONE_DEVICE = Programs(jax.devices()[:1])
train = functools.partial(train_anew, programs=ONE_DEVICE)
PATIENCE = 120.0
"""Seconds, after which what should go on has not."""


@pytest.fixture
def config(data_dir):
    fields = {
        "model.features": (8,),
        "log_every_steps": 2,
        "eval_every_steps": 40,
    }
    return forty_steps(data_dir, **fields)


class Gate:
    """Holds up who wants through, until it is opened."""

    def __init__(self):
        self._open = threading.Event()
        self.reached = threading.Event()
        self.was_opened = True

    def open(self, *_):
        self._open.set()

    def guard(self, call):
        def held(*args, **kwargs):
            self.reached.set()
            self.was_opened &= self._open.wait(PATIENCE)
            return call(*args, **kwargs)

        return held


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.open()


def hold_up_writing(gate, monkeypatch):
    """Lets no array be written before the gate is open."""
    monkeypatch.setattr(tensorstore, "open", gate.guard(tensorstore.open))


def hold_up_sealing(gate, monkeypatch):
    monkeypatch.setattr(checkpoints_module, "seal", gate.guard(checkpoints_module.seal))


def some_state(step=1, size=100_000):
    variables = {
        "params": {"kernel": jnp.arange(float(size))},
        "batch_stats": {"norm": {"mean": jnp.arange(4.0)}},
    }
    state = TrainState.create(variables, optax.sgd(0.1, momentum=0.9), jax.random.key(3))
    return state.replace(step=jnp.int32(step))


def on_host(state):
    return jax.tree.map(np.array, state.replace(key=jax.random.key_data(state.key)))


@pytest.mark.parametrize("local_statistics", [False, True])
def test_what_is_saved_is_the_state_at_the_save_though_its_buffers_are_donated(
    tmp_path, monkeypatch, gate, local_statistics
):
    hold_up_writing(gate, monkeypatch)
    devices = jax.devices()[:2]

    def overwrite(state):
        return jax.tree.map(
            lambda x: x * 0 - 1 if jnp.issubdtype(x.dtype, jnp.number) else x, state
        )

    step = jax.pmap(overwrite, donate_argnums=0, devices=devices)
    state = replicate(some_state(), devices)
    expected = on_host(state)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, local_statistics=local_statistics)
    for _ in range(3):
        given, state = state, step(state)
        jax.block_until_ready(state)
        assert given.params["kernel"].is_deleted()
    assert gate.reached.wait(PATIENCE)
    assert not (tmp_path / "1").exists()
    gate.open()
    checkpoints.close()
    assert gate.was_opened
    checkpoints = Checkpoints(tmp_path)
    found = checkpoints.restore(some_state(), local_statistics=local_statistics, devices=devices)
    checkpoints.close()
    assert_same_bits(on_host(found), expected)


@pytest.mark.parametrize("hold_up", [hold_up_writing, hold_up_sealing])
@pytest.mark.slow
def test_training_does_not_wait_for_the_disk(config, tmp_path, monkeypatch, gate, hold_up):
    train(config, tmp_path / "whole")
    seals = []

    def on_record(step, _):
        seals.append((tmp_path / "held" / CHECKPOINTS / "10" / SEAL).exists())
        if step == 18:  # The last record before the next save.
            gate.open()

    with monkeypatch.context() as patch:
        hold_up(gate, patch)
        train(config, tmp_path / "held", on_record=on_record)
    assert gate.reached.is_set()
    assert gate.was_opened
    assert not any(seals[:9])
    assert records(tmp_path / "held") == records(tmp_path / "whole")
    assert_same_bits(
        *(final_state(ONE_DEVICE, config, tmp_path / name) for name in ("held", "whole"))
    )
    kept = sorted(int(path.name) for path in (tmp_path / "held" / CHECKPOINTS).iterdir())
    assert kept == [20, 30, 40]


def test_old_checkpoints_are_kept_until_the_new_one_is_sealed(tmp_path, monkeypatch, gate):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(replicate(some_state(1)), local_statistics=False)
    checkpoints.wait()
    hold_up_sealing(gate, monkeypatch)
    checkpoints.save(replicate(some_state(2)), local_statistics=False)
    assert gate.reached.wait(PATIENCE)
    assert (tmp_path / "1" / SEAL).exists()
    assert (tmp_path / "2").exists()
    gate.open()
    checkpoints.close()
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_an_old_checkpoint_that_is_gone_already_is_told_and_stops_nothing(tmp_path, caplog):
    sealed = []
    checkpoints = Checkpoints(tmp_path, keep=1, on_sealed=sealed.append)
    checkpoints.save(replicate(some_state(1)), local_statistics=False)
    checkpoints.wait()
    shutil.rmtree(tmp_path / "1")
    checkpoints.save(replicate(some_state(2)), local_statistics=False)
    checkpoints.close()
    assert sealed == [1, 2]
    assert f"The old checkpoint {tmp_path / '1'} could not be deleted" in caplog.text


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def of_an_array(*_, **__):
    raise ValueError("Error writing local file [os_error_code='28']")


def fail_to_seal(monkeypatch):
    monkeypatch.setattr(checkpoints_module, "seal", full)


def fail_to_commit(monkeypatch):
    monkeypatch.setattr(os, "rename", full)


def fail_to_write(monkeypatch):
    monkeypatch.setattr(tensorstore, "open", of_an_array)


def next_save(checkpoints):
    checkpoints.save(replicate(some_state(2)), local_statistics=False)


def at_last_check(checkpoints):
    begin = threading.Event()
    for _ in range(int(PATIENCE * 100)):
        checkpoints.check()
        begin.wait(0.01)


FAILURES = [fail_to_seal, fail_to_commit, fail_to_write]


@pytest.mark.parametrize("fail", FAILURES)
@pytest.mark.parametrize(
    "notice", [next_save, at_last_check, Checkpoints.wait, Checkpoints.restore, Checkpoints.close]
)
@pytest.mark.slow
def test_an_error_in_the_background_is_raised_by_whatever_comes_next(
    tmp_path, monkeypatch, fail, notice
):
    checkpoints = Checkpoints(tmp_path / "run")
    with monkeypatch.context() as patch:
        fail(patch)
        checkpoints.save(replicate(some_state()), local_statistics=False)
        if notice is Checkpoints.restore:
            notice = functools.partial(notice, state=some_state(), local_statistics=False)
        with pytest.raises(OSError, match=r"No space left|os_error_code='28'") as error:
            notice(checkpoints)
        assert error.value.errno == errno.ENOSPC
    checkpoints.close()  # Told once.
    # Not sealed, it does not count.
    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.restore(some_state(), local_statistics=False) is None
    checkpoints.discard_damaged()
    checkpoints.close()
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("fail", FAILURES)
def test_a_run_tells_of_a_failed_save_with_its_next_record(config, tmp_path, monkeypatch, fail):
    started, steps = [], []
    save = Checkpoints.save

    def save_on_a_full_disk(checkpoints, *args, **kwargs):
        fail(monkeypatch)
        save(checkpoints, *args, **kwargs)
        started.append(checkpoints._unfinished)

    def on_record(step, _):
        steps.append(step)
        concurrent.futures.wait(started, PATIENCE)

    monkeypatch.setattr(Checkpoints, "save", save_on_a_full_disk)
    with pytest.raises(UserError, match=r"Cannot write to --workdir=.*No space left"):
        train(config, tmp_path, on_record=on_record)
    assert steps == [2, 4, 6, 8, 10, 12]


def test_a_run_that_is_asked_to_stop_waits_for_its_seal(config, tmp_path, monkeypatch, gate):
    hold_up_sealing(gate, monkeypatch)
    opening = threading.Timer(0.5, gate.open)
    opening.start()
    with pytest.raises(StoppedError, match="after step 5, which is saved"):
        train(config, tmp_path, stop_asked=lambda first, last: last == 5)
    assert (tmp_path / CHECKPOINTS / "5" / SEAL).exists()
    opening.join()


def test_an_interrupted_run_seals_what_it_has_saved(config, tmp_path, monkeypatch, gate):
    hold_up_sealing(gate, monkeypatch)

    def interrupt(step, _):
        if step == 12:
            opening.start()
            raise KeyboardInterrupt

    opening = threading.Timer(0.5, gate.open)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, on_record=interrupt)
    assert (tmp_path / CHECKPOINTS / "10" / SEAL).exists()
    opening.join()


def test_a_run_whose_other_host_is_lost_does_not_wait_for_it(config, tmp_path, monkeypatch, gate):
    hold_up_sealing(gate, monkeypatch)
    monkeypatch.setattr(loop, "lost_host", lambda error: "lost")

    def lose(step, _):
        if step == 12:
            raise RuntimeError("Gloo: connection closed by peer")

    with pytest.raises(RuntimeError, match="Gloo"):
        train(config, tmp_path, on_record=lose)
    assert not gate._open.is_set()
    assert not (tmp_path / CHECKPOINTS / "10" / SEAL).exists()


@pytest.mark.slow
def test_threads_of_a_process_save_at_the_same_time(tmp_path):
    """As members of a sweep do: Orbax keeps globals for the saves of a process."""
    failed = []

    def save_often(name):
        try:
            checkpoints = Checkpoints(tmp_path / name, keep=2)
            for step in range(1, 13):
                state = some_state(step, size=1000 + int(name))
                checkpoints.save(replicate(state, jax.devices()[:1]), local_statistics=False)
            checkpoints.close()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=save_often, args=(str(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for i in range(4):
        checkpoints = Checkpoints(tmp_path / str(i))
        like = some_state(size=1000 + i)
        found = first_device(checkpoints.restore(like, local_statistics=False))
        checkpoints.close()
        assert_same_bits(on_host(found), on_host(some_state(12, size=1000 + i)))
        assert sorted(path.name for path in (tmp_path / str(i)).iterdir()) == ["11", "12"]
