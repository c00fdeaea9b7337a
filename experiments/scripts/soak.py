"""Kills a run repeatedly, and compares it with an undisturbed one.

    python experiments/scripts/soak.py --workdir=runs/soak --kills=30 --seed=0

One run on digits is undisturbed. Another with the same config gets SIGKILL at moments drawn by the
seed: while it starts, in training, within a save, and between a checkpoint and its checksums
(training goes on during both); each time the same command resumes it. Then parameters, statistics,
optimizer and records (except times) must be equal to the bit, with no record missing or duplicated.
Otherwise the exit status is 1.
About 2 minutes on 2 CPU cores. Result: docs/results/survival.md.
"""

import argparse
import collections
import pathlib
import random
import subprocess
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np

from mbn_jax.parallel.devices import first_device
from mbn_jax.training.checkpoints import UNFINISHED, Checkpoints
from mbn_jax.training.program import Programs
from mbn_jax.training.reporting import METRICS, read_metrics
from mbn_jax.training.seal import SEAL
from mbn_jax.training.workdir import CHECKPOINTS, load_config

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "digits.py"
FIELDS = {
    "batch_size": 16,
    "num_epochs": 25.0,
    "log_every_steps": 10,
    "eval_every_steps": 100,
    "checkpoint_every_steps": 25,
}
AIMS = {"start": 2, "training": 4, "save": 5, "seal": 4}
"""Where a kill is aimed at, and how often in proportion."""

LONGEST_SAVE = 0.15
"""Seconds, about."""

MOST_SAVES = 3
"""That a run may end before it is killed in another."""

TIMES = {"images_per_second"}


def command(workdir: pathlib.Path, overrides: list[str]) -> list[str]:
    """Returns the command of a run."""
    fields = [f"--config.{name}={value}" for name, value in FIELDS.items()]
    options = [f"--config={CONFIG}", f"--workdir={workdir}", *fields, *overrides]
    return [sys.executable, "-m", "mbn_jax.main", *options]


