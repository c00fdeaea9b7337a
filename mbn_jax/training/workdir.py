"""The folder of a run, and the configuration that it belongs to."""

import contextlib
import errno
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from mbn_jax.errors import UserError
from mbn_jax.training.config import changes, default_config, fields

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
UNWRITABLE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
)


def open_workdir(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Makes `workdir`; raises UserError where it is a run of another config, naming the fields."""
    make_folder(workdir)
    if not (workdir / CONFIG).exists():
        return
    differing = changes(fields(load_config(workdir)), fields(config))
    if differing:
        raise UserError(
            f"{workdir} is a run of another config ({differing}); use another --workdir, or the "
            "config it was started with."
        )


def check_checkpoint(
    config: ConfigDict, noted: Mapping[str, Any] | None, workdir: pathlib.Path
) -> None:
    """Checks a config against that which a checkpoint was made with; raises UserError.

    Args:
      config: of the run, by its config.json or a config file.
      noted: `fields` of the config, saved with the checkpoint; None: none were.
      workdir: of the run.
    """
    differing = changes(noted, fields(config)) if noted is not None else ""
    if differing:
        raise UserError(
            f"The checkpoint in {workdir} is of another config ({differing}); give the one that it "
            f"was made with, or put {CONFIG} back as it was."
        )


def make_folder(workdir: pathlib.Path) -> None:
    """Makes a workdir where it is missing; raises UserError where that cannot be."""
    try:
        with writing(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"Cannot write to --workdir={workdir}: {error.strerror}.") from error


@contextlib.contextmanager
def writing(workdir: pathlib.Path) -> Iterator[None]:
    """Turns the errors of a workdir that cannot be written, or is full, into UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise UserError(
            f"Cannot write to --workdir={workdir}: {os.strerror(error.errno)}; with that mended, "
            "the same command goes on from the last checkpoint."
        ) from error


def save_config(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Writes the resolved configuration as `config.json`, whole or not at all."""
    replace(workdir / CONFIG, (config.to_json(indent=1) + "\n").encode())


def replace(path: pathlib.Path, content: bytes) -> None:
    """Writes a file whole or not at all, whoever else writes it; raises UserError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    with writing(path.parent):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def load_config(workdir: pathlib.Path) -> ConfigDict:
    """Reads the configuration of a run; raises UserError where there is none.

    A field that did not exist when it was written has its default.
    """
    try:
        stored = json.loads((workdir / CONFIG).read_text())
        config = default_config()
        with config.ignore_type(), config.unlocked():  # JSON has lists for tuples.
            config.update(stored)
        unknown = sorted(set(fields(config)) - set(fields(default_config())))
        if unknown:
            raise ValueError(f"it has the unknown fields {', '.join(unknown)}")
        return config
    except OSError as error:
        raise UserError(f"{workdir} is not the folder of a run: it has no {CONFIG}.") from error
    except ValueError as error:
        raise UserError(f"{workdir / CONFIG} is damaged: {error}.") from error
