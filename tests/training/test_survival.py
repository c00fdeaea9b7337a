"""What a run survives: kills, signals, damaged files, a full disk, lost hosts, bad numbers."""

import functools
import os
import pathlib
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import optax
import pandas as pd
import pytest
from runs import assert_same_bits, final_state, forty_steps, records, write_config, xla_flags

from mbn_jax.errors import StoppedError, UserError
from mbn_jax.parallel.devices import replicate
from mbn_jax.step.state import TrainState
from mbn_jax.sweeps import storage as store
from mbn_jax.sweeps.declaration import Member
from mbn_jax.sweeps.results import read_results, write_results
from mbn_jax.training import divergence, loop, steps
from mbn_jax.training import seal as seal_module
from mbn_jax.training.checkpoints import Checkpoints
from mbn_jax.training.config import default_config, program_key
from mbn_jax.training.config_files import with_fields
from mbn_jax.training.divergence import DivergenceError
from mbn_jax.training.evaluation import evaluate_run
from mbn_jax.training.loop import train as train_anew
from mbn_jax.training.program import Programs
from mbn_jax.training.reporting import read_metrics
from mbn_jax.training.workdir import CHECKPOINTS

ONE_DEVICE = Programs(jax.devices()[:1])
train = functools.partial(train_anew, programs=ONE_DEVICE)


@pytest.fixture
def config(data_dir):
    fields = {
        "model.features": (8, 8),
        "log_every_steps": 7,
        "eval_every_steps": 20,
    }
    return forty_steps(data_dir, **fields)


@pytest.fixture
def small(config):
    """A network that compiles fast, for runs in processes of their own."""
    config.model.features = (4,)
    return config


