"""What the first command costs: the time from the command to the first training step.

    python experiments/scripts/start_cost.py --config=configs/digits.py

Starts `mbn-train` in a process of its own whose home folder is empty, so that nothing is compiled
and no data set prepared; then once more in that home. Each is stopped at its first record, which
follows the first step. Further arguments are those of mbn-train; run in another checkout, it
measures that one. Prints the median of the seconds that passed with quartiles, and the
median of those on processors. Result: docs/results/loop.md.
"""

import argparse
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np

CACHES = ("XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR", "TFDS_DATA_DIR")


def seconds_to_first_step(arguments: list[str], home: str) -> tuple[float, float]:
    """Starts a run, and stops it at its first record.

    Returns:
      The seconds that passed, and those on processors.

    Raises:
      RuntimeError: where the run ends without a record.
    """
    env = {name: value for name, value in os.environ.items() if name not in CACHES}
    with tempfile.TemporaryDirectory(dir=home) as workdir, tempfile.TemporaryFile("w+") as output:
        flags = [f"--workdir={workdir}", "--config.log_every_steps=1"]
        begin, used = time.perf_counter(), processor_seconds()
        run = subprocess.Popen(
            [sys.executable, "-m", "mbn_jax.main", *arguments, *flags],
            env=env | {"HOME": home},
            stdout=output,
            stderr=output,
        )
        try:
            records = pathlib.Path(workdir, "metrics.jsonl")
            while not (records.exists() and records.stat().st_size):
                if run.poll() is not None:
                    output.seek(0)
                    raise RuntimeError(f"the run ended before its first step: {output.read()}")
                time.sleep(0.002)
            passed = time.perf_counter() - begin
        finally:
            run.kill()
            run.wait()
    return passed, processor_seconds() - used


def processor_seconds() -> float:
    """Returns the processor time of the processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Prints a table as Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    args, arguments = parser.parse_known_args()
    times = []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as home:
            times.append([seconds_to_first_step(arguments, home) for _ in range(2)])
    print("| command | seconds to the first step | quartiles | on processors |")
    print("| --- | --- | --- | --- |")
    for name, (passed, used) in zip(
        ("first", "second"), np.array(times).transpose(1, 2, 0), strict=True
    ):
        low, median, high = np.quantile(passed, (0.25, 0.5, 0.75))
        print(f"| {name} | {median:.2f} | {low:.2f} to {high:.2f} | {np.median(used):.2f} |")


if __name__ == "__main__":
    main()
