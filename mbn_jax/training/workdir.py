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
from mbn_jax.training.compatibility import check_may_resume, without_removed_fields
from mbn_jax.training.config import default_config, fields, flattened
from mbn_jax.training.config_files import is_in_kwargs

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
    """Makes `workdir`; raises UserError where it is a run that may not resume with `config`."""
    make_folder(workdir)
    if (workdir / CONFIG).exists():
        before = fields(load_config(workdir))
        check_may_resume(before, fields(config), f"{workdir} is a run of")


def check_checkpoint(
    config: ConfigDict, noted: Mapping[str, Any] | None, workdir: pathlib.Path
) -> None:
    """Checks that a checkpoint fits a config; raises UserError.

    Args:
      config: run configuration, by its config.json or a config file.
      noted: `fields` of the config that the checkpoint was made with; None: it notes none.
      workdir: folder of the run.
    """
    if noted is not None:
        where = f"The checkpoint in {workdir}"
        check_may_resume(without_removed_fields(noted, where), fields(config), f"{where} is of")


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
            f"Cannot write to --workdir={workdir}: {os.strerror(error.errno)}; fix this, and run "
            "the same command to resume from the last checkpoint."
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
    """Reads the configuration of a run.

    A field that did not exist when it was written has its default.

    Raises:
      UserError: where there is no config, or it has fields or values that this version lacks.
    """
    path = workdir / CONFIG
    try:
        stored = without_removed_fields(flattened(json.loads(path.read_text())), str(path))
    except OSError as error:
        raise UserError(f"{workdir} is not the folder of a run: it has no {CONFIG}.") from error
    except UserError:
        raise
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error}.") from error
    config = default_config()
    unknown = sorted(n for n in set(stored) - set(fields(config)) if not is_in_kwargs(n))
    if unknown:
        raise UserError(f"{path} is damaged: it has the unknown fields {', '.join(unknown)}.")
    with config.ignore_type():  # JSON has lists for tuples.
        config.update_from_flattened_dict(stored)
    return config