class Watched:
    """A run in a process of its own, and what can be seen of it from outside."""

    def __init__(self, workdir: pathlib.Path, overrides: list[str]):
        """Starts it, or goes on with it."""
        self._workdir = workdir
        self._before = self._saves()
        self._records_before = self._records()
        self.process = subprocess.Popen(
            command(workdir, overrides), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def _saves(self) -> set[tuple[str, bool, int]]:
        """Returns what there is of checkpoints: name, whether it is sealed, and identity."""
        found = set()
        for path in (self._workdir / CHECKPOINTS).glob("*"):
            try:
                found.add((path.name, (path / SEAL).exists(), path.stat().st_ino))
            except FileNotFoundError:  # Renamed meanwhile.
                continue
        return found

    def _records(self) -> int | None:
        """Returns which file of records there is: training begins with a new one."""
        try:
            return (self._workdir / METRICS).stat().st_ino
        except FileNotFoundError:
            return None

    def is_training(self) -> bool:
        """Whether it trains, or compiles what it trains with."""
        return self._records() != self._records_before

    def saves(self) -> int:
        """Returns how many checkpoints were written and sealed, of those that are kept."""
        return sum(name.isdigit() and sealed for name, sealed, _ in self._new_saves())

    def is_saving(self) -> bool:
        """Whether a checkpoint is half written."""
        return any(pathlib.PurePath(n).match(UNFINISHED) for n, *_ in self._new_saves())

    def is_sealing(self) -> bool:
        """Whether the newest checkpoint is written, and not sealed."""
        saves = {int(name): sealed for name, sealed, _ in self._new_saves() if name.isdigit()}
        return bool(saves) and not saves[max(saves)]

    def is_deleting(self) -> bool:
        """Whether an older checkpoint has no seal any more."""
        saves = {int(name): sealed for name, sealed, _ in self._saves() if name.isdigit()}
        return any(not sealed for step, sealed in saves.items() if step < max(saves))

    def _new_saves(self) -> set[tuple[str, bool, int]]:
        return self._saves() - self._before

    def wait_until(self, condition) -> None:
        """Waits, as long as it runs."""
        while self.process.poll() is None and not condition():
            time.sleep(0.0002)

    def where(self) -> str:
        """Returns in words where a kill hit it."""
        if self.is_sealing():
            return "between a checkpoint and its seal"
        if self.is_saving():
            return "within a save"
        if self.is_deleting():
            return "while an old checkpoint is deleted"
        if not self.is_training():
            return "before training"
        if not self._new_saves():
            return "in training, before the first save"
        return "in training, after a save"


def kill_somewhere(run: Watched, rng: random.Random, seconds_to_train: float) -> str | None:
    """Kills a run; returns where that hit it, or None where it was done before."""
    aim = rng.choices(list(AIMS), list(AIMS.values()))[0]
    if aim != "start":
        run.wait_until(run.is_training)
    if aim in ("start", "training"):
        time.sleep(rng.uniform(0, seconds_to_train))
    else:
        done = rng.randrange(MOST_SAVES)
        run.wait_until(lambda: run.saves() >= done)
    if aim == "save":
        run.wait_until(run.is_saving)
        time.sleep(rng.uniform(0, LONGEST_SAVE))
    if aim == "seal":
        run.wait_until(run.is_sealing)
    run.process.kill()
    output, _ = run.process.communicate()
    if run.process.returncode == 0:
        return None
    if run.process.returncode > 0:
        raise SystemExit(f"The run failed, and not by the kill:\n{output.decode()}")
    return run.where()


def differences(whole: pathlib.Path, killed: pathlib.Path) -> Iterator[str]:
    """Yields in words what two finished runs differ in."""
    records = [
        [{k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(workdir)]
        for workdir in (whole, killed)
    ]
    steps = [record["step"] for record in records[1]]
    if steps != sorted(set(steps)):
        yield "there are records twice, or out of order"
    if records[0] != records[1]:
        yield f"the records differ, {len(records[0])} and {len(records[1])}"
    config = load_config(whole)
    program = Programs().get(config)
    states = []
    for workdir in (whole, killed):
        checkpoints = Checkpoints(workdir / CHECKPOINTS)
        state = checkpoints.restore(
            program.init_state(config), local_statistics=program.task.local_statistics
        )
        checkpoints.close()
        if state is None:
            raise SystemExit(f"{workdir} has no valid checkpoint.")
        state = first_device(state)
        states.append(jax.device_get(state.replace(key=jax.random.key_data(state.key))))
    for (path, one), (_, other) in zip(
        *(jax.tree_util.tree_leaves_with_path(state) for state in states), strict=True
    ):
        if np.asarray(one).tobytes() != np.asarray(other).tobytes():
            yield f"{jax.tree_util.keystr(path)} differs"


def main() -> None:
    """Runs both, and prints what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args, overrides = parser.parse_known_args()
    whole, killed = args.workdir / "whole", args.workdir / "killed"
    if whole.exists() or killed.exists():
        parser.error(f"{args.workdir} has an earlier soak; give a new --workdir.")
    begin = time.monotonic()
    run = Watched(whole, overrides)
    run.wait_until(lambda: run.is_training() and read_metrics(whole))
    seconds_to_train = time.monotonic() - begin
    output, _ = run.process.communicate()
    if run.process.returncode:
        raise SystemExit(output.decode())
    print(f"undisturbed: {time.monotonic() - begin:.0f} s", flush=True)

    rng = random.Random(args.seed)
    hits: collections.Counter[str] = collections.Counter()
    begin = time.monotonic()
    for number in range(1, args.kills + 1):
        hit = kill_somewhere(Watched(killed, overrides), rng, seconds_to_train)
        if hit is None:
            raise SystemExit(f"Done before kill {number}; raise --config.num_epochs.")
        hits[hit] += 1
        records = read_metrics(killed) or [{"step": 0}]
        print(f"kill {number} at step {records[-1]['step']}, {hit}", flush=True)
    last = subprocess.run(command(killed, overrides), capture_output=True, text=True)
    if last.returncode:
        raise SystemExit(last.stderr)
    print(f"killed {args.kills} times: {time.monotonic() - begin:.0f} s")
    for where, count in hits.most_common():
        print(f"{count:4} {where}")
    found = list(differences(whole, killed))
    print("\n".join(found) or f"no difference in {len(read_metrics(whole))} records and the state")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
