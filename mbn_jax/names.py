"""What a config names: a short name of this package, or an import path `module:attribute`."""

import difflib
import functools
import importlib
import importlib.machinery
import inspect
import pathlib
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mbn_jax.errors import UserError

FORM = "an import path, 'module:attribute'"


def is_import_path(name: Any) -> bool:
    """Returns whether a name is an import path and no short name."""
    return isinstance(name, str) and ":" in name


def named(name: str, short: Mapping[str, Any], field: str) -> Any:
    """Returns what a name stands for; raises UserError in a sentence where it is nothing.

    Args:
      name: a key of `short`, or `module:attribute`.
      short: the short names; a value may be an import path itself.
      field: config field that has the name, for the message.

    >>> import math
    >>> named('math:sqrt', {}, 'model.name') is math.sqrt
    True
    """
    found = short.get(name, name)
    if not isinstance(found, str):
        return found
    if not is_import_path(found):
        close = difflib.get_close_matches(str(name), short, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UserError(
            f"{field} must be one of {', '.join(short)}, or {FORM}, got {name!r}.{hint}"
        )
    return _imported(found, field)


def _imported(path: str, field: str) -> Any:
    """Imports what `module:attribute` names."""
    module_name, _, attribute = path.partition(":")
    try:
        module: Any = importlib.import_module(module_name)
        _check_not_shadowed(module_name.split(".")[0], field)
        return functools.reduce(getattr, attribute.split("."), module)
    except UserError:
        raise
    except ModuleNotFoundError as error:
        # A package that the module itself imports may be missing, too.
        raise UserError(
            f"{field}={path!r}: no module {error.name!r} in {', '.join(_folders) or 'no folder'}, "
            "nor installed; run in the folder of the module, put it beside the config file, or "
            "name its folder in import_dir."
        ) from error
    except AttributeError as error:
        if error.obj is not sys.modules.get(module_name):
            raise UserError(f"{field}={path!r} cannot be imported: {reason(error)}") from error
        close = difflib.get_close_matches(attribute, dir(error.obj), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UserError(
            f"{field}={path!r}: the module {module_name!r} has no {attribute!r}.{hint}"
        ) from error
    except Exception as error:  # The module is the user's code: it may fail in any way.
        raise UserError(f"{field}={path!r} cannot be imported: {reason(error)}") from error


_folders: list[str] = []
"""Folders of the user's own modules."""


def import_from(*folders: str | pathlib.Path) -> None:
    """Lets import paths name modules in these folders, before installed ones.

    For good and for the whole process, as Python does with the folder of a script: workers that
    decode data import the modules again.
    """
    for folder in map(str, folders):
        if folder not in _folders:
            _folders.append(folder)
            if folder not in sys.path:
                sys.path.insert(0, folder)


def _check_not_shadowed(top: str, field: str) -> None:
    """Raises UserError where the newest folder has another module of the same name."""
    loaded = getattr(sys.modules[top], "__file__", None)
    if not _folders or not loaded:
        return
    spec = importlib.machinery.PathFinder.find_spec(top, [_folders[-1]])
    if spec and spec.origin and not pathlib.Path(spec.origin).samefile(loaded):
        raise UserError(
            f"{field} names a module {top!r}, which is {loaded} in this process, and {spec.origin} "
            "is another one; rename one of them."
        )


def import_path(thing: Any, field: str = "a name") -> str:
    """Returns the import path of a class or function; raises UserError where it has none.

    >>> import_path(pathlib.Path, 'model.name')
    'pathlib:Path'
    """
    module, name = getattr(thing, "__module__", ""), getattr(thing, "__qualname__", "")
    try:
        found: Any = functools.reduce(getattr, name.split("."), sys.modules[module])
    except (KeyError, AttributeError):
        found = None
    if found is not thing or module == "__main__":
        raise UserError(
            f"{field} must be a short name, {FORM}, or a class or function that a module has under "
            f"its own name, got {thing!r}; put it into a module beside the config file."
        )
    return f"{module}:{name}"


def accepted(factory: Callable) -> frozenset[str]:
    """Returns the names of the arguments that can still be given to a class or function.

    >>> sorted(accepted(functools.partial(lambda width, *, depth=1: 0, depth=2)))
    ['width']
    """
    given = factory.keywords if isinstance(factory, functools.partial) else {}
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = _parameters(factory)
    return frozenset(p.name for p in found if p.kind in kinds and p.name not in given)


def _parameters(factory: Callable) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(factory).parameters.values())
    except (TypeError, ValueError):  # Some builtins do not tell.
        return []


def takes(factory: Callable, name: str) -> bool:
    """Returns whether an argument can be given to a class or function, be it in its **kwargs.

    >>> takes(lambda **options: options, 'norm')
    True
    """
    takes_any = any(p.kind is p.VAR_KEYWORD for p in _parameters(factory))
    return takes_any or name in accepted(factory)


def default_of(factory: Callable, name: str) -> Any:
    """Returns the default of an argument that a class or function has.

    >>> default_of(lambda width, depth=2: 0, 'depth')
    2
    """
    return next(p.default for p in _parameters(factory) if p.name == name)


def only_accepted(factory: Callable, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options that a class or function has an argument for."""
    names = accepted(factory)
    return {name: value for name, value in options.items() if name in names}


def kwargs_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the `kwargs` of a group of the config; lists as tuples, because JSON has no tuples.

    >>> kwargs_of({'kwargs': {'widths': [4, [8]]}})
    {'widths': (4, (8,))}
    """

    def fixed(value: Any) -> Any:
        return tuple(map(fixed, value)) if isinstance(value, list | tuple) else value

    return {name: fixed(value) for name, value in group["kwargs"].items()}


def with_kwargs(given: Mapping[str, Any], group: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns what the fields of a config give to what a group names, and the group's `kwargs`.

    Args:
      given: arguments from the fields.
      group: group of the config, with `kwargs`.
      name: of the group, for the message.

    Raises:
      UserError: for an argument in both that is a field of the group, unless it is None; the run
        would report the field, and not follow it.

    >>> with_kwargs({'decay': 0.9}, {'kwargs': {'width': 4}}, 'norm')
    {'decay': 0.9, 'width': 4}
    >>> group = {'num_groups': 8, 'kwargs': {'num_groups': None, 'group_size': 4}}
    >>> with_kwargs({'num_groups': 8}, group, 'norm')
    {'num_groups': None, 'group_size': 4}
    """
    kwargs = kwargs_of(group)
    given_twice = set(given) & set(kwargs) & set(group)
    twice = sorted(key for key in given_twice if kwargs[key] is not None)
    if twice:
        raise UserError(
            f"{name}.kwargs.{twice[0]}={kwargs[twice[0]]!r} would replace what a field of the "
            f"config gives as {twice[0]}; set the field instead."
        )
    return {**given, **kwargs}


def reason(error: BaseException, folders: Sequence[str | pathlib.Path] = ()) -> str:
    """Returns an error in one line: its type, its message, and the last line in a user's file.

    Args:
      error: what a user's code has raised.
      folders: of the user's files; default: those of `import_from`.
    """
    text = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
    if isinstance(error, SyntaxError):
        return text  # It ends with file and line.
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        is_theirs = any(frame.filename.startswith(f"{each}/") for each in folders or _folders)
        if is_theirs and "site-packages" not in frame.filename:
            return f"{text} ({pathlib.Path(frame.filename).name}, line {frame.lineno})"
    return text
