"""What the arguments of all commands have in common; nothing heavy is imported here."""

import argparse
import difflib
import itertools
import os
import pathlib
from collections.abc import Sequence

from mbn_jax.errors import UserError

BUCKETS = ("gs://", "s3://")
"""What the addresses begin with that `mbn-train` and `mbn-eval` take for a workdir."""


def command_parser(name: str, description: str, epilog: str | None = None):
    """Returns the parser of a command: full option names only, and examples as they are typed."""
    return argparse.ArgumentParser(
        prog=name,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=description,
        epilog=epilog,
    )


def add_config_fields(parser: argparse.ArgumentParser, text: str) -> None:
    """Shows `--config.FIELD=VALUE` in the help; `parse_with_fields` leaves the fields alone."""
    parser.add_argument("--config.FIELD", metavar="VALUE", dest="field", help=text)


def parse_with_fields(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """Parses a command line that may set fields of the config.

    Returns:
      The arguments, and what sets fields: '--config.FIELD=VALUE', or '--config.FIELD', 'VALUE'.

    Raises:
      UserError: for an argument that is neither.
    """
    args, overrides = parser.parse_known_args(argv)
    if getattr(args, "field", None) is not None:
        raise UserError("--config.FIELD stands for a field's name: --config.seed=3, for example")
    for text, value in itertools.pairwise(argv):
        # What follows a field may have been taken for a positional argument.
        is_field = text.startswith("--config.") and "=" not in text
        if is_field and value in vars(args).values() and not os.path.exists(value):
            raise UserError(f"{text} needs =VALUE: {text}={value}")
    after_field = False
    for text in overrides:
        is_field = text.startswith("--config.")
        if not is_field and not after_field:
            options = [name for action in parser._actions for name in action.option_strings]
            close = difflib.get_close_matches(text.split("=")[0], options, n=1)
            hint = f"; did you mean {close[0]}?" if close else "; see --help"
            raise UserError(f"unknown argument {text}{hint}")
        after_field = is_field and "=" not in text
    return args, overrides


def is_bucket(workdir: str | pathlib.Path) -> bool:
    """Returns whether this is an address in a bucket; raises UserError for one in a `Path`.

    >>> is_bucket("gs://bucket/run"), is_bucket("/mnt/bucket/run")
    (True, False)
    """
    as_path = tuple(address[:-1] for address in BUCKETS)  # A path has no two slashes in a row.
    if isinstance(workdir, pathlib.Path) and str(workdir).startswith(as_path):
        raise UserError(f"A workdir in a bucket must be a str, got {workdir!r}; give its address.")
    return isinstance(workdir, str) and workdir.startswith(BUCKETS)


def folder_or_bucket(text: str) -> pathlib.Path | str:
    """Returns an address in a bucket as it is, and else what `folder` does."""
    if is_bucket(text):
        return text
    if "://" in text:
        raise UserError(
            f"--workdir must be a folder or an address that begins with {' or '.join(BUCKETS)}, "
            f"got {text}; mount what is there, and give the path where it is mounted."
        )
    return folder(text)


def folder(text: str, flag: str = "--workdir") -> pathlib.Path:
    """Returns a path that was given, with `~` expanded.

    Raises:
      UserError: for an address, which is no path, or a home folder that is not known.
    """
    if "://" in text:
        raise UserError(
            f"{flag} must be a folder, got {text}; mount the bucket (gcsfuse, for example) "
            "and give the path where it is mounted."
        )
    return pathlib.Path(expand_home(text, flag))


def expand_home(path: str, what: str) -> str:
    """Returns a path with `~` expanded; raises UserError, naming `what`, where that cannot be.

    >>> expand_home("/data/~", "dataset.data_dir")
    '/data/~'
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise UserError(
            f"{what}={path}: the home folder of {path.split('/')[0]} is not known; write the path "
            "out, or set HOME."
        )
    return expanded
