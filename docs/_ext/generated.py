"""What the site takes from the code: config fields, the help of commands, readable signatures."""

import contextlib
import inspect
import io
import os
import re
from typing import Any
from unittest import mock

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.inspect import stringify_signature

from mbn_jax.sweeps.arguments import report_command, sweep_command
from mbn_jax.training.arguments import eval_command, train_command
from mbn_jax.training.config import FIELDS
from mbn_jax.training.field_checks import ANY

COMMANDS = {
    "mbn-train": train_command,
    "mbn-eval": eval_command,
    "mbn-sweep": sweep_command,
    "mbn-report": report_command,
}


KINDS = {bool: "True or False", str: "a text", tuple: "numbers", float: "a number"}
"""What a field without a check of its own may be, by the type of its default."""


def field_tables() -> str:
    """Returns a Markdown section with a table for each group of config fields."""
    groups: dict[str, list[str]] = {}
    for name in FIELDS:
        groups.setdefault(name.split(".")[0] if "." in name else "run and step", []).append(name)
    lines: list[str] = []
    for group, names in groups.items():
        lines += ["", f"## {group}", ""]
        lines += ["| field | meaning | default | allowed |", "| --- | --- | --- | --- |"]
        for name in names:
            default, check, meaning, _ = FIELDS[name]
            allowed = KINDS[type(default)] if check is ANY else check.expected
            lines.append(f"| `{name}` | {meaning} | `{default!r}` | {allowed} |")
    return "\n".join(lines)


def help_of(command: str) -> str:
    """Returns what a command prints for `--help` in a terminal of 80 columns."""
    text = io.StringIO()
    with (
        mock.patch.dict(os.environ, COLUMNS="80"),
        contextlib.redirect_stdout(text),
        contextlib.suppress(SystemExit),
    ):
        COMMANDS[command](["--help"])
    return text.getvalue()


class ConfigFields(SphinxDirective):
    """The tables of all config fields."""

    def run(self) -> list[nodes.Node]:
        """Parses the tables as part of the page."""
        return self.parse_text_to_nodes(field_tables(), allow_section_headings=True)


class CommandHelp(SphinxDirective):
    """The help of the command that is the argument."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Shows the help as a terminal does."""
        text = help_of(self.arguments[0])
        return [nodes.literal_block(text, text, language="none")]


def tidy_signature(signature: str) -> str:
    """Returns a signature with names for objects, and without what flax adds to each module.

    >>> tidy_signature("(init=<function zeros>, parent=<flax.Sentinel object>, name=None)")
    '(init=zeros)'
    >>> tidy_signature("(rate=<function linear.<locals>.schedule at 0x7f>, kind=<class 'a.b'>)")
    '(rate=linear, kind=b)'
    """
    signature = re.sub(r", parent=<.*>, name=None\)$", ")", signature)
    signature = re.sub(r"<function (\w+)(?:\.<locals>)?[^>]*>", r"\1", signature)
    return re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", signature)


def _process_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, returns: str
) -> tuple[str, str] | None:
    if signature == "(*args, **kwargs)":  # Of the metaclass of flax.nnx.
        parameters = list(inspect.signature(obj.__init__).parameters.values())[1:]
        signature = stringify_signature(inspect.Signature(parameters), show_annotation=False)
    return (tidy_signature(signature), returns) if signature else None


def _skip_member(
    app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any
) -> bool | None:
    return (obj.__doc__ or "").startswith("Alias for field number") or None


def setup(app: Sphinx) -> dict[str, bool]:
    """Adds the directives to Sphinx."""
    app.connect("autodoc-process-signature", _process_signature)
    app.connect("autodoc-skip-member", _skip_member)
    app.add_directive("config-fields", ConfigFields)
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True}
