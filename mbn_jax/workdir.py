"""The folder of a run, and the configuration that it belongs to."""

import json
import os
import pathlib

from ml_collections import ConfigDict

from mbn_jax.config import changes, default_config, fields
from mbn_jax.errors import UserError

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"


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


def make_folder(workdir: pathlib.Path) -> None:
    """Makes a workdir where it is missing; raises UserError where that cannot be."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(workdir, error) from error


def save_config(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Writes the resolved configuration as `config.json`, whole or not at all."""
    replace(workdir / CONFIG, (config.to_json(indent=1) + "\n").encode())


def replace(path: pathlib.Path, content: bytes) -> None:
    """Writes a file whole or not at all, whoever else writes it; raises UserError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise _cannot_write(path.parent, error) from error


def load_config(workdir: pathlib.Path) -> ConfigDict:
    """Reads the configuration of a run; raises UserError where there is none.

    A field that did not exist when it was written has its default.
    """
    try:
        stored = json.loads((workdir / CONFIG).read_text())
        config = default_config()
        with config.ignore_type(), config.unlocked():  # JSON has lists for tuples.
            config.update(stored)
        return config
    except OSError as error:
        raise UserError(f"{workdir} is not the folder of a run: it has no {CONFIG}.") from error
    except ValueError as error:
        raise UserError(f"{workdir / CONFIG} is damaged: {error}.") from error


def _cannot_write(workdir: pathlib.Path, error: OSError) -> UserError:
    return UserError(f"Cannot write to --workdir={workdir}: {error.strerror}.")
