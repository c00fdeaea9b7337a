"""The commands: flags, one call, one sentence for a mistake."""

import argparse
import json
import os
import pathlib
import re
import sys
import threading
import traceback
from collections.abc import Callable, Sequence

import jax
from absl import logging

from mbn_jax.errors import UserError
from mbn_jax.extras import require_train_extra
from mbn_jax.parallel.hosts import HEARTBEAT_TIMEOUT, join_hosts
from mbn_jax.parallel.preemption import StoppedError, stop_on_sigterm

EXAMPLE_CONFIG = "configs/digits.py"
EXAMPLE = f"mbn-train --config={EXAMPLE_CONFIG} --workdir=runs/digits"
SWEEP_EXAMPLE = "mbn-sweep experiments/memory_size.py --workdir=runs/memory_size"
FAILED = 1
USER_MISTAKE = 2
DIVERGED = 3
STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: schedulers can be told to run such a command again."""

SECONDS_TO_LEAVE = 10.0
"""After an error, for the other hosts to have it too."""

LOST_HOST = re.compile(
    r"gloo|nccl|UNAVAILABLE|DEADLINE_EXCEEDED|coordination service", re.IGNORECASE
)
"""In errors of JAX that are about another host, once there are any."""


def train_command(argv: Sequence[str]) -> int:
    """Runs `mbn-train` with these arguments; returns its exit status, raises UserError."""
    parser = argparse.ArgumentParser(
        prog="mbn-train",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Trains a network as a config file says. The same command again resumes.",
        epilog=f"""examples:
  {EXAMPLE}
  mbn-train --config={EXAMPLE_CONFIG} --workdir=runs/batch --config.norm.name=batch \\
      --config.double_forward=off
  mbn-train --config={EXAMPLE_CONFIG} --workdir=runs/k8 --config.norm.memory_size=8

Every field of mbn_jax/training/config.py can be set with --config.FIELD=VALUE. In the workdir:
config.json, metrics.jsonl (one record a line), TensorBoard events, checkpoints/ and curves.png.
Exit status: 0 done, {USER_MISTAKE} a mistake in the input or a workdir that cannot be written,
{DIVERGED} the loss was not finite, {STOPPED} stopped by SIGTERM and saved, or another host is gone:
run it again, 130 interrupted.""",
    )
    parser.add_argument("--config", help="config file, a Python file with get_config()")
    parser.add_argument("--workdir", help="folder of the run; made if missing")
    parser.add_argument(
        "--config.FIELD", metavar="VALUE", dest="field", help="sets a field of the config"
    )
    hosts = parser.add_argument_group(
        "several hosts", "The same command on each, with a --workdir that all of them see."
    )
    hosts.add_argument(
        "--distributed",
        action=argparse.BooleanOptionalAction,
        help="find the others by the cluster (needed on a TPU pod of Compute Engine); default: "
        "where srun, mpirun or Kubernetes launched several",
    )
    hosts.add_argument("--coordinator_address", help="or name the first one, HOST:PORT,")
    hosts.add_argument("--num_processes", type=int, help="how many there are,")
    hosts.add_argument("--process_id", type=int, help="and which one this is, from 0")
    hosts.add_argument(
        "--heartbeat_timeout",
        type=int,
        default=HEARTBEAT_TIMEOUT,
        metavar="SECONDS",
        help="after which a silent host counts as gone, and the others end (default: %(default)s)",
    )
    args, overrides = parser.parse_known_args(argv)
    if not args.config:
        raise UserError(f"--config is missing; one that works: {EXAMPLE}")
    if not args.workdir:
        raise UserError(
            f"--workdir is missing, the folder for what the run writes; for example: {EXAMPLE}"
        )
    workdir = _folder(args.workdir)
    from mbn_jax.training.config_files import parse_config

    config = parse_config(args.config, overrides)
    join_hosts(
        args.distributed,
        args.coordinator_address,
        args.num_processes,
        args.process_id,
        args.heartbeat_timeout,
    )

    from mbn_jax.training.divergence import DivergenceError  # Slow to import: TFDS, Orbax.
    from mbn_jax.training.loop import run_title, train

    try:
        with stop_on_sigterm() as stop_asked:
            values = train(config, workdir, stop_asked=stop_asked)
    except DivergenceError as error:
        print(f"mbn-train: {error}", file=sys.stderr)
        return DIVERGED
    if "test_error" not in values:
        raise UserError(
            f"{args.workdir} is a finished run without its metrics.jsonl; evaluate it with "
            f"mbn-eval --workdir={args.workdir}"
        )
    if jax.process_index() == 0:
        recalibrated = ""
        if "recalibrated_test_error" in values:
            recalibrated = f" ({values['recalibrated_test_error']:.2%} recalibrated)"
        print(
            f"{run_title(config)}: test error {values['test_error']:.2%}{recalibrated}, test loss "
            f"{values['test_loss']:.4f} after {values['step']} steps; see "
            f"{args.workdir}/curves.png"
        )
    return 0


def sweep_command(argv: Sequence[str]) -> int:
    """Runs `mbn-sweep` with these arguments; returns its exit status, raises UserError."""
    parser = argparse.ArgumentParser(
        prog="mbn-sweep",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Runs all members of an experiment that are not done yet.",
        epilog=f"""examples:
  {SWEEP_EXAMPLE} --dry_run
  {SWEEP_EXAMPLE}
  mbn-report runs/memory_size

