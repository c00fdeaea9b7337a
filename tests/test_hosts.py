"""Several processes on this machine stand in for hosts: the same run as in one process."""

import json
import os
import socket
import subprocess
import sys

import pytest

from mbn_jax.config import default_config


def write_config(data_dir, path, **fields):
    config = default_config()
    config.update_from_flattened_dict(
        {
            "dataset.data_dir": data_dir,
            "dataset.train_split": "train[:320]",
            "dataset.test_split": "test[:99]",
            "dataset.crop_padding": 1,
            "model.features": (8, 8),
            "batch_size": 16,
            "num_epochs": 0.6,
            "log_every_steps": 3,
            "eval_every_steps": 6,
            "checkpoint_every_steps": 6,
            **fields,
        }
    )
    path.write_text(
        "import json\nfrom ml_collections import ConfigDict\n"
        f"def get_config():\n  return ConfigDict(json.loads({config.to_json()!r}))\n"
    )


def run(config, workdir, processes, devices):
    """Trains on so many processes with so many devices each; returns the records without times."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "mbn_jax.main", f"--config={config}", f"--workdir={workdir}"]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    started = []
    for i in range(processes):
        hosts = [f"--coordinator_address={address}", f"--num_processes={processes}"]
        started.append(
            subprocess.Popen(
                command + ([*hosts, f"--process_id={i}"] if processes > 1 else []),
                env=os.environ | {"XLA_FLAGS": flags},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    results = [(*process.communicate(timeout=300), process.returncode) for process in started]
    assert [status for _, _, status in results] == [0] * processes, results
    # One host speaks for all.
    assert ["test error" in out for out, _, _ in results] == [True] + [False] * (processes - 1)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k != "images_per_second"} for line in lines
    ]


@pytest.mark.parametrize(("runtime", "sync"), [("pmap", "local"), ("shard_map", "sync")])
def test_two_hosts_of_two_devices_equal_one_of_four(data_dir, tmp_path, sync, runtime):
    write_config(data_dir, tmp_path / "config.py", **{"norm.sync": sync, "runtime": runtime})
    one = run(tmp_path / "config.py", tmp_path / "one", processes=1, devices=4)
    two = run(tmp_path / "config.py", tmp_path / "two", processes=2, devices=2)
    assert [record["step"] for record in one] == [3, 6, 9, 12]
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        # Collectives between processes add in another order: float32, twelve steps.
        assert a == pytest.approx(b, rel=1e-3)
    checkpoints = sorted(path.name for path in (tmp_path / "two" / "checkpoints").glob("[0-9]*"))
    assert checkpoints == ["12", "6"]
