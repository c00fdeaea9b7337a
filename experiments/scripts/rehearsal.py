"""Rehearses a pod run with processes of this machine for hosts, and compares it with one process.

    python experiments/scripts/rehearsal.py --workdir=runs/rehearsal

`configs/imagenet.py` with a small network and small images trains on images in the layout of
ImageNet, on eight CPU devices in all:

| run | processes x devices | what happens |
| --- | --- | --- |
| whole | 4 x 2 | nothing |
| stopped | 4 x 2 | one process gets SIGTERM |
| resumed on four | 4 x 2 | goes on from there: equal to `whole`, to the bit |
| resumed on two | 2 x 4 | goes on from there: equal within rounding |
| one | 1 x 8 | nothing: equal within rounding |

Then `whole` is evaluated again: by `mbn-eval` in one process, and with its statistics folded into
flax's `BatchNorm`. Collectives between processes add in another order than those within one, and
one device adds larger batches, so numbers differ by rounding (`TOLERANCE`). The script prints what
the first process of each run said and where the time to the first step went, and exits with status
1 if any number is off. 15 to 30 minutes on 2 busy CPU cores.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import photographs
import tensorflow_datasets as tfds
from PIL import Image

from mbn_jax import to_batch_norm
from mbn_jax.errors import ExitStatus
from mbn_jax.parallel.devices import replicate
from mbn_jax.training.checkpoints import Checkpoints
from mbn_jax.training.config_files import with_fields
from mbn_jax.training.passes import evaluate
from mbn_jax.training.program import Programs
from mbn_jax.training.reporting import read_metrics
from mbn_jax.training.saved_statistics import pooled
from mbn_jax.training.workdir import CHECKPOINTS, load_config

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "imagenet.py"
FIELDS = {
    "model.name": "convnet",
    "model.features": "(16, 32)",
    "dataset.image_size": 32,
    "dataset.num_workers": 1,
    "batch_size": 64,
    "num_epochs": 1.0,
    "schedule.warmup_epochs": 0.25,
    "recalibrate_batches": 1,
    "log_every_steps": 1,
}
TRAIN, VALIDATION = 768, 50_000
THUMBNAILS = 100
"""Different images to evaluate on: decoding them must not take long."""

STOP_AFTER = 4
"""Records, before a process gets SIGTERM."""

TOLERANCE = 1e-3
"""Relative. Steps amplify rounding; 4e-5 to 1e-4 was measured in the tests of hosts."""

TIMES = {"images_per_second"}


def write_data(folder: pathlib.Path) -> None:
    """Writes the data set of `photographs`, but a validation split of many small images."""
    with tfds.core.registered.skip_registration():  # The name is taken.

        class Imagenet2012(photographs.Imagenet2012):
            """Its training images of ImageNet's sizes; to evaluate on, thumbnails."""

            def _generate_examples(self, start, stop):
                if start == 0:
                    yield from super()._generate_examples(start, stop)
                    return
                small = [thumbnail(photographs.photograph(i)) for i in range(THUMBNAILS)]
                for i in range(start, stop):
                    image = io.BytesIO(small[i % THUMBNAILS])
                    yield i, {"image": image, "label": i % 1000, "file_name": f"{i}.JPEG"}

    tfds.disable_progress_bar()
    options = {"num_train": TRAIN, "num_validation": VALIDATION}
    builder = Imagenet2012(**options, data_dir=folder, file_format="array_record")
    builder.download_and_prepare()