def assert_same_run(config, a, b):
    assert records(a) == records(b)
    assert_same_bits(*(final_state(ONE_DEVICE, config, workdir) for workdir in (a, b)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Returns the workdir of a run of a config that was left alone, the same for all tests."""
    runs = {}

    def run_of(config):
        key = config.to_json()
        if key not in runs:
            runs[key] = tmp_path_factory.mktemp("whole") / "run"
            train(config, runs[key])
        return runs[key]

    return run_of


@pytest.mark.parametrize("step", [3, 10, 13, 39])
@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_saves_there_and_resumes_bit_for_bit(
    config, tmp_path, whole, step
):
    with pytest.raises(StoppedError, match=f"after step {step}, which is saved"):
        train(config, tmp_path / "stopped", stop_asked=lambda first, last: first <= step <= last)
    assert (tmp_path / "stopped" / CHECKPOINTS / str(step)).exists()
    train(config, tmp_path / "stopped")
    assert_same_run(config, whole(config), tmp_path / "stopped")


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
        checkpoints.save(replicate(state), local_statistics=False, notes={"test_error": 1 / step})
    checkpoints.close()
    return folder


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def flip_a_bit_of_a_name(path):
    content = bytearray(path.read_bytes())
    content[content.index(b"memory_size")] ^= 1
    path.write_bytes(content)


def cut_in_half(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


DAMAGE = {"flipped": flip_a_bit, "cut": cut_in_half, "deleted": pathlib.Path.unlink}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.slow
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
        assert int(restored.step[0]) == 1 / checkpoints.notes["test_error"] == 2
        checkpoints.discard_damaged()
        assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]
        checkpoints.close()


@pytest.fixture(scope="module")
def finished_run(data_dir, tmp_path_factory):
    """A run of ten steps and its config."""
    config = default_config()
    config.update_from_flattened_dict(
        {
            "dataset.data_dir": data_dir,
            "dataset.train_split": "train[:640]",
            "dataset.test_split": "test[:100]",
            "batch_size": 16,
            "num_epochs": 0.25,
            "model.features": (8, 8),
            "log_every_steps": 2,
        }
    )
    workdir = tmp_path_factory.mktemp("finished") / "run"
    values = train(config, workdir)
    return config, workdir, values


def damaged(run, folder, name, damage):
    """Returns a copy of a run with one file damaged."""
    shutil.copytree(run, folder)
    damage(folder / name)
    return folder


def change_a_digit(path):
    text = path.read_text()
    at = text.index("0.97" if path.name == "config.json" else "train_loss") + 15
    at = next(i for i in range(at - 15, len(text)) if text[i] == "7")
    path.write_text(f"{text[:at]}3{text[at + 1 :]}")


def put_garbage_in_the_middle(path):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], "garbage\n", *lines[2:]]))


@pytest.mark.parametrize(
    ("name", "damage", "of_training", "of_evaluation"),
    [
        # Of a name: a flip in a value that a resume may change would change nothing.
        ("config.json", flip_a_bit_of_a_name, "config.json is damaged", "config.json is damaged"),
        ("config.json", cut_in_half, "config.json is damaged", "config.json is damaged"),
        ("config.json", pathlib.Path.unlink, None, "it has no config.json"),
        ("config.json", change_a_digit, "norm.decay was 0.93 and is 0.97", "decay was 0.97 and is"),
        ("metrics.jsonl", flip_a_bit, "metrics.jsonl is damaged", None),
        ("metrics.jsonl", cut_in_half, "metrics.jsonl is damaged", None),
        ("metrics.jsonl", change_a_digit, "metrics.jsonl is damaged", None),
        ("metrics.jsonl", put_garbage_in_the_middle, "Line 3 of .*metrics.jsonl is damaged", None),
    ],
)
@pytest.mark.slow
def test_damage_to_the_other_files_of_a_run_is_named(
    finished_run, tmp_path, name, damage, of_training, of_evaluation
):
    config, run, values = finished_run
    workdir = damaged(run, tmp_path / "run", name, damage)
    if of_evaluation:
        with pytest.raises(UserError, match=of_evaluation):
            evaluate_run(workdir)
    else:
        assert evaluate_run(workdir)["error"] == values["test_error"]
    if of_training:
        with pytest.raises(UserError, match=of_training):
            train(config, workdir)
    else:
        assert train(config, workdir) == values


def test_another_config_is_refused_where_config_json_is_gone(finished_run, tmp_path):
    config, run, _ = finished_run
    workdir = damaged(run, tmp_path / "run", "config.json", pathlib.Path.unlink)
    with pytest.raises(UserError, match=r"norm\.decay was 0\.97 and is 0\.5"):
        train(with_fields(config, {"norm.decay": 0.5}, "the test"), workdir)
    assert not (workdir / "config.json").exists()  # Refused, it left no trace.


def test_lost_records_are_told_and_a_damaged_checkpoint_is_not_evaluated(
    finished_run, tmp_path, caplog
):
    config, run, _ = finished_run
    workdir = damaged(run, tmp_path / "run", "metrics.jsonl", pathlib.Path.unlink)
    assert train(config, workdir) == {}
    assert "the records up to step 10 are lost" in caplog.text
    assert train(config, workdir) == {}  # Nor once there is an empty file.
    cut_in_half(workdir / CHECKPOINTS / "10" / "checksums.json")
    with pytest.raises(UserError, match="no valid checkpoint to evaluate"):
        evaluate_run(workdir)
    assert "Skipped the checkpoint of step 10: checksums.json is damaged" in caplog.text


def test_a_checkpoint_of_another_model_is_named(three_checkpoints):
    state = small_state()
    other = state.replace(params={"kernel": jnp.zeros((20, 30)), "bias": jnp.zeros(30)})
    checkpoints = Checkpoints(three_checkpoints)
    with pytest.raises(UserError, match=r"checkpoint .*3 does not fit the model of this config \("):
        checkpoints.restore(other, local_statistics=False)
    checkpoints.close()


def test_a_kill_while_a_checkpoint_is_written_leaves_nothing_behind(three_checkpoints, tmp_path):
    shutil.copytree(three_checkpoints, tmp_path / "killed")
    unfinished = tmp_path / "killed" / "4.orbax-checkpoint-tmp"
    shutil.copytree(three_checkpoints / "3", unfinished)
    checkpoints = Checkpoints(tmp_path / "killed")
    assert 1 / checkpoints.notes["test_error"] == 3
    checkpoints.discard_damaged()
    checkpoints.close()
    assert not unfinished.exists()


def test_a_checkpoint_that_its_run_deletes_while_it_is_checked_is_skipped(
    three_checkpoints, tmp_path, monkeypatch, caplog
):
    shutil.copytree(three_checkpoints, tmp_path / "going_on")
    read = seal_module._sha256

    def deleted_meanwhile(path):
        if "2" in path.parts[-4:]:
            shutil.rmtree(tmp_path / "going_on" / "2", ignore_errors=True)
        return read(path)

    monkeypatch.setattr(seal_module, "_sha256", deleted_meanwhile)
    checkpoints = Checkpoints(tmp_path / "going_on")
    restored = checkpoints.restore(small_state(), local_statistics=False, best=True)
    checkpoints.close()
    assert int(restored.step[0]) == 3
    assert "Skipped the checkpoint of step 2: it was deleted meanwhile" in caplog.text


LIMIT_FILES = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (6 * 1024, resource.RLIM_INFINITY))
"""
"""Makes every write beyond 6 KiB of a file fail, as one to a full disk does."""


STARTED = []


@pytest.fixture(autouse=True)
def no_process_is_left():
    yield
    while STARTED:
        process = STARTED.pop()
        process.kill()
        process.communicate()


def start(config, workdir, *options, code="", devices=1, **variables):
    """Starts mbn-train in a process of its own."""
    write_config(config, workdir.parent / "config.py")
    program = f"import mbn_jax.main\n{code}\nmbn_jax.main.train_main()"
    argv = [f"--config={workdir.parent / 'config.py'}", f"--workdir={workdir}", *options]
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", program, *argv],
        env=os.environ | {"XLA_FLAGS": xla_flags(devices)} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # A group of its own, with its workers.
    )
    STARTED.append(process)
    return process


@pytest.mark.slow
def test_a_full_disk_ends_a_run_in_one_sentence_and_it_resumes_when_there_is_space(
    small, tmp_path, whole
):
    workdir = tmp_path / "full"
    with pytest.raises(StoppedError):
        train(small, workdir, stop_asked=lambda first, last: last == 15)
    process = start(small, workdir, code=LIMIT_FILES)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 2, told
    sentence = (
        f"mbn-train: Cannot write to --workdir={workdir}: File too large; fix this, and run the "
        "same command to resume from the last checkpoint.\n"
    )
    assert told.endswith(sentence)
    assert "Traceback" not in told
    train(small, workdir)
    assert_same_run(small, workdir, whole(small))


@pytest.mark.parametrize("number", [28, 30], ids=["full", "read-only"])
@pytest.mark.slow
def test_a_disk_that_is_full_or_read_only_is_told_wherever_it_is_noticed(
    config, tmp_path, monkeypatch, number
):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    for owner, name in (
        ("mbn_jax.training.reporting.os", "fsync"),
        ("mbn_jax.training.events.RecordWriter", "write"),
        ("mbn_jax.training.loop", "draw_curves"),
        ("mbn_jax.training.workdir.os", "replace"),
        ("mbn_jax.training.checkpoints.ocp.CheckpointManager", "save"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"{owner}.{name}", fail)
            with pytest.raises(UserError, match=os.strerror(number)):
                train(with_fields(config, {"num_epochs": 0.1}, "the test"), tmp_path / name)


def test_an_error_that_is_not_of_the_disk_is_not_taken_for_one(three_checkpoints, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    state = replicate(small_state())
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoints.save(state, local_statistics=False, notes={"set": {1}})
    checkpoints.close()


# A rate at which the first layer's outputs overflow after some steps.
DIVERGING = {"norm.name": "none", "optimizer.learning_rate": 1e12}


def test_divergence_names_step_rate_and_the_first_layer(config, tmp_path):
    config = with_fields(config, {**DIVERGING, "checkpoint_every_steps": 1}, "the test")
    with pytest.raises(DivergenceError) as error:
        train(config, tmp_path / "close")
    step = error.value.step
    assert f"The loss of step {step} is " in str(error.value)
    assert "at learning rate" in str(error.value)
    assert "first layer whose statistics are not finite is Affine_" in str(error.value)
    # From however far back it is looked for, it is the same.
    config.checkpoint_every_steps = 20
    with pytest.raises(
        DivergenceError, match=rf"step {step} is .*replaying {step - 1} steps"
    ) as far:
        train(config, tmp_path / "far")
    layer = str(error.value).split("not finite is ")[1].split()[0]
    assert f"not finite is {layer} " in str(far.value)


@pytest.mark.parametrize("bad", ["MemorizedBatchNorm_1", None])
@pytest.mark.slow
def test_the_layer_that_is_named_is_the_one_that_was_bad(config, tmp_path, monkeypatch, bad):
    """Parameters are made bad from step 12 on, at one place of the network."""
    place = {"MemorizedBatchNorm_1": "Conv_1", None: "Dense_0"}[bad]
    programs = Programs(jax.devices()[:1])
    make = steps.build_train_step

    def spoiled(task, hparams):
        step = make(task, hparams)

        def spoil(state, batch):
            state, metrics = step(state, batch)
            kernel = state.params[place]["kernel"]
            kernel = jnp.where(state.step == 12, kernel.at[..., 0].set(jnp.nan), kernel)
            layer = {**state.params[place], "kernel": kernel}
            return state.replace(params={**state.params, place: layer}), metrics

        return spoil

    monkeypatch.setattr(steps, "build_train_step", spoiled)
    with pytest.raises(DivergenceError) as error:
        train(config, tmp_path, programs=programs)
    assert "The loss of step 13 is nan" in str(error.value)
    assert "by replaying 2 steps from step 10" in str(error.value)
    told = f"not finite is {bad} " if bad else "no normalization layer's statistics are, the loss"
    assert told in str(error.value)
    # Where that would take long, it is not looked for.
    monkeypatch.setattr(divergence, "MAX_REPLAYED_STEPS", 1)
    with pytest.raises(DivergenceError, match="its layer was not looked for"):
        train(config, tmp_path, programs=programs)


@pytest.mark.parametrize(
    "error", [UserError("Cannot write to --workdir:\nfull"), OSError(28, "No space left")]
)
def test_divergence_is_told_where_its_layer_cannot_be_found(config, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(loop, "find_layer", fail)
    config = with_fields(config, DIVERGING, "the test")
    reason = re.escape(" ".join(str(error).split()))
    with pytest.raises(
        DivergenceError, match=rf"The loss .* its layer could not be found \({reason}\); training"
    ):
        train(config, tmp_path)


def test_fields_of_the_host_need_no_other_program(config):
    for field, value in (("keep_best", True), ("init_from", "runs/a"), ("log_every_steps", 1)):
        assert program_key(with_fields(config, {field: value}, "the test")) == program_key(config)


def wait_for_records(workdir, process, count):
    """Waits until a run that started has written so many records more."""
    begin = time.monotonic()
    while len(read_metrics(workdir)) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - begin < 300
        time.sleep(0.01)


@pytest.mark.slow
def test_sigterm_saves_and_ends_with_a_status_of_its_own(small, tmp_path):
    small.num_epochs = 200.0
    small.dataset.max_bytes_in_memory = 0
    small.dataset.num_workers = 1
    process = start(small, tmp_path / "run")
    wait_for_records(tmp_path / "run", process, 3)
    os.killpg(
        process.pid, signal.SIGTERM
    )  # As schedulers do: the process that decodes gets it too.
    _, told = process.communicate(timeout=300)
    assert process.returncode == 75, told
    assert re.search(
        r"first step done after [\d.]+ s: imports [\d.]+, .*, first step [\d.]+;", told
    )
    (step,) = re.findall(
        r"mbn-train: stopped after step (\d+), which is saved; run the same command to resume", told
    )
    assert "Traceback" not in told
    assert (tmp_path / "run" / CHECKPOINTS / step / "checksums.json").exists()


DIE = """
import os, signal, time
import mbn_jax.training.checkpoints as module
import mbn_jax.training.seal as seal
from mbn_jax.training import loop as train

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def dies_at(call, number):
    count = []
    def wrapper(*args, **kwargs):
        count.append(1)
        return die() if len(count) == number else call(*args, **kwargs)
    return wrapper
"""
KILLS = {
    "with records after a checkpoint that is not sealed": """
module.seal = lambda folder: time.sleep(3600)
train.Reporter.write = dies_at(train.Reporter.write, 4)
""",
    "before a checkpoint is sealed": "seal._checksums = dies_at(seal._checksums, 2)",
    "within a save": "os.rename = dies_at(os.rename, 5)",
    "between record and save": "train.Reporter.sync = dies_at(train.Reporter.sync, 1)",
}


@pytest.mark.slow
def test_killed_within_a_save_and_elsewhere_a_run_is_the_same(small, tmp_path, whole):
    compiled_once = {
        "JAX_ENABLE_COMPILATION_CACHE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    told = []
    for kill in KILLS.values():
        process = start(small, tmp_path / "killed", code=DIE + kill, **compiled_once)
        told.append(process.communicate(timeout=300)[1])
        assert process.returncode == -signal.SIGKILL, told[-1]
    assert "Skipped the checkpoint of step 10: it was not finished" in told[1]
    train(small, tmp_path / "killed")
    assert_same_run(small, whole(small), tmp_path / "killed")


def start_two_hosts(config, workdir):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        start(
            config,
            workdir,
            f"--coordinator_address={address}",
            "--num_processes=2",
            f"--process_id={host}",
            "--heartbeat_timeout=10",
        )
        for host in range(2)
    ]


@pytest.mark.slow
def test_one_of_two_hosts_is_asked_to_stop_or_dies(small, tmp_path):
    small.num_epochs = 2.0
    workdir = tmp_path / "run"
    hosts = start_two_hosts(small, workdir)
    wait_for_records(workdir, hosts[0], 3)
    hosts[1].send_signal(signal.SIGTERM)
    told = [host.communicate(timeout=300)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [75, 75], told
    assert "stopped after step" in told[0]
    hosts = start_two_hosts(small, workdir)
    wait_for_records(workdir, hosts[0], len(read_metrics(workdir)) + 2)
    hosts[1].kill()
    begin = time.monotonic()
    told = hosts[0].communicate(timeout=300)[1]
    assert time.monotonic() - begin < 60  # And not for ever.
    assert hosts[0].returncode == 75, told
    assert "another host is lost" in told
    assert "start all of them again" in told
    assert "Traceback" not in told
    # What is left is valid. (That hosts resume what one process left is tested with the hosts.)
    two_devices = Programs(jax.devices()[:2])
    assert train(small, workdir, programs=two_devices)["step"] == 80
    train(small, tmp_path / "whole", programs=two_devices)
    assert [r["step"] for r in records(workdir)] == [r["step"] for r in records(tmp_path / "whole")]
    for one, other in zip(records(workdir), records(tmp_path / "whole"), strict=True):
        # Compiled for one process, not for two: float32, 80 steps.
        assert one == pytest.approx(other, rel=1e-3)


_is_forbidden = False


def _forbid_pickle(event, args):
    if event == "pickle.find_class" and _is_forbidden:
        raise AssertionError(f"unpickled: {args}")


@pytest.fixture
def no_pickle(monkeypatch):
    """Makes every pickle an error that names a class or a function, which is what can do harm."""
    if not hasattr(sys, "_hooked_by_test_survival"):  # An audit hook stays.
        sys.addaudithook(_forbid_pickle)
        sys._hooked_by_test_survival = True
    pickled = pickle.dumps(UserError("a class"))
    monkeypatch.setattr(sys.modules[__name__], "_is_forbidden", True)
    with pytest.raises(AssertionError, match="unpickled"):
        pickle.loads(pickled)


@pytest.mark.usefixtures("no_pickle")
@pytest.mark.slow
def test_nothing_that_is_read_is_unpickled(finished_run, tmp_path):
    config, run, values = finished_run
    assert train(config, run) == values
    assert evaluate_run(run)["error"] == values["test_error"]
    member = Member({"norm.memory_size": 4}, 0, {"norm.memory_size": 4, "seed": 0})
    study = store.open_study(tmp_path)
    store.check_sweep(study, config, [member])
    store.enqueue_missing(study, [member])
    study.set_user_attr(store.SWEEP, {"fields": ["norm.memory_size"]})
    results = read_results(store.open_study(tmp_path, create=False))
    write_results(results, tmp_path)
    assert pd.read_parquet(tmp_path / "results.parquet")["outcome"].tolist() == ["waiting"]
