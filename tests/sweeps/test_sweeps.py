"""Sweeps: one program for many members, each run once, whatever is killed and whoever helps."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import pandas as pd
import pytest
from optuna.trial import TrialState
from runs import xla_flags
from small_sweeps import experiment, programs_on_device

from mbn_jax.errors import StoppedError, UserError
from mbn_jax.main import report_command, sweep_command
from mbn_jax.sweeps import Figure, Sweep
from mbn_jax.sweeps import runner as runner_module
from mbn_jax.sweeps import storage as store
from mbn_jax.sweeps.command import load_sweep, open_sweep, run_sweep
from mbn_jax.sweeps.declaration import Member
from mbn_jax.sweeps.results import AXIS, RUN, VALUE, read_results, tidy
from mbn_jax.sweeps.summary import summarize
from mbn_jax.training.config_files import parse_config
from mbn_jax.training.loop import train
from mbn_jax.training.program import Programs
from mbn_jax.training.reporting import read_metrics
from mbn_jax.training.workdir import only_writer

# The tests play the runner.
pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage:UserWarning")

TIMES = ["images_per_second", "seconds"]


def run(path, overrides, seeds, workdir, devices=None):
    devices = devices or jax.devices()[:1]
    return run_sweep(workdir, *open_sweep(path, overrides, seeds, workdir, devices=devices))


def results_of(workdir):
    return tidy(read_results(store.open_study(workdir)))


def comparable(results):
    """Results in one order, without what differs from run to run."""
    rows = results.drop(columns=TIMES).sort_values(["norm.memory_size", "seed", "step"])
    return rows.reset_index(drop=True)


def start(compiled, *argv, waits=False):
    """Starts mbn-sweep in a process; one that waits says 'ready' and reads a line first."""
    # A shell that starts the tests in the background has them ignore interrupts.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import mbn_jax.sweeps.command\n"
        "from mbn_jax.main import sweep_main\n"
        + ("print('ready', flush=True); input()\n" if waits else "")
        + "sweep_main()"
    )
    environment = {
        "XLA_FLAGS": xla_flags(),
        "JAX_ENABLE_COMPILATION_CACHE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    # A process that is killed leaves, and one beside it reads, programs that are half written.
    half_written = "ignore:Error reading persistent compilation cache entry"
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-W", half_written, "-c", code, *argv],
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_members_that_differ_in_numbers_share_one_compilation(write_sweep, tmp_path, monkeypatch):
    programs = Programs(jax.devices()[:1])
    monkeypatch.setattr(runner_module, "Programs", lambda devices: programs)
    axes = {"norm.memory_size": (1, 2, 3, 4, 5, 6, 7, 8)}
    path = write_sweep(axes, seeds=3, extra="baseline={'norm.memory_size': 1}")
    runner, study = open_sweep(path, [], None, tmp_path / "sizes", devices=jax.devices()[:1])
    assert runner.run(study) == {"finished": 24}
    assert runner.num_programs == 1
    assert runner.step_compilations == 1
    results = tidy(read_results(study))
    assert len(results) == 48  # Two evaluations each.
    # Another memory, another result: the numbers reach the program.
    assert results[results["last"]].groupby("norm.memory_size")["train_loss"].mean().nunique() == 8
    assert results[results["last"]]["train_loss"].nunique() == 24
    # Rates, decays and seeds are numbers too.
    axes = {
        "norm.decay": (0.5, 1.0),
        "optimizer.learning_rate": (0.01, 0.1),
        "optimizer.weight_decay": (0.0, 0.1),
    }
    path = write_sweep(axes, seeds=2)
    runner, study = open_sweep(path, [], None, tmp_path / "rates", devices=jax.devices()[:1])
    assert runner.run(study) == {"finished": 16}
    assert runner.step_compilations == 1
    assert tidy(read_results(study)).query("last")["train_loss"].nunique() == 16


@pytest.mark.usefixtures("share_programs")
@pytest.mark.slow
def test_the_number_of_devices_changes_no_result(write_sweep, tmp_path):
    path = write_sweep({"norm.memory_size": (1, 4)}, seeds=3, **{"dataset.crop_padding": 1})
    for count in (1, 2):
        outcomes = run(path, [], None, tmp_path / str(count), devices=jax.devices()[:count])
        assert outcomes == {"finished": 6}
    one, two = (comparable(results_of(tmp_path / str(count))) for count in (1, 2))
    pd.testing.assert_frame_equal(one, two, check_exact=True)


@pytest.mark.usefixtures("share_programs")
@pytest.mark.slow
def test_a_member_is_the_run_that_its_config_says(write_sweep, tmp_path):
    path = write_sweep({"norm.memory_size": (2, 8)}, seeds=2)
    run(path, [], None, tmp_path / "sweep")
    folder = tmp_path / "sweep" / "members" / "memory_size=2,seed=1"
    config = parse_config(str(tmp_path / "config.py"))
    config.norm.memory_size, config.norm.memory_capacity, config.seed = 2, 8, 1
    programs = programs_on_device(jax.devices()[0])
    train(config, tmp_path / "alone", programs=programs)

    def records(workdir):
        return [{k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(workdir)]

    assert records(tmp_path / "alone") == records(folder)
    # Room for more slots than are used changes nothing but the order of float32 sums.
    config.norm.memory_capacity = 0
    small = train(config, tmp_path / "small", programs=programs)
    assert small["train_loss"] == pytest.approx(records(folder)[-1]["train_loss"], rel=1e-4)


@pytest.mark.usefixtures("share_programs")
@pytest.mark.slow
def test_what_diverges_or_fails_is_recorded_and_the_rest_goes_on(
    write_sweep, tmp_path, monkeypatch
):
    axes = {
        "norm": {
            "good": {},
            "bad": {"norm.name": "none", "optimizer.learning_rate": 1e12},
            "broken": {"norm.decay": 0.5},
        }
    }

    def fail_sometimes(config, *args, **kwargs):
        if config.norm.decay == 0.5:
            raise MemoryError("no room\nleft")
        return train(config, *args, **kwargs)

    monkeypatch.setattr(runner_module, "train", fail_sometimes)
    path = write_sweep(axes, seeds=2, extra="baseline={'norm': 'good'}, figures=[Figure(x='norm')]")
    workdir = tmp_path / "sweep"
    assert sweep_command([path, f"--workdir={workdir}"]) == 1
    results = results_of(workdir).query("last").set_index(["norm", "seed"])
    assert results.loc["good", "outcome"].tolist() == ["finished"] * 2
    assert results.loc["bad", "outcome"].tolist() == ["diverged"] * 2
    assert results.loc["broken", "outcome"].tolist() == ["failed"] * 2
    assert results.loc["bad", "reason"].str.contains("at learning rate").all()
    assert (results.loc["bad", "end_step"] > 1).all()
    told = "MemoryError: no room left; see traceback.txt in its folder"
    assert set(results.loc["broken", "reason"]) == {told}
    traceback = (workdir / "members" / "norm=broken,seed=0" / "traceback.txt").read_text()
    assert "in fail_sometimes" in traceback
    table = summarize(
        read_results(store.open_study(workdir)), {"norm": list(axes["norm"])}, "test_error", {}
    )
    assert table["diverged"].tolist() == [0, 2, 0]
    assert table["failed"].tolist() == [0, 0, 2]
    page = (workdir / "report.html").read_text()
    assert "MemoryError: no room left" in page
    # What has ended is not run again,
    monkeypatch.setattr(runner_module, "train", None)
    assert sweep_command([path, f"--workdir={workdir}"]) == 1
    # unless it failed, and one asks for it.
    monkeypatch.setattr(runner_module, "train", train)
    assert sweep_command([path, f"--workdir={workdir}", "--retry_failed"]) == 0
    results = results_of(workdir).query("last").set_index(["norm", "seed"])
    assert results.loc["broken", "outcome"].tolist() == ["finished"] * 2
    assert results.loc["bad", "outcome"].tolist() == ["diverged"] * 2


@pytest.mark.usefixtures("share_programs")
@pytest.mark.slow
def test_more_members_can_be_added_later(write_sweep, tmp_path):
    workdir = tmp_path / "sweep"
    run(write_sweep({"norm.memory_size": (1, 4)}), [], None, workdir)
    before = results_of(workdir)
    outcomes = run(write_sweep({"norm.memory_size": (1, 2, 4, 8)}), [], 2, workdir)
    assert outcomes == {"finished": 8}
    after = results_of(workdir)
    kept = after[after["norm.memory_size"].isin([1, 4]) & (after["seed"] == 0)]
    pd.testing.assert_frame_equal(
        before.reset_index(drop=True), kept.reset_index(drop=True), check_exact=True
    )
    with pytest.raises(UserError, match="has 4 members that the experiment no longer declares"):
        run(write_sweep({"norm.memory_size": (1, 4)}), [], 2, workdir)
    # Refused, it left no trace: the report is that of all members.
    assert report_command([str(workdir)]) == 0
    assert "| 8 |" in (workdir / "report.md").read_text()


@pytest.mark.usefixtures("share_programs")
@pytest.mark.slow
def test_a_member_in_work_keeps_its_capacity_when_larger_memories_are_added(
    write_sweep, tmp_path, monkeypatch
):
    workdir = tmp_path / "sweep"
    runner, study = open_sweep(
        write_sweep({"norm.memory_size": (1, 4)}, **{"norm.memory_capacity": 0}),
        [],
        None,
        workdir,
        devices=jax.devices()[:1],
    )

    def stop_later(config, *args, **kwargs):
        runner._stop.set()
        return train(config, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(runner_module, "train", stop_later)
        runner.run(study)
    assert store.outcome(study.get_trials()[0]) == "fail"
    path = write_sweep({"norm.memory_size": (1, 4, 8)}, **{"norm.memory_capacity": 0})
    assert run(path, [], None, workdir) == {"finished": 3}
    capacity = {
        json.loads(name)["norm.memory_size"]: t.user_attrs[store.FIELDS]["norm.memory_capacity"]
        for name, t in store.trials_by_member(study).items()
    }
    assert capacity == {1: 4, 4: 4, 8: 8}


@pytest.mark.usefixtures("share_programs")
def test_another_meaning_of_a_variant_is_refused(write_sweep, tmp_path):
    workdir = tmp_path / "sweep"
    run(write_sweep({"rate": {"low": {"optimizer.learning_rate": 0.01}}}), [], None, workdir)
    with pytest.raises(UserError, match=r"ran .*low.* with .*0\.01.* now declares with .*0\.02"):
        run(write_sweep({"rate": {"low": {"optimizer.learning_rate": 0.02}}}), [], 2, workdir)


@pytest.mark.usefixtures("share_programs")
@pytest.mark.slow
def test_a_sweep_may_move_to_another_folder(write_sweep, tmp_path, monkeypatch):
    path = write_sweep({"norm.memory_size": (1, 4)})
    run(path, [], None, tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.setattr(runner_module, "train", None)
    assert run(path, [], None, tmp_path / "there") == {"finished": 2}


@pytest.mark.usefixtures("share_programs")
@pytest.mark.slow
def test_a_whole_number_among_fractions_is_a_fraction(write_sweep, tmp_path):
    axes = {"optimizer.weight_decay": (0, 0.1), "norm.decay": (1, 0.5)}
    assert run(write_sweep(axes), [], None, tmp_path / "sweep") == {"finished": 4}


def test_names_that_folders_cannot_have_are_told_apart():
    names = [Member({"v": v}, 0, {}).folder for v in ("a b", "a_b", "a (b", "x" * 300, "x" * 299)]
    assert len(set(names)) == 5
    assert max(map(len, names)) < 200
    assert names[1] == "v=a_b,seed=0"


@pytest.mark.slow
def test_only_one_process_claims_a_trial(tmp_path):
    study = store.open_study(tmp_path)
    for i in range(60):
        study.enqueue_trial({}, user_attrs={store.MEMBER: str(i)})
    code = (
        "import pathlib, sys, time, warnings; warnings.simplefilter('ignore')\n"
        "from mbn_jax.sweeps import storage\n"
        "study = storage.open_study(pathlib.Path(sys.argv[1]))\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "while (trial := study.ask()).user_attrs:\n"
        "  print(trial.number, flush=True); time.sleep(0.02)\n"  # So that they meet.
    )
    claimants = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in claimants:
        assert process.stdout.readline() == "ready\n"
    for process in claimants:
        process.stdin.write("\n")
        process.stdin.flush()
    claimed = [process.communicate(timeout=120)[0].split() for process in claimants]
    assert sorted(int(number) for numbers in claimed for number in numbers) == list(range(60))
    assert sum(bool(numbers) for numbers in claimed) > 1  # They did meet.


@pytest.mark.usefixtures("share_programs")
def test_a_runner_whose_member_was_taken_over_goes_on(write_sweep, tmp_path, monkeypatch):
    """As after the sleep of a laptop: heartbeats were missed, another runner has the member."""
    path = write_sweep({"norm.memory_size": (1, 4)})
    runner, study = open_sweep(path, [], None, tmp_path / "sweep", devices=jax.devices()[:1])
    taken = []

    def take_over(config, *args, **kwargs):
        if not taken:
            (trial,) = study.get_trials(states=(TrialState.RUNNING,))
            study.tell(trial.number, state=TrialState.FAIL)
            taken.append(trial.number)
        return train(config, *args, **kwargs)

    monkeypatch.setattr(runner_module, "train", take_over)
    assert runner.run(study) == {"finished": 2}
    states = [store.outcome(trial) for trial in study.get_trials()]
    assert states == ["fail", "finished", "finished"]


def test_the_seconds_of_a_member_are_those_of_all_attempts(write_sweep, tmp_path, monkeypatch):
    path = write_sweep({"norm.memory_size": (1,)})
    runner, study = open_sweep(path, [], None, tmp_path / "sweep", devices=jax.devices()[:1])
    seconds = iter([0.0, 100.0, 300.0, 1000.0, 1020.0])
    clock = types.SimpleNamespace(monotonic=seconds.__next__, sleep=time.sleep)
    monkeypatch.setattr(runner_module, "time", clock)
    monkeypatch.setattr(runner, "_show_until_done", lambda threads: [t.join() for t in threads])

    def costs():
        return [t.user_attrs.get(store.COST, {}).get("seconds") for t in study.get_trials()]

    def stop_after_one_record(config, folder, *, on_record, **_):
        on_record(5, {"test_error": 0.5})
        assert costs() == [100.0]
        runner._stop.set()
        raise StoppedError

    monkeypatch.setattr(runner_module, "train", stop_after_one_record)
    runner.run(study)
    runner._stop.clear()
    monkeypatch.setattr(runner_module, "train", lambda *_, **__: {"test_error": 0.25})
    assert runner.run(study) == {"finished": 1}
    assert costs() == [300.0, 320.0]
    assert set(tidy(read_results(study))["seconds"]) == {320.0}


@pytest.mark.slow
def test_a_runner_waits_for_the_one_that_writes_to_its_folder(write_sweep, tmp_path, fake_train):
    path, workdir = write_sweep({"norm.decay": (0.5,)}), tmp_path / "sweep"
    folder = workdir / "members" / "decay=0.5,seed=0"
    folder.mkdir(parents=True)
    runner, study = open_sweep(path, [], None, workdir, devices=jax.devices()[:1])
    with only_writer(folder):
        threading.Timer(1.0, runner._stop.set).start()
        runner.run(study)
    assert [store.outcome(trial) for trial in study.get_trials()] == ["fail"]
    assert run(path, [], None, workdir) == {"finished": 1}


@pytest.mark.usefixtures("share_programs")
def test_a_sweep_of_another_config_is_refused(write_sweep, tmp_path):
    path = write_sweep({"norm.memory_size": (1, 4)})
    run(path, [], None, tmp_path / "sweep")
    with pytest.raises(UserError, match=r"another config \(num_epochs was 1.0 and is 2.0\)"):
        run(path, ["--config.num_epochs=2"], None, tmp_path / "sweep")


def records_in(workdir):
    return sum(len(read_metrics(folder)) for folder in workdir.glob("members/*"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A folder in which the processes of this file keep what they compile."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def killed_and_whole(data_dir, tmp_path_factory, compiled):
    """One experiment, run by two runners, and once more by runners that are killed."""
    folder = tmp_path_factory.mktemp("processes")
    path = experiment(
        folder, data_dir, {"norm.memory_size": (1, 2, 4, 8)}, seeds=2, num_epochs=10.0
    )
    return path, folder / "whole é ?a=%20#{b}", folder / "killed"


@pytest.mark.slow
def test_two_runners_share_the_members_in_a_folder_of_any_name(killed_and_whole, compiled):
    path, whole, _ = killed_and_whole
    runners = [start(compiled, path, f"--workdir={whole}", waits=True) for _ in range(2)]
    for process in runners:
        assert process.stdout.readline() == "ready\n"
    for process in runners:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in runners:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        assert "8 finished" in output
    assert {path.name for path in whole.parent.iterdir() if path.is_dir()} <= {whole.name, "killed"}
    study = store.open_study(whole, create=False)
    ran = [t for t in study.get_trials() if t.user_attrs.get(store.OUTCOME) == store.FINISHED]
    assert sorted(t.user_attrs[store.MEMBER] for t in ran) == sorted(store.trials_by_member(study))
    ran_by = {t.user_attrs[store.RUNNER].split(" on ")[0] for t in ran}
    assert ran_by == {f"process {process.pid}" for process in runners}
    assert report_command([str(whole)]) == 0


@pytest.mark.slow
def test_killed_again_and_again_a_sweep_loses_and_repeats_nothing(killed_and_whole, compiled):
    path, whole, killed = killed_and_whole
    rng = random.Random(0)
    for _ in range(2):
        before = records_in(killed)
        process = start(compiled, path, f"--workdir={killed}")
        while records_in(killed) == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.random())  # Anywhere in a run, between runs, while the study is written.
        process.send_signal(signal.SIGKILL)
        process.communicate()
    for workdir in (killed, whole):  # The second is done, where the test before has run.
        process = start(compiled, path, f"--workdir={workdir}")
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    study = store.open_study(killed)
    ended = [t for t in study.get_trials() if t.user_attrs.get(store.OUTCOME) == store.FINISHED]
    names = [t.user_attrs[store.MEMBER] for t in ended]
    assert len(names) == len(set(names)) == 8
    pd.testing.assert_frame_equal(
        comparable(results_of(whole)), comparable(results_of(killed)), check_exact=True
    )


def test_members_of_runners_that_are_gone_are_abandoned(tmp_path, monkeypatch):
    study = store.open_study(tmp_path)
    members = [Member({"seedless": i}, 0, {"seed": 0}) for i in range(4)]
    store.enqueue_missing(study, members)
    store.enqueue_missing(study, members)
    assert len(study.get_trials()) == 4  # Once is enough.
    silent, alive, _ = (study.ask() for _ in range(3))  # The third sent no heartbeat at all.
    for trial in (silent, alive):
        trial.set_user_attr(store.RUNNER, "process 1")
        study._storage.record_heartbeat(trial._trial_id)
    store.abandon_stale(study)

    def states():
        return [t.state for t in study.get_trials()][:3]

    running = TrialState.RUNNING
    assert states() == [running, running, running]
    monkeypatch.setattr(store, "GRACE_SECONDS", 0)  # For the third; Optuna has its own.
    with study._storage._backend.engine.begin() as database:
        database.exec_driver_sql(
            "UPDATE trial_heartbeats SET heartbeat = datetime(heartbeat, '-2 minutes') "
            f"WHERE trial_id = {silent._trial_id}"
        )
    store.abandon_stale(study)
    assert states() == [TrialState.FAIL, running, TrialState.FAIL]
    store.enqueue_missing(study, members)
    waiting = study.get_trials(states=(TrialState.WAITING,))
    # The last was never asked for.
    expected = [members[i].name for i in (3, 0, 2)]
    assert [t.user_attrs[store.MEMBER] for t in waiting] == expected


def test_a_member_enqueued_twice_runs_once(tmp_path):
    study = store.open_study(tmp_path)
    member = Member({"axis": 1}, 0, {"seed": 0})
    for _ in range(2):
        study.enqueue_trial({}, user_attrs={store.MEMBER: member.name, store.FIELDS: {}})
    first, second = study.ask(), study.ask()
    assert not store.is_duplicate(study, first.number, member.name)
    assert store.is_duplicate(study, second.number, member.name)
    # Abandoned, the first no longer stands in the way.
    study.tell(first, state=TrialState.FAIL)
    assert not store.is_duplicate(study, second.number, member.name)


@pytest.mark.parametrize(
    ("number", "status", "told"),
    [
        (signal.SIGINT, 130, "interrupted; "),
        (signal.SIGTERM, 75, "stopped; the members in work are saved; "),
    ],
    ids=["SIGINT", "SIGTERM"],
)
@pytest.mark.slow
def test_an_interrupted_sweep_requeues_its_members(
    write_sweep, tmp_path, compiled, number, status, told
):
    path = write_sweep({"norm.memory_size": (1, 2)}, num_epochs=4000.0)
    process = start(compiled, path, f"--workdir={tmp_path / 'sweep'}")
    folder = tmp_path / "sweep" / "members" / "memory_size=1,seed=0"
    while not (folder / "metrics.jsonl").exists() or not read_metrics(folder):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(number)
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == status
    assert told in output
    assert "Traceback" not in output
    states = {store.outcome(t) for t in store.open_study(tmp_path / "sweep").get_trials()}
    assert states == {"fail", "waiting"}
    # A report can be asked for at any time.
    assert report_command([str(tmp_path / "sweep")]) == 0


@pytest.mark.usefixtures("fake_train")
@pytest.mark.slow
def test_results_are_one_tidy_table(write_sweep, tmp_path):
    axes = {
        "variant": {"small": {"norm.memory_size": 2, "norm.gradient": "through"}, "default": {}},
        "dataset.flip": (False, True),
    }
    workdir = tmp_path / "sweep"
    run(write_sweep(axes, seeds=2), [], None, workdir)
    table = pd.read_csv(workdir / "results.csv")
    parquet = pd.read_parquet(workdir / "results.parquet").fillna(np.nan)
    pd.testing.assert_frame_equal(table, parquet, check_dtype=False)
    assert len(table) == 16
    assert table["last"].tolist() == [False, True] * 8
    small = table[table["variant"] == "small"]
    assert set(small["norm.memory_size"]) == {2}
    assert set(small["norm.gradient"]) == {"through"}
    assert set(table[table["variant"] == "default"]["norm.memory_size"]) == {4}
    assert set(table["dataset.flip"]) == {False, True}
    assert set(table["step"]) == {5, 10}
    assert table["test_error"].between(0, 1).all()


def grouped(*run_columns):
    """Columns of results with an axis x and a recorded value."""
    columns = [(AXIS, "x"), *((RUN, name) for name in run_columns), (VALUE, "value")]
    return pd.MultiIndex.from_tuples(columns)


def test_a_summary_takes_the_last_value_that_was_measured():
    rows = [
        ("a", 0, "finished", False, 1.0),
        ("a", 0, "finished", True, np.nan),
        ("a", 1, "finished", False, 2.0),
        ("a", 1, "finished", True, 3.0),
        ("a", 2, "finished", True, np.nan),
    ]
    results = pd.DataFrame(rows, columns=grouped("seed", "outcome", "last"))
    (row,) = summarize(results, {"x": ["a"]}, "value", {}).to_dict("records")
    # 1 degree of freedom: a seed without the metric has no part in it.
    assert (row["mean"], row["seeds"]) == (2.0, 2)
    assert row["interval"] == pytest.approx(12.7062, rel=1e-5)
    (row,) = summarize(results, {"x": ["a"]}, "value", {}, "mean").to_dict("records")
    assert (row["mean"], row["seeds"]) == (1.75, 2)


def test_summary_against_numbers_by_hand():
    rows = [
        ("a", 0, "finished", 1.0),
        ("a", 1, "finished", 2.0),
        ("a", 2, "finished", 4.0),
        ("b", 0, "finished", 1.5),
        ("b", 1, "diverged", 9.0),
        ("b", 2, "finished", 3.5),
    ]
    results = pd.DataFrame(rows, columns=grouped("seed", "outcome"))
    results[RUN, "last"] = True
    table = summarize(results, {"x": ["b", "a"]}, "value", {"x": "a"})
    assert list(table.index) == [("b",), ("a",)]
    table = table.set_axis(["b", "a"])
    assert table.loc["a", "mean"] == pytest.approx(7 / 3)
    assert table.loc["a", "standard_deviation"] == pytest.approx(np.std([1, 2, 4], ddof=1))
    # Student's t for 95 % and 2 degrees of freedom.
    half = 4.30265 * np.std([1, 2, 4], ddof=1) / np.sqrt(3)
    assert table.loc["a", "interval"] == pytest.approx(half, rel=1e-5)
    assert table.loc["b", ["mean", "seeds", "diverged", "pairs"]].tolist() == [2.5, 2, 1, 2]
    assert table.loc["b", "difference"] == pytest.approx((0.5 - 0.5) / 2)
    # 1 degree of freedom.
    assert table.loc["b", "difference_interval"] == pytest.approx(12.7062 * 0.5, rel=1e-5)
    assert np.isnan(table.loc["a", "difference"])


@pytest.mark.usefixtures("share_programs")
def test_dry_run_shows_the_members_and_writes_nothing(write_sweep, tmp_path, capsys):
    path = write_sweep({"norm.gradient": ("auto", "through"), "batch_size": (8, 16)}, seeds=2)
    assert sweep_command([path, f"--workdir={tmp_path / 'sweep'}", "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    assert json.loads(lines[0]) == {"norm.gradient": "auto", "batch_size": 8, "seed": 0}
    assert lines[-1] == "8 members, 4 compilations of the step on each of 8 devices"
    assert not (tmp_path / "sweep").exists()


@pytest.mark.usefixtures("share_programs")
@pytest.mark.parametrize(
    ("axes", "argv", "message"),
    [
        ({"norm.memry_size": (1,)}, [], "no field norm.memry_size; did you mean norm.memory_size"),
        ({"norm.memory_size": ("many",)}, [], "a value of the wrong type"),
        ({"norm.memory_size": (-1,)}, [], "norm.memory_size must be at most 65536 and 0 or more"),
        ({"norm.decay": (1.0, 2.0)}, [], r"norm.decay must be in \(0, 1\], got 2.0"),
        ({"norm.decay": (1.0, 1.0)}, [], "axis 'norm.decay' has a value twice"),
        ({"norm.decay": ()}, [], "cannot have the axis 'norm.decay' with 0 values"),
        ({"seed": (1,)}, [], "cannot have the axis 'seed'"),
        ({"outcome": {"a": {}}}, [], "cannot have the axis 'outcome'"),
        ({"model.features": ((4, 4), (8, 8))}, [], r"named variants.*got \(4, 4\) of tuple"),
        ({"variant": {"a": 1}}, [], "each a dict of fields; got 1 of int"),
        (
            {"norm.decay": (1.0,), "v": {"a": {"norm.decay": 0.5}}},
            [],
            "two axes set the field norm.decay",
        ),
        ({"norm.decay": (1.0,)}, ["--config.norm.decay=0.5"], "is set by the axes"),
        ({"norm.decay": (1.0,)}, ["--config.norm.deca=0.5"], "did you mean norm.decay"),
        ({"norm.decay": (1.0,)}, ["--seeds=0"], "1 seed or more, got 0"),
        ({"norm.decay": (1.0,)}, ["--workdir="], "--workdir is missing; for example: mbn-sweep"),
        ({"v": {"low": {}, "Low": {}}}, [], "have names too much alike for folders: .*Low"),
        ({"norm.decay": (1.0,)}, ["--storage=nowhere://x"], "cannot open the sweep's database"),
        ({"norm.decay": (1.0,)}, ["--sedes=2"], "unknown argument --sedes=2"),
        ({"norm.decay": (1.0,)}, ["--config.dataset.name", "digit"], "no data set 'digit'"),
        ({"dataset.name": ("digit",)}, [], "TFDS has no data set 'digit'"),
    ],
)
def test_mistakes_are_one_sentence_before_anything_runs(
    write_sweep, tmp_path, monkeypatch, axes, argv, message
):
    monkeypatch.setattr(runner_module, "train", None)
    with pytest.raises(UserError, match=message) as error:
        sweep_command([write_sweep(axes), f"--workdir={tmp_path / 'sweep'}", *argv])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": {"norm.decay": 0.25}}, "baseline: 0.25 is not on an axis 'norm.decay'"),
        ({"baseline": {"decay": 0.5}}, "baseline: 0.5 is not on an axis 'decay'"),
        ({"figures": [Figure(x="decay")]}, "must give each axis of .* a place"),
        ({"figures": [Figure(x="step")]}, "must give each axis of .* a place"),
        ({"figures": [Figure(x="norm.decay", over_steps="avg")]}, "'last' or 'mean', got 'avg'"),
        ({"axes": {}}, "needs configs and axes"),
        ({"over_steps": "first"}, "'last' or 'mean', got 'first'"),
    ],
)
def test_a_declaration_that_does_not_fit_together(changes, message):
    sweep = Sweep(title="", configs={"digits": "x"}, axes={"norm.decay": (0.5, 1.0)})
    with pytest.raises(UserError, match=message):
        dataclasses.replace(sweep, **changes)


def test_a_report_needs_a_sweep(tmp_path):
    with pytest.raises(UserError, match="is not the folder of a sweep"):
        report_command([str(tmp_path)])
    assert not list(tmp_path.iterdir())
    store.open_study(tmp_path)
    with pytest.raises(UserError, match="has no members yet; start the sweep with mbn-sweep"):
        report_command([str(tmp_path)])
    with pytest.raises(UserError, match="has no sweep called"):
        report_command([str(tmp_path), f"--storage=sqlite:///{tmp_path}/other.db"])


@pytest.mark.slow
def test_a_folder_that_cannot_be_made_ends_the_sweep(write_sweep, tmp_path, fake_train):
    path = write_sweep({"norm.decay": (0.5, 0.9)})
    workdir = tmp_path / "sweep"
    workdir.mkdir()
    (workdir / "members").write_text("a file")
    with pytest.raises(UserError, match=r"members/.* cannot be made: Not a directory"):
        sweep_command([path, f"--workdir={workdir}"])
    (workdir / "members").unlink()
    assert sweep_command([path, f"--workdir={workdir}"]) == 0


def test_the_data_set_picks_the_config(write_sweep, tmp_path):
    path = write_sweep({"norm.decay": (1.0,)})
    (tmp_path / "other.py").write_text(
        "from mbn_jax.training.config import default_config\n"
        "def get_config():\n  config = default_config()\n  config.batch_size = 4\n"
        "  config.dataset.name = 'other'\n  return config\n"
    )
    text = (tmp_path / "experiment.py").read_text()
    text = text.replace("{'digits': 'config.py'}", "{'digits': 'config.py', 'other': 'other.py'}")
    (tmp_path / "experiment.py").write_text(text)
    for overrides in (["--config.dataset.name=other"], ["--config.dataset.name", "other"]):
        _, config = load_sweep(path, [*overrides, "--config.num_epochs=3"], None)
        assert (config.dataset.name, config.batch_size, config.num_epochs) == ("other", 4, 3)
    _, config = load_sweep(path, [], None)
    assert (config.dataset.name, config.batch_size) == ("digits", 16)


def test_a_file_that_is_no_experiment(tmp_path):
    (tmp_path / "file.py").write_text("def get_sweep():\n  return 1\n")
    with pytest.raises(UserError, match="must return a Sweep, got"):
        sweep_command([str(tmp_path / "file.py"), f"--workdir={tmp_path}"])
