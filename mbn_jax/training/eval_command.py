"""The arguments of `mbn-eval`; nothing heavy is imported before they are read."""

from collections.abc import Sequence

from mbn_jax.command_line import command_parser, folder
from mbn_jax.errors import ExitStatus, UserError


def eval_command(argv: Sequence[str]) -> int:
    """Runs `mbn-eval` with these arguments; returns its exit status, raises UserError."""
    parser = command_parser(
        "mbn-eval", "Evaluates a checkpoint of a run, and prints one JSON object."
    )
    parser.add_argument("--workdir", required=True, help="folder of a run of mbn-train")
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
    workdir = folder(args.workdir)
    if args.recalibrate_batches < 0:
        raise UserError(f"--recalibrate_batches must be 0 or more, got {args.recalibrate_batches}.")

    from mbn_jax.parallel.devices import check_devices, keep_compiled_programs
    from mbn_jax.training.evaluation import evaluate_run
    from mbn_jax.training.reporting import to_json

    keep_compiled_programs()
    check_devices()
    values = evaluate_run(
        workdir, args.split, recalibrate_batches=args.recalibrate_batches, best=args.best
    )
    print(to_json(values))
    return ExitStatus.DONE
