"""Config files, and the fields of a config that a command line sets."""

import difflib
import pathlib
import runpy
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from mbn_jax.errors import UserError


def parse_config(path: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Reads a config file and sets the fields that `overrides` name.

    Args:
      path: of a Python file with `get_config()`; 'file.py:ARGUMENT' calls it with the argument.
      overrides: as on the command line, '--config.FIELD=VALUE'.

    Returns:
      The configuration, not yet validated.

    Raises:
      UserError: for a missing or broken file, an unknown field or a value of the wrong type.
    """
    file, _, argument = path.partition(":")
    config = call_in_file(file, "get_config", *([argument] if argument else []))
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config() of {path} must return a ConfigDict, got {type(config)}")
    return override_fields(config, overrides)


def override_fields(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """Sets the fields that `overrides` name, '--config.FIELD=VALUE'; raises UserError."""
    for override in overrides:
        if override.startswith("-") and not override.startswith("--config."):
            raise UserError(f"unknown argument {override}; see --help")
        if override.startswith("--config."):
            check_field(config, override.removeprefix("--config.").split("=")[0])
    values = flags.FlagValues()
    argv = ["config", *overrides]
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


def call_in_file(path: str, function: str, *arguments: str) -> Any:
    """Runs a Python file and returns what its function returns; raises UserError in a sentence."""
    if not pathlib.Path(path).is_file():
        raise UserError(f"there is no file {path}; configs/ and experiments/ have some that work")
    try:
        return runpy.run_path(path)[function](*arguments)
    except Exception as error:  # The file is the user's code: it may fail in any way.
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: {function}() failed: {type(error).__name__}: {reason}") from error


def with_fields(config: ConfigDict, fields: Mapping[str, Any], where: str) -> ConfigDict:
    """Returns a copy with fields set by dotted name; raises UserError, naming `where`."""
    config = config.copy_and_resolve_references()
    try:
        config.update_from_flattened_dict(dict(fields))
    except (TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: a value of the wrong type: {reason}") from error
    return config


def check_field(config: ConfigDict, name: str) -> None:
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
