"""The commands `mbn-train` and `mbn-eval`: flags, one call, one sentence for a mistake."""

import argparse
import difflib
import json
import pathlib
import runpy
import sys
from collections.abc import Callable, Sequence

import jax
from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from mbn_jax.errors import UserError

EXAMPLE_CONFIG = "configs/digits.py"
EXAMPLE = f"mbn-train --config={EXAMPLE_CONFIG} --workdir=runs/digits"
USER_MISTAKE = 2
DIVERGED = 3


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

Every field of mbn_jax/config.py can be set with --config.FIELD=VALUE. In the workdir: config.json,
metrics.jsonl (one record a line), TensorBoard events, checkpoints/ and curves.png.
Exit status: 0 done, {USER_MISTAKE} a mistake in the input, {DIVERGED} the loss was not finite.""",
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
        "--distributed", action="store_true", help="find the others by the cluster: TPU pod, SLURM"
    )
    hosts.add_argument("--coordinator_address", help="or name the first one, HOST:PORT,")
    hosts.add_argument("--num_processes", type=int, help="how many there are,")
    hosts.add_argument("--process_id", type=int, help="and which one this is, from 0")
    args, overrides = parser.parse_known_args(argv)
    if not args.config:
        raise UserError(f"--config is missing; one that works: {EXAMPLE}")
    if not args.workdir:
        raise UserError(
            f"--workdir is missing, the folder for what the run writes; for example: {EXAMPLE}"
        )
    config = parse_config(args.config, overrides)
    join_hosts(args.distributed, args.coordinator_address, args.num_processes, args.process_id)

    from mbn_jax.train import DivergenceError, run_title, train  # Slow to import: TFDS, Orbax.

    try:
        values = train(config, pathlib.Path(args.workdir))
    except DivergenceError as error:
        print(f"mbn-train: {error}", file=sys.stderr)
        return DIVERGED
    if "test_error" not in values:
        raise UserError(
            f"{args.workdir} is a finished run without its metrics.jsonl; evaluate it with "
            f"mbn-eval --workdir={args.workdir}"
        )
    if jax.process_index() == 0:
        print(
            f"{run_title(config)}: test error {values['test_error']:.2%}, test loss "
            f"{values['test_loss']:.4f} after {values['step']} steps; see "
            f"{args.workdir}/curves.png"
        )
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
    args = parser.parse_args(argv)

    from mbn_jax.evaluation import evaluate_run

    print(json.dumps(evaluate_run(pathlib.Path(args.workdir), args.split)))
    return 0


def join_hosts(
    distributed: bool,
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
) -> None:
    """Joins the other hosts of a run, where flags say that there are any.

    Raises:
      UserError: for half an answer, or where no cluster is found.
    """
    named = (coordinator_address, num_processes, process_id)
    if all(value is None for value in named) and not distributed:
        return
    if distributed and any(value is not None for value in named):
        raise UserError("--distributed finds the other hosts itself; leave out the other flags.")
    if not distributed and any(value is None for value in named):
        raise UserError(
            "--coordinator_address, --num_processes and --process_id go together; give all three, "
            "or --distributed on a cluster."
        )
    try:
        jax.distributed.initialize(*named)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"cannot join the other hosts: {' '.join(str(error).split())}") from error


def parse_config(path: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Reads a config file and sets the fields that `overrides` name.

    Args:
      path: of a Python file with `get_config()`.
      overrides: as on the command line, '--config.FIELD=VALUE'.

    Returns:
      The configuration, not yet validated.

    Raises:
      UserError: for a missing or broken file, an unknown field or a value of the wrong type.
    """
    for argument in overrides:
        if argument.startswith("-") and not argument.startswith("--config."):
            raise UserError(f"unknown argument {argument}; see --help")
    if not pathlib.Path(path).is_file():
        raise UserError(f"there is no config file {path}; one that works: {EXAMPLE}")
    try:
        config = runpy.run_path(path)["get_config"]()
    except Exception as error:  # The file is the user's code: it may fail in any way.
        reason = " ".join(str(error).split())
        raise UserError(f"config file {path} failed: {type(error).__name__}: {reason}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config() of {path} must return a ConfigDict, got {type(config)}")
    for override in overrides:
        if override.startswith("--config."):
            _check_field(config, override.removeprefix("--config.").split("=")[0])
    values = flags.FlagValues()
    argv = ["mbn-train", *overrides]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        positional = values(argv)[1:]
    except flags.Error as error:
        raise UserError(str(error)) from error
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    if positional:
        raise UserError(f"unknown argument {positional[0]}; see --help")
    return values.config


def _check_field(config: ConfigDict, name: str) -> None:
    """Raises UserError unless `name`, dotted, is a field and no group of fields."""
    found, group = config, ""
    for key in name.split("."):
        if not isinstance(found, ConfigDict) or key not in found:
            fields = list(found) if isinstance(found, ConfigDict) else []
            close = [group + field for field in difflib.get_close_matches(key, fields, n=1)]
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"the config has no field {name}{hint}")
        found, group = found[key], f"{group}{key}."
    if isinstance(found, ConfigDict):
        names = ", ".join(f"{group}{field}" for field in found)
        raise UserError(f"{name} is a group; set one of its fields: {names}")


def _run(command: Callable[[Sequence[str]], int], name: str) -> None:
    logging.set_verbosity(logging.WARNING)
    try:
        status = command(sys.argv[1:])
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        status = USER_MISTAKE
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command goes on", file=sys.stderr)
        status = 130
    sys.exit(status)


def train_main() -> None:
    """Runs `mbn-train`."""
    _run(train_command, "mbn-train")


def eval_main() -> None:
    """Runs `mbn-eval`."""
    _run(eval_command, "mbn-eval")


if __name__ == "__main__":
    train_main()
