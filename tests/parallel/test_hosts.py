"""Several processes on this machine stand in for hosts: the same run as in one process."""

import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.experimental import multihost_utils
from runs import digits_config, final_state, records, write_config

from mbn_jax.core.batch_stats import pool_batch_stats
from mbn_jax.errors import StoppedError, UserError
from mbn_jax.parallel.devices import check_alike, first_host_first, keep_compiled_programs
from mbn_jax.parallel.hosts import join_hosts, launched_processes
from mbn_jax.training.buckets import local_copy
from mbn_jax.training.evaluation import evaluate_run
from mbn_jax.training.loop import train
from mbn_jax.training.program import Programs
from mbn_jax.training.seal import SEAL
from mbn_jax.training.workdir import CHECKPOINTS

SLURM_PORTS = range(61440, 65536)
"""Of which JAX takes one by the number of the job."""

AUDITED = """
import os, sys
log = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_CREAT)
def note(event, args):
    writes = event == "open" and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event in ("os.rename", "os.remove", "os.truncate"):
        os.write(log, f"{args[0]}\\n".encode())
sys.addaudithook(note)
from mbn_jax.main import train_main
train_main()
"""
"""`mbn-train`, with a list of the files that Python opens to write, renames or removes."""


def config_of(data_dir, **fields):
    short = {
        "dataset.train_split": "train[:320]",
        "dataset.test_split": "test[:99]",
        "model.features": (4,),
        "num_epochs": 0.6,
        "norm.sync_group_size": 2,
        "log_every_steps": 3,
        "eval_every_steps": 6,
        "checkpoint_every_steps": 6,
    }
    return digits_config(data_dir, **{**short, **fields})


def free_port(ports):
    for port in ports:
        with socket.socket() as candidate:
            try:
                candidate.bind(("127.0.0.1", port))
            except OSError:
                continue
            return candidate.getsockname()[1]
    raise RuntimeError("no port is free")


def by_flags(processes):
    """Returns flags and variables by which each process finds the others."""
    flags = [f"--coordinator_address=127.0.0.1:{free_port([0])}", f"--num_processes={processes}"]
    return [([*flags, f"--process_id={i}"], {}) for i in range(processes)]


def by_slurm(processes):
    """The same, as `srun` sets it in a job that has more tasks than this step."""
    step = {
        "SLURM_JOB_ID": str(free_port(SLURM_PORTS) - SLURM_PORTS.start),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_TASKS": str(processes),
        "SLURM_NTASKS": str(processes + 3),
    }
    ids = map(str, range(processes))
    return [([], step | {"SLURM_PROCID": i, "SLURM_LOCALID": i}) for i in ids]


