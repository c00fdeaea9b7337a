"""The arguments of `mbn-sweep` and `mbn-report`; nothing heavy is imported before they are read."""

from collections.abc import Sequence

from mbn_jax.command_line import add_config_fields, command_parser, folder, parse_with_fields
from mbn_jax.errors import ExitStatus, UserError

EXAMPLE = "mbn-sweep experiments/memory_size.py --workdir=runs/memory_size"


def sweep_command(argv: Sequence[str]) -> int:
    """Runs `mbn-sweep` with these arguments; returns its exit status, raises UserError."""
    parser = command_parser(
        "mbn-sweep",
        "Runs all members of an experiment that are not done yet.",
        f"""examples:
  {EXAMPLE} --dry_run
  {EXAMPLE}
  mbn-report runs/memory_size

Run the same command again to resume: it runs what is missing. Run it in another shell or on another
machine at the same time to share the work. In the workdir: members/ (a run each), sweep.db (an
Optuna study), results.csv, results.parquet, and what mbn-report writes.""",
    )
    parser.add_argument("experiment", help="a Python file with get_sweep()")
    parser.add_argument("--workdir", help="folder of the sweep; made if missing")
    parser.add_argument("--seeds", type=int, help="number of seeds; default: what the file says")
    parser.add_argument("--dry_run", action="store_true", help="check and list the members")
    parser.add_argument("--retry_failed", action="store_true", help="run failed members again")
    parser.add_argument(
        "--storage", help="database for several machines, postgresql://...; default: in the workdir"
    )
    add_config_fields(parser, "sets a field for all members")
    args, overrides = parse_with_fields(parser, argv)
    if not args.workdir:
        raise UserError(f"--workdir is missing; for example: {EXAMPLE}")
    workdir = folder(args.workdir)

    from mbn_jax.parallel.devices import check_devices, keep_compiled_programs
    from mbn_jax.sweeps.command import dry_run, open_sweep, run_sweep

    check_devices()
    keep_compiled_programs()
    if args.dry_run:
        print(dry_run(args.experiment, overrides, args.seeds, workdir))
        return ExitStatus.DONE
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
    return ExitStatus.FAILED if outcomes["failed"] else ExitStatus.DONE


def report_command(argv: Sequence[str]) -> int:
    """Runs `mbn-report` with these arguments; returns its exit status, raises UserError."""
    parser = command_parser(
        "mbn-report",
        "Writes the report of a sweep, as far as it has run: report.html, report.md, figures/, "
        "results.csv and results.parquet.",
    )
    parser.add_argument("workdir", help="folder of mbn-sweep")
    parser.add_argument("--storage", help="the database, where mbn-sweep was given one")
    args = parser.parse_args(argv)
    workdir = folder(args.workdir, "workdir")

    from mbn_jax.sweeps.command import report_sweep

    print(report_sweep(workdir, args.storage))
    return ExitStatus.DONE