def thumbnail(jpeg: bytes) -> bytes:
    """Returns a JPEG that fits 64 by 64 pixels."""
    image = Image.open(io.BytesIO(jpeg))
    image.thumbnail((64, 64))
    file = io.BytesIO()
    image.save(file, "jpeg")
    return file.getvalue()


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the rehearsal happens, and what every process of it is told."""

    folder: pathlib.Path
    overrides: list[str]

    def environment(self, devices: int) -> dict[str, str]:
        """Returns the variables of a process with so many devices."""
        flags = f"--xla_force_host_platform_device_count={devices}"
        return {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            # The processes of a busy machine may keep each other waiting for long.
            "XLA_FLAGS": f"{flags} --xla_cpu_collective_call_terminate_timeout_seconds=600",
            "JAX_ENABLE_COMPILATION_CACHE": "0",  # So that the times can be compared.
        }

    def start(self, name: str, hosts: int, devices: int) -> "Hosts":
        """Starts `mbn-train` in so many processes of so many devices, or goes on with a run."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        fields = {**FIELDS, "dataset.data_dir": str(self.folder / "data")}
        words = [
            *(sys.executable, "-m", "mbn_jax.main", f"--config={CONFIG}"),
            f"--workdir={self.folder / name}",
            *(f"--config.{field}={value}" for field, value in fields.items()),
            *self.overrides,
        ]
        if hosts > 1:
            words += [f"--coordinator_address={address}", f"--num_processes={hosts}"]
        processes = []
        for host in range(hosts):
            log = self.folder / f"{name}.host{host}.log"
            with log.open("w") as output:
                process = subprocess.Popen(
                    [*words, *([f"--process_id={host}"] if hosts > 1 else [])],
                    env=self.environment(devices),
                    stdout=output,
                    stderr=output,
                    start_new_session=True,  # A group of its own, of it and its workers.
                )
            processes.append((process, log))
        return Hosts(name, devices, self.folder / name, processes)

    def evaluate(self, name: str) -> dict[str, float]:
        """Returns what `mbn-eval` prints, in one process."""
        code = "from mbn_jax.main import eval_main; eval_main()"
        done = subprocess.run(
            [sys.executable, "-c", code, f"--workdir={self.folder / name}"],
            env=self.environment(8),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        return json.loads(done.stdout)


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The processes of one run, each with its log."""

    name: str
    devices: int
    workdir: pathlib.Path
    processes: list[tuple[subprocess.Popen, pathlib.Path]]

    def preempt(self, host: int, after: int) -> None:
        """Sends SIGTERM to a host, workers included, when the run has so many records."""
        while len(read_metrics(self.workdir)) < after:
            if any(process.poll() is not None for process, _ in self.processes):
                self.end(ExitStatus.STOPPED)
            time.sleep(0.05)
        os.killpg(self.processes[host][0].pid, signal.SIGTERM)

    def end(self, status: int) -> None:
        """Waits for all processes; ends the rehearsal where one ends with another status."""
        found = [process.wait() for process, _ in self.processes]
        said = [log.read_text() for _, log in self.processes]
        print(f"\n{self.name}: {len(found)} x {self.devices}, exit statuses {found}")
        print("\n".join(line for line in said[0].splitlines() if "[Gloo]" not in line), flush=True)
        if set(found) != {int(status)}:
            raise SystemExit(f"\nExpected {int(status)} of all; the last log:\n{said[-1]}")


def phases(log: pathlib.Path) -> dict[str, float]:
    """Returns where the time to the first step went, as the run printed it."""
    [(total, parts)] = re.findall(r"first step done after ([\d.]+) s: (.*)", log.read_text())
    named = re.findall(r"([a-z ]+) ([\d.]+)(?:[,;]|$)", parts.replace("of these, ", ""))
    return {name.strip(): float(seconds) for name, seconds in named} | {"all": float(total)}


def records(workdir: pathlib.Path) -> list[dict[str, float]]:
    """Returns the records of a run, times apart."""
    return [{k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(workdir)]


def weights(workdir: pathlib.Path) -> tuple[Any, Any]:
    """Returns parameters and statistics of a run's newest checkpoint."""
    with contextlib.closing(Checkpoints(workdir / CHECKPOINTS)) as checkpoints:
        found = checkpoints.weights()
    if found is None:
        raise SystemExit(f"{workdir} has no valid checkpoint.")
    return found


def evaluate_folded(workdir: pathlib.Path) -> dict[str, float]:
    """Evaluates the network of a run with flax's `BatchNorm` in place of its norm."""
    params, stats = weights(workdir)
    folded = to_batch_norm({"params": params, "batch_stats": pooled(stats)})
    fields = {"norm.name": "batch", "double_forward": "off"}
    config = with_fields(load_config(workdir), fields, "the fold")
    program = Programs(jax.local_devices()[:1]).get(config)
    state = program.init_state(config).replace(**folded)
    return evaluate(program, config, replicate(state, program.devices))


def differences(one: pathlib.Path, other: pathlib.Path) -> dict[str, float]:
    """Returns how far two runs are apart: losses relative, errors in examples, weights relative."""
    a, b = records(one), records(other)
    if [r.keys() for r in a] != [r.keys() for r in b]:
        raise SystemExit(f"{one} and {other} have other records.")
    apart = {"losses": 0.0, "errors": 0.0}
    for x, y in zip(a, b, strict=True):
        for name in x.keys() - {"step"}:
            if name.endswith("error"):
                apart["errors"] = max(apart["errors"], abs(x[name] - y[name]))
            else:
                apart["losses"] = max(apart["losses"], abs(x[name] / y[name] - 1))
    pairs = zip(*(map(np.asarray, jax.tree.leaves(weights(w))) for w in (one, other)), strict=True)
    return apart | {
        "weights": max(
            float(np.linalg.norm(x - y)) / max(float(np.linalg.norm(x)), 1e-6) for x, y in pairs
        )
    }


def rehearse(place: Place) -> None:
    """Runs everything in turn."""
    folder = place.folder
    place.start("whole", 4, 2).end(ExitStatus.DONE)
    stopped = place.start("stopped", 4, 2)
    stopped.preempt(host=2, after=STOP_AFTER)
    stopped.end(ExitStatus.STOPPED)
    for name, hosts, devices in (("resumed on four", 4, 2), ("resumed on two", 2, 4)):
        shutil.copytree(folder / "stopped", folder / name)
        place.start(name, hosts, devices).end(ExitStatus.DONE)
    place.start("one", 1, 8).end(ExitStatus.DONE)


def compare(place: Place) -> list[str]:
    """Prints how equal the runs are; returns in sentences what is off."""
    folder = place.folder
    print("\n| compared with `whole` | losses | errors | weights |\n| --- | --- | --- | --- |")
    off = []
    for name in ("resumed on four", "resumed on two", "one"):
        apart = differences(folder / "whole", folder / name)
        print(f"| {name} | {' | '.join(f'{x:.1e}' for x in apart.values())} |")
        if max(apart.values()) > (0 if name == "resumed on four" else TOLERANCE):
            off.append(f"{name} is not equal to whole: {apart}")
    last = records(folder / "whole")[-1]
    for way, found in (
        ("mbn-eval in one process", place.evaluate("whole")),
        ("folded into BatchNorm, on one device", evaluate_folded(folder / "whole")),
    ):
        print(f"\n{way}: {json.dumps(found)}")
        for name in ("loss", "error"):
            if abs(found[name] - last[f"test_{name}"]) > TOLERANCE * last[f"test_{name}"]:
                off.append(f"{way}: {name} {found[name]}, not {last[f'test_{name}']}")
    return off


def main() -> None:
    """Makes the data, runs everything, and prints what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    args, overrides = parser.parse_known_args()
    jax.config.update("jax_platforms", "cpu")
    place = Place(args.workdir.absolute(), overrides)
    if (place.folder / "whole").exists():
        parser.error(f"{args.workdir} has an earlier rehearsal; give a new --workdir.")
    if not (place.folder / "data").exists():
        write_data(place.folder / "data")
    rehearse(place)
    off = compare(place)
    names = ("whole", "resumed on four", "resumed on two", "one")
    found = {name: phases(place.folder / f"{name}.host0.log") for name in names}
    columns = list(found["whole"])
    print(f"\n| seconds to the first step | {' | '.join(columns)} |")
    print(f"| --- |{' --- |' * len(columns)}")
    for name, seconds in found.items():
        print(f"| {name} | {' | '.join(f'{x:.1f}' for x in seconds.values())} |")
    print("\n" + ("\n".join(off) or "All is as it should be."))
    sys.exit(1 if off else 0)


if __name__ == "__main__":
    main()
