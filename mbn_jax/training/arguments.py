"""The arguments of `mbn-train` and `mbn-eval`; nothing heavy is imported before they are read."""

import argparse
import contextlib
import pathlib
import sys
from collections.abc import Mapping, Sequence

from mbn_jax.command_line import (
    add_config_fields,
    command_parser,
    folder_or_bucket,
    parse_with_fields,
)
from mbn_jax.errors import ExitStatus, UserError
from mbn_jax.training.startup import Startup

CONFIG = "configs/digits.py"
EXAMPLE = f"mbn-train --config={CONFIG} --workdir=runs/digits"
HEARTBEAT_TIMEOUT = 100
"""Seconds of silence after which a host counts as lost."""

STATUSES = {
    ExitStatus.DONE: "done",
    ExitStatus.FAILED: "an error within the program",
    ExitStatus.USER_MISTAKE: "a mistake in the input, or a workdir that cannot be written",
    ExitStatus.DIVERGED: "the loss was not finite",
    ExitStatus.STOPPED: "saved and stopped by SIGTERM, or another host is lost: run the same "
    "command to resume",
    ExitStatus.INTERRUPTED: "interrupted",
}


def train_command(argv: Sequence[str]) -> int:
    """Runs `mbn-train` with these arguments; returns its exit status, raises UserError."""
    args, overrides = parse_with_fields(_parser(), argv)
    if not args.config:
        raise UserError(f"--config is missing; one that works: {EXAMPLE}")
    if not args.workdir:
        raise UserError(
            f"--workdir is missing, the folder for what the run writes; for example: {EXAMPLE}"
        )
    workdir = folder_or_bucket(args.workdir)

    startup = Startup()

    from mbn_jax.training.config_files import parse_config

    config = parse_config(args.config, overrides)

    import jax

    from mbn_jax.parallel.devices import check_devices, keep_compiled_programs
    from mbn_jax.parallel.hosts import join_hosts

    startup.watch_compilations()
    startup.ends("imports")
    join_hosts(
        args.distributed,
        args.coordinator_address,
        args.num_processes,
        args.process_id,
        args.heartbeat_timeout,
    )
    check_devices()
    keep_compiled_programs()
    startup.ends("hosts and devices")

    from mbn_jax.parallel.preemption import stop_on_sigterm
    from mbn_jax.training.divergence import DivergenceError
    from mbn_jax.training.loop import run_title, train

    try:
        with _only_writer(workdir), stop_on_sigterm() as stop_asked:
            values = train(config, workdir, stop_asked=stop_asked, startup=startup)
    except DivergenceError as error:
        print(f"mbn-train: {error}", file=sys.stderr)
        return ExitStatus.DIVERGED
    if "test_loss" not in values:
        raise UserError(
            f"{args.workdir} is a finished run without its metrics.jsonl; evaluate it with "
            f"mbn-eval --workdir={args.workdir}"
        )
    if jax.process_index() == 0:
        print(
            f"{run_title(config)}: {_results(values)} after {values['step']} steps; see "
            f"{args.workdir}/curves.png"
        )
    return ExitStatus.DONE


def _results(values: Mapping[str, float]) -> str:
    """Returns the metrics of the test split in words, the loss last."""
    from mbn_jax.training.reporting import of_split, shown

    told = []
    for name, value in of_split("test", values):
        text = f"test {name} {shown(name, value)}"
        recalibrated = values.get(f"recalibrated_test_{name}")
        if recalibrated is not None and name != "loss":
            text += f" ({shown(name, recalibrated)} recalibrated)"
        told.append(text)
    return ", ".join([*told[1:], told[0]])


@contextlib.contextmanager
def _only_writer(workdir: pathlib.Path | str):
    """Locks the workdir in the first host, for all of them; raises UserError on every host."""
    import jax
    from absl import logging

    from mbn_jax.parallel.devices import first_host_first
    from mbn_jax.training.workdir import make_folder, only_writer

    if isinstance(workdir, str):
        if jax.process_index() == 0:
            logging.warning(
                "A bucket cannot be locked: see to it that only one run writes to %s.", workdir
            )
        yield
        return
    with contextlib.ExitStack() as held:
        with first_host_first():
            make_folder(workdir)
            if jax.process_index() == 0:
                held.enter_context(only_writer(workdir))
        yield