The same command again goes on with what is missing; in another shell or on another machine at the
same time, it shares the work. In the workdir: members/ (a run each), sweep.db (an Optuna study),
results.csv, results.parquet, and what mbn-report writes.""",
    )
    parser.add_argument("experiment", help="a Python file with get_sweep()")
    parser.add_argument("--workdir", help="folder of the sweep; made if missing")
    parser.add_argument("--seeds", type=int, help="how many; default: what the file says")
    parser.add_argument("--dry_run", action="store_true", help="show the members and the time")
    parser.add_argument("--retry_failed", action="store_true", help="run failed members again")
    parser.add_argument(
        "--storage", help="database for several machines, postgresql://...; default: in the workdir"
    )
    parser.add_argument(
        "--config.FIELD", metavar="VALUE", dest="field", help="sets a field for all members"
    )
    args, overrides = parser.parse_known_args(argv)
    if not args.workdir:
        raise UserError(f"--workdir is missing; for example: {SWEEP_EXAMPLE}")

    from mbn_jax.sweeps.command import (  # Slow to import: Optuna, pandas.
        dry_run,
        open_sweep,
        run_sweep,
    )

    workdir = _folder(args.workdir)
    if args.dry_run:
        print(dry_run(args.experiment, overrides, args.seeds, workdir))
        return 0
    runner, study = open_sweep(
        args.experiment,
        overrides,
        args.seeds,
        workdir,
        args.storage,
        retry_failed=args.retry_failed,
    )
    outcomes = run_sweep(workdir, runner, study)
    told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    print(f"{told}; results in {args.workdir}/results.csv, report in {args.workdir}/report.html")
    return FAILED if outcomes["failed"] else 0


def report_command(argv: Sequence[str]) -> int:
    """Runs `mbn-report` with these arguments; returns its exit status, raises UserError."""
    parser = argparse.ArgumentParser(
        prog="mbn-report",
        allow_abbrev=False,
        description="Writes the report of a sweep, as far as it is: report.html, report.md, "
        "figures/, results.csv and results.parquet.",
    )
    parser.add_argument("workdir", help="folder of mbn-sweep")
    parser.add_argument("--storage", help="the database, where mbn-sweep was given one")
    args = parser.parse_args(argv)

    from mbn_jax.sweeps.command import report_sweep

    print(report_sweep(_folder(args.workdir), args.storage))
    return 0


def eval_command(argv: Sequence[str]) -> int:
    """Runs `mbn-eval` with these arguments; returns its exit status, raises UserError."""
    parser = argparse.ArgumentParser(
        prog="mbn-eval",
        allow_abbrev=False,
        description="Evaluates the newest checkpoint of a run, and prints one JSON object.",
    )
    parser.add_argument("--workdir", required=True, help="folder of a run of mbn-train")
    parser.add_argument(
        "--split", help="TFDS split, for example train[:10%%]; default: the test split"
    )
    parser.add_argument(
        "--recalibrate_batches",
        type=int,
        default=0,
        metavar="N",
        help="by the statistics of N batches of training examples (of eval_batch_size each), not "
        "by those of the run",
    )
    args = parser.parse_args(argv)

    if args.recalibrate_batches < 0:
        raise UserError(f"--recalibrate_batches must be 0 or more, got {args.recalibrate_batches}.")

    from mbn_jax.training.evaluation import evaluate_run

    values = evaluate_run(
        _folder(args.workdir), args.split, recalibrate_batches=args.recalibrate_batches
    )
    print(json.dumps(values))
    return 0


def _folder(workdir: str) -> pathlib.Path:
    """Returns the path of a workdir; raises UserError for an address, which is no path."""
    if "://" in workdir:
        raise UserError(
            f"--workdir must be a folder, got {workdir}; mount the bucket (gcsfuse, for example) "
            "and give the path where it is mounted."
        )
    return pathlib.Path(workdir)


def _keep_compiled_programs() -> None:
    """Lets JAX keep what it compiles for the next process, where it is not told otherwise."""
    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        folder = pathlib.Path(os.path.expanduser(home)) / "mbn_jax" / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(folder))


def _run(command: Callable[[Sequence[str]], int], name: str) -> None:
    logging.set_verbosity(logging.WARNING)
    _keep_compiled_programs()
    try:
        require_train_extra()
        status = command(sys.argv[1:])
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        status = USER_MISTAKE
    except StoppedError as error:
        if jax.process_index() == 0:
            print(f"{name}: {error}; the same command goes on", file=sys.stderr)
        status = STOPPED
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command goes on", file=sys.stderr)
        status = 130
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        # JAX raises RuntimeError or ValueError for a lost connection.
        if isinstance(error, RuntimeError | ValueError) and LOST_HOST.search(str(error)):
            print(
                f"{name}: another host is gone ({str(error).splitlines()[0]}); start all of them "
                "again, and the run goes on from its last checkpoint",
                file=sys.stderr,
                flush=True,
            )
            os._exit(STOPPED)  # The ordinary way out waits for the other host.
        traceback.print_exc()
        status = FAILED
    if status not in (0, STOPPED) and jax.distributed.is_initialized():
        _leave_hosts(status)
    sys.exit(status)


def _leave_hosts(status: int) -> None:
    """Ends the process, whether or not the other hosts come to the same end in time."""
    leaving = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    leaving.start()
    leaving.join(SECONDS_TO_LEAVE)
    if leaving.is_alive():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # The others wait for this one, and notice.


def sweep_main() -> None:
    """Runs `mbn-sweep`."""
    _run(sweep_command, "mbn-sweep")


def report_main() -> None:
    """Runs `mbn-report`."""
    _run(report_command, "mbn-report")


def train_main() -> None:
    """Runs `mbn-train`."""
    _run(train_command, "mbn-train")


def eval_main() -> None:
    """Runs `mbn-eval`."""
    _run(eval_command, "mbn-eval")


if __name__ == "__main__":
    train_main()