def start(hosts, config, workdirs, devices):
    """Runs `mbn-train` on hosts of so many devices each; returns (out, err, status) of each."""
    script = workdirs[0].with_suffix(".py")
    write_config(config, script)
    started = []
    for i, (arguments, variables) in enumerate(hosts):
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices[i]}"
        written = workdirs[0].with_suffix(f".written{i}")
        command = [sys.executable, "-c", AUDITED, str(written), f"--config={script}"]
        started.append(
            subprocess.Popen(
                [*command, f"--workdir={workdirs[i]}", *arguments],
                env=os.environ | {"XLA_FLAGS": flags} | variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return [(*process.communicate(timeout=300), process.returncode) for process in started]


def run_on_hosts(hosts, config, workdir, devices):
    """Trains on the hosts, and checks that the first one speaks and writes for all."""
    expected = {"config", "curves", "events", "lock", "metrics"}
    results = start(hosts, config, [workdir] * len(hosts), [devices] * len(hosts))
    assert [status for _, _, status in results] == [0] * len(hosts), results
    spoke = ["test error" in out for out, _, _ in results]
    assert spoke == [True] + [False] * (len(hosts) - 1)
    for i in range(len(hosts)):
        paths = map(pathlib.Path, workdir.with_suffix(f".written{i}").read_text().splitlines())
        inside = [p.relative_to(workdir).parts[0] for p in paths if p.is_relative_to(workdir)]
        # All hosts take part in the checkpoints.
        names = {name.split(".")[0] for name in inside} - {CHECKPOINTS}
        assert names == (set() if i else expected)


def only_half(workdir, to):
    """Copies a run as it was after its checkpoint of step 6."""
    shutil.copytree(workdir, to)
    shutil.rmtree(to / CHECKPOINTS / "12")
    return to


def assert_same_run(one, other):
    assert [record["step"] for record in one] == [3, 6, 9, 12]
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        # Collectives between processes add in another order: float32, twelve steps.
        assert a == pytest.approx(b, rel=1e-3)


PROGRAMS = {count: Programs(jax.devices()[:count]) for count in (1, 4, 8)}


def assert_close(state, other):
    jax.tree.map(
        # As above; 4e-5 was measured.
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
        (state.params, state.opt_state, state.batch_stats),
        (other.params, other.opt_state, other.batch_stats),
    )


@pytest.mark.slow
@pytest.mark.parametrize(("sync", "launched"), [("sync", by_slurm), ("local", by_flags)])
def test_many_hosts_run_as_one(data_dir, tmp_path, sync, launched):
    config = config_of(data_dir, **{"norm.sync": sync})
    train(config, tmp_path / "one", programs=PROGRAMS[4])
    one = final_state(PROGRAMS[4], config, tmp_path / "one")
    many = tmp_path / "many"
    run_on_hosts(launched(2), config, many, devices=2)
    assert_same_run(records(tmp_path / "one"), records(many))
    assert_close(one, final_state(PROGRAMS[4], config, many))
    # By eight devices of one process.
    last = records(many)[-1]
    evaluated = evaluate_run(many)
    assert evaluated["error"] == last["test_error"]
    assert evaluated["loss"] == pytest.approx(last["test_loss"], rel=1e-4)

    # What several hosts wrote is resumed by one process, on as many devices and on others.
    stats = final_state(PROGRAMS[4], config, only_half(many, tmp_path / "half")).batch_stats
    pooled = jax.device_get(pool_batch_stats(jax.tree.map(jnp.asarray, stats)))
    for count, programs in PROGRAMS.items():
        state = final_state(programs, config, tmp_path / "half")
        for path, found in traverse_util.flatten_dict(state.batch_stats).items():
            of_4, of_all = (traverse_util.flatten_dict(tree)[path] for tree in (stats, pooled))
            of_all = of_4[0] if sync == "sync" else of_all
            expected = of_4 if count == 4 else np.stack([of_all] * count)
            np.testing.assert_array_equal(found, expected)
        if count == 4 or sync == "sync":
            resumed = only_half(many, tmp_path / f"resumed{count}")
            train(config, resumed, programs=programs)
            assert_same_run(records(tmp_path / "one"), records(resumed))


@pytest.mark.slow
def test_hosts_resume_what_one_process_started_and_share_groups(data_dir, tmp_path):
    # Groups of two devices, which are of two hosts each.
    config = config_of(data_dir, **{"norm.sync": "group"})
    train(config, tmp_path / "one", programs=PROGRAMS[4])
    many = only_half(tmp_path / "one", tmp_path / "many")
    run_on_hosts(by_flags(4), config, many, devices=1)
    assert_same_run(records(tmp_path / "one"), records(many))
    state = final_state(PROGRAMS[4], config, many)
    assert_close(final_state(PROGRAMS[4], config, tmp_path / "one"), state)
    means = state.batch_stats["MemorizedBatchNorm_0"]["mean"]
    assert (means[0] == means[1]).all()
    assert (means[1] != means[2]).any()


@pytest.mark.slow
def test_hosts_resume_in_a_bucket(data_dir, tmp_path, bucket):
    """Each has a copy of its own, which the others do not see; one checkpoint is not sealed."""
    config = config_of(data_dir)
    programs = Programs(jax.devices()[:2])
    train(config, tmp_path / "one", programs=programs)
    write_config(config, tmp_path / "config.py")
    address = f"{bucket}/hosts"
    with pytest.raises(StoppedError):
        train(config, address, programs=programs, stop_asked=lambda first, last: last == 7)
    with local_copy(address) as found:  # As a copy that was cut short leaves it.
        unsealed = found.folder / CHECKPOINTS / "12"
        shutil.copytree(found.folder / CHECKPOINTS / "7", unsealed)
        (unsealed / SEAL).unlink()
        found.store(12)
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    arguments = [f"--config={tmp_path / 'config.py'}", f"--workdir={address}"]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "mbn_jax.main", *arguments, *host],
            env=os.environ | {"XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host, _ in by_flags(2)
    ]
    told = [(*process.communicate(timeout=300), process.returncode) for process in started]
    assert [status for _, _, status in told] == [0, 0], told
    assert "test error" in told[0][0]
    assert "Skipped the checkpoint of step 12: it was not finished" in told[0][1]
    with local_copy(address) as found:
        assert_same_run(records(tmp_path / "one"), records(found.folder))
        steps = sorted(path.name for path in (found.folder / CHECKPOINTS).iterdir())
        assert steps == ["12", "6"]


@pytest.mark.slow
def test_where_one_host_cannot_start_none_does(data_dir, tmp_path):
    config = config_of(data_dir)
    results = start(by_flags(2), config, [tmp_path / "first", tmp_path / "other"], [1, 1])
    assert [status for _, _, status in results] == [2, 2]
    said = [err.splitlines()[-1] for _, err, _ in results]
    assert said[0] == "mbn-train: Host 1 cannot continue; fix what its own message says."
    assert said[1].startswith("mbn-train: Host 1 does not find what the first host wrote to")


def test_hosts_with_more_and_fewer_devices_do_not_start(data_dir, tmp_path):
    results = start(by_flags(2), config_of(data_dir), [tmp_path / "run"] * 2, [1, 2])
    assert [status for _, _, status in results] == [2, 2]
    said = {err.splitlines()[-1].split(";")[0] for _, err, _ in results}
    assert said == {
        "mbn-train: All hosts need as many devices, got [1, 2], in the order of the hosts"
    }


def test_hosts_with_other_data_do_not_start(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    other = np.array([320, 98])
    monkeypatch.setattr(
        multihost_utils, "process_allgather", lambda numbers: np.stack([numbers, other])
    )
    check_alike(training_examples=320, test_examples=98)
    with pytest.raises(UserError, match=r"differ in test_examples, \[99, 98\] in their order"):
        check_alike(training_examples=320, test_examples=99)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("host", [0, 1])
def test_hosts_go_one_after_the_other_or_together_and_fail_as_one(monkeypatch, host, together):
    events = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: host)
    monkeypatch.setattr(multihost_utils, "sync_global_devices", lambda _: events.append("waits"))
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda x: np.array([x, True]))
    with (
        pytest.raises(UserError, match="Host 1 cannot continue"),
        first_host_first(together=together),
    ):
        events.append("opens")
    first, second = ["opens", "waits"], ["waits", "opens"]
    assert events == (["opens"] if together else second if host else first)


def test_several_hosts_of_cpus_keep_no_compiled_programs(monkeypatch):
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    try:
        keep_compiled_programs()
        assert not jax.config.jax_enable_compilation_cache
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


SHELL = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[001-004]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("variables", "processes"),
    [
        ({}, None),
        # The script of a job, and the shell of `salloc` (a step of one): alone.
        (SHELL, None),
        (SHELL | {"SLURM_STEP_NUM_TASKS": "1"}, 1),
        (SHELL | {"SLURM_STEP_NUM_TASKS": "4"}, 4),
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:3", "OMPI_COMM_WORLD_SIZE": "2"}, None),
        (
            {
                "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:3",
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_RANK": "1",
            },
            2,
        ),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, 1),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d", "MEGASCALE_NUM_SLICES": ""}, 4),
    ],
)
def test_what_a_launcher_says(variables, processes, monkeypatch):
    assert launched_processes(variables) == processes
    joined = []
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *named, **timeouts: joined.append(named)
    )
    monkeypatch.setattr(os, "environ", variables)
    join_hosts(None)
    assert joined == ([(None, processes, None)] if (processes or 1) > 1 else [])
    join_hosts(False)
    assert len(joined) <= 1
    join_hosts(True)
    assert joined[-1] == (None, processes, None)
