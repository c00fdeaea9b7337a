"""Config files, and the fields of a config that a command line sets."""

import ast
import contextlib
import difflib
import importlib.machinery
import inspect
import pathlib
import re
import runpy
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from mbn_jax.command_line import expand_home
from mbn_jax.errors import UserError, one_line
from mbn_jax.names import is_import_path, reason
from mbn_jax.training.presets import PRESETS, use_preset

ROOT_FILES = ("pyproject.toml", "setup.py", "setup.cfg", ".git")
"""Of the root of a project, which is no package, even where Python files lie in it."""


def parse_config(path: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Reads a config file and sets the fields that `overrides` name.

    Args:
      path: path of a Python file with `get_config()`; 'FILE.py:TEXT' calls `get_config('TEXT')`.
      overrides: as on the command line, '--config.FIELD=VALUE'.

    Returns:
      The configuration, not yet validated.

    Raises:
      UserError: for a missing or broken file, an unknown field or a value of the wrong type.
    """
    config = call_in_file(path, "get_config")
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config() of {path} must return a ConfigDict, got {type(config)}")
    return with_import_dir(override_fields(config, overrides), path)


def with_import_dir(config: ConfigDict, path: str, names: Iterable[Any] = ()) -> ConfigDict:
    """Sets `import_dir` to the folder of a file, where a name is an import path and it is not set.

    Args:
      config: a config; it is changed.
      path: path of the file, as for `parse_config`.
      names: names that the config may be given later, beside those that it has.
    """
    groups = [group for group in config.values() if isinstance(group, ConfigDict)]
    names = [*names, *(group.get("name") for group in groups)]
    if "import_dir" in config and not config.import_dir and any(map(is_import_path, names)):
        config.import_dir = str(split_argument(path)[0].absolute().parent)
    return config


def is_in_kwargs(name: str) -> bool:
    """Returns whether a dotted name is that of a field in `kwargs`, 'model.kwargs.width'.

    >>> is_in_kwargs('model.kwargs.width'), is_in_kwargs('model.name')
    (True, False)
    """
    return name.split(".", 2)[1:2] == ["kwargs"] and name.count(".") >= 2


def with_free_kwargs(config: ConfigDict) -> ConfigDict:
    """Lets the `kwargs` of a config take any fields, whatever is locked; returns the config."""
    for group in config.values():
        if isinstance(group, ConfigDict) and "kwargs" in group:
            group.kwargs.unlock()
    return config


def override_fields(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """Sets the fields that `overrides` name, '--config.FIELD=VALUE'; raises UserError."""
    overrides = _apply_preset(config, overrides)
    for override in overrides:
        if override.startswith("-") and not override.startswith("--config."):
            raise UserError(f"unknown argument {override}; see --help")
        if override.startswith("--config."):
            check_field(config, override.removeprefix("--config.").split("=")[0])
    overrides = _set_kwargs(config, overrides)
    values = flags.FlagValues()
    argv = ["config", *overrides]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        positional = values(argv)[1:]
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    if positional:
        raise UserError(f"unknown argument {positional[0]}; see --help")
    return with_free_kwargs(values.config)


def _apply_preset(config: ConfigDict, overrides: Sequence[str]) -> list[str]:
    """Sets the fields of `--config.preset=NAME`, before all others; returns the other overrides."""
    presets = [word for word in overrides if word.split("=")[0] == "--config.preset"]
    for word in presets:
        if "=" not in word:
            raise UserError(f"give the preset as --config.preset=NAME, of {', '.join(PRESETS)}")
        use_preset(config, word.split("=", 1)[1])
    return [word for word in overrides if word not in presets]


def _set_kwargs(config: ConfigDict, overrides: Sequence[str]) -> list[str]:
    """Sets fields of `kwargs`, which may be new, to Python values; returns the other overrides."""
    others, words = [], iter(overrides)
    for word in words:
        name, is_whole, text = word.removeprefix("--config.").partition("=")
        if not (word.startswith("--config.") and is_in_kwargs(name)):
            others.append(word)
            continue
        if not is_whole:
            text = next(words, "")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = {"true": True, "false": False}.get(text, text)
        group, _, key = name.split(".", 2)
        if "." in key or group not in config:
            raise UserError(f"the config has no field {name}; kwargs have no groups")
        with config.ignore_type():
            config[group].kwargs[key] = value
    return others


def split_argument(path: str) -> tuple[pathlib.Path, str | None]:
    """Divides what names a config file into its path and the argument of its function.

    Raises:
      UserError: where there is no such file.

    >>> split_argument(f"{__file__}:resnet20,cifar10")[1]
    'resnet20,cifar10'
    """
    file, argument = pathlib.Path(expand_home(path, "--config")), None
    with_argument = re.fullmatch(r"(.+?\.py):(.*)", str(file))
    if with_argument and not file.exists():
        file, argument = pathlib.Path(with_argument[1]), with_argument[2]
    if not file.is_file():
        raise UserError(f"there is no file {file}; configs/ and experiments/ have some that work")
    return file, argument


def call_in_file(path: str, function: str) -> Any:
    """Runs a Python file and returns what its function returns; raises UserError in a sentence.

    The file may import its neighbours, and packages of the folder above it and of the current one:
    these come before what is installed.

    Args:
      path: path of the file; 'FILE.py:TEXT' calls the function with 'TEXT'.
      function: name of the function.
    """
    file, argument = split_argument(path)
    arguments = () if argument is None else (argument,)
    try:
        with _importable(
            [file.absolute().parent, file.absolute().parent.parent, pathlib.Path.cwd()]
        ):
            called = runpy.run_path(str(file.absolute()))[function]
            _check_argument(called, argument, f"{function}() of {file}", str(file))
            return called(*arguments)
    except UserError:
        raise
    except Exception as error:  # The file is the user's code: it may fail in any way.
        why = reason(error, [file.absolute().parent])
        raise UserError(f"{file}: {function}() failed: {why}") from error


def _check_argument(called, argument: str | None, name: str, file: str) -> None:
    """Raises UserError where a function takes no argument and gets one, or needs one."""
    signature = inspect.signature(called)
    try:
        signature.bind(*(() if argument is None else (argument,)))
    except TypeError as error:
        if argument is None:
            raise UserError(f"{name} needs an argument; give it as {file}:ARGUMENT") from error
        raise UserError(f"{name} takes no argument, got {argument!r}; use {file}") from error


@contextlib.contextmanager
def _importable(folders: Sequence[pathlib.Path]) -> Iterator[None]:
    """Lets modules in these folders be imported within the block, before installed ones.

    They are forgotten afterwards: the file of another project has other neighbours.
    """
    finder = _Finder(list(dict.fromkeys(map(str, folders))))
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in list(sys.modules):
            if name.split(".")[0] in finder.found:
                del sys.modules[name]


class _Finder:
    """Finds top-level modules and packages in some folders, with or without `__init__.py`.

    Python itself would prefer an installed package to a folder without `__init__.py`.
    """

    def __init__(self, folders: list[str]):
        self._folders = folders
        self.found: set[str] = set()

    def find_spec(self, name: str, path=None, target=None):
        """Returns where a module is, as Python's import system asks."""
        if path is not None or name in sys.stdlib_module_names:
            return None
        for folder in self._folders:
            spec = importlib.machinery.PathFinder.find_spec(name, [folder])
            if spec is None:
                continue
            if spec.origin is None:
                package = pathlib.Path(folder) / name
                is_root = any((package / file).exists() for file in ROOT_FILES)
                if is_root or not any(package.glob("*.py")):
                    continue
                spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
                spec.submodule_search_locations = [str(package)]
            self.found.add(name)
            return spec
        return None


def with_fields(config: ConfigDict, fields: Mapping[str, Any], where: str) -> ConfigDict:
    """Returns a copy with fields set by dotted name; raises UserError, naming `where`."""
    config = with_free_kwargs(config.copy_and_resolve_references())
    try:
        config.update_from_flattened_dict(dict(fields))
    except (TypeError, KeyError) as error:
        raise UserError(f"{where}: a value of the wrong type: {one_line(error)}") from error
    return config


def check_field(config: ConfigDict, name: str) -> None:
    """Raises UserError unless `name`, dotted, is a field and no group of fields."""
    found, group = config, ""
    if is_in_kwargs(name):
        return  # Any: they are for the user's own class or function.
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