def _parser() -> argparse.ArgumentParser:
    statuses = "\n".join(f"  {status:3}  {text}" for status, text in STATUSES.items())
    parser = command_parser(
        "mbn-train",
        "Trains a network as a config file says. Run the same command again to resume.",
        f"""examples:
  {EXAMPLE}
  mbn-train --config={CONFIG} --workdir=runs/batch --config.norm.name=batch \\
      --config.double_forward=off
  mbn-train --config={CONFIG} --workdir=runs/k8 --config.norm.memory_size=8

Every field of mbn_jax/training/config.py can be set with --config.FIELD=VALUE, and several at once
with --config.preset=paper or --config.preset=recommended. In the workdir:
config.json, metrics.jsonl (one record a line), TensorBoard events, checkpoints/ and curves.png.
Exit status:
{statuses}""",
    )
    parser.add_argument(
        "--config",
        help="config file, a Python file with get_config(); FILE:TEXT calls get_config('TEXT')",
    )
    parser.add_argument("--workdir", help="folder of the run, made if missing; or gs://BUCKET/PATH")
    add_config_fields(parser, "sets a field of the config")
    hosts = parser.add_argument_group(
        "several hosts", "Run the same command on each, with a --workdir that all of them share."
    )
    hosts.add_argument(
        "--distributed",
        action=argparse.BooleanOptionalAction,
        help="find the other hosts by the cluster (needed on a TPU pod of Compute Engine); "
        "default: where srun, mpirun or Kubernetes launched several",
    )
    hosts.add_argument(
        "--coordinator_address", metavar="HOST:PORT", help="or name the address of the first host,"
    )
    hosts.add_argument("--num_processes", type=int, metavar="N", help="the number of processes")
    hosts.add_argument(
        "--process_id", type=int, metavar="I", help="and the number of this one, from 0"
    )
    hosts.add_argument(
        "--heartbeat_timeout",
        type=int,
        default=HEARTBEAT_TIMEOUT,
        metavar="SECONDS",
        help="after which a silent host counts as lost, and the others end (default: %(default)s)",
    )
    return parser


def eval_command(argv: Sequence[str]) -> int:
    """Runs `mbn-eval` with these arguments; returns its exit status, raises UserError."""
    parser = command_parser(
        "mbn-eval", "Evaluates a checkpoint of a run, and prints one JSON object."
    )
    parser.add_argument(
        "--workdir", required=True, help="folder of a run of mbn-train, or gs://..."
    )
    parser.add_argument(
        "--split", help="TFDS split, for example train[:10%%]; default: the test split"
    )
    parser.add_argument(
        "--best",
        action="store_true",
        help="evaluate the saved checkpoint of the lowest test error; default: the newest",
    )
    parser.add_argument(
        "--recalibrate_batches",
        type=int,
        default=0,
        metavar="N",
        help="compute the statistics anew from N batches of training examples (of eval_batch_size "
        "each); default: use those of the run",
    )
    args = parser.parse_args(argv)
    workdir = folder_or_bucket(args.workdir)
    if args.recalibrate_batches < 0:
        raise UserError(f"--recalibrate_batches must be 0 or more, got {args.recalibrate_batches}.")

    from mbn_jax.parallel.devices import check_devices, keep_compiled_programs
    from mbn_jax.training.evaluation import evaluate_run
    from mbn_jax.training.reporting import to_json

    check_devices()
    keep_compiled_programs()
    with contextlib.ExitStack() as held:
        if isinstance(workdir, str):
            from mbn_jax.training.buckets import local_copy

            workdir = held.enter_context(local_copy(workdir)).folder
        values = evaluate_run(
            workdir, args.split, recalibrate_batches=args.recalibrate_batches, best=args.best
        )
    print(to_json(values))
    return ExitStatus.DONE
