"""The site: the reference documents every public name, and what it generates is complete."""

import doctest
import importlib.util
import pathlib
import re

import pytest

import mbn_jax
import mbn_jax.nnx
from mbn_jax.training.config import FIELDS

DOCS = pathlib.Path(__file__).parent.parent / "docs"
PAGES = {"library": mbn_jax, "nnx": mbn_jax.nnx}


def documented(page):
    """The names that a page of the reference documents."""
    text = (DOCS / "reference" / f"{page}.md").read_text()
    return re.findall(r"^\.\. auto(?:class|function):: ([\w.]+)$", text, re.MULTILINE)


@pytest.fixture(scope="module")
def generated():
    spec = importlib.util.spec_from_file_location("generated", DOCS / "_ext" / "generated.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES)
def test_the_reference_documents_every_public_name_once(page):
    assert sorted(documented(page)) == sorted(PAGES[page].__all__)


def test_the_reference_documents_public_functions_of_core():
    # Modules without a list of members are documented whole; `core.layers` serves the layers alone.
    text = (DOCS / "reference" / "core.md").read_text()
    modules = set(re.findall(r"automodule:: mbn_jax\.core\.(\w+)", text))
    files = {file.stem for file in pathlib.Path(mbn_jax.__file__).parent.glob("core/*.py")}
    assert modules == files - {"__init__", "layers"}


def test_every_page_is_in_the_navigation():
    index = (DOCS / "index.md").read_text()
    listed = {
        str(file.relative_to(DOCS).with_suffix(""))
        for block in re.findall(r"```\{toctree\}\n(.*?)```", index, re.DOTALL)
        for line in block.splitlines()
        if line and not line.startswith(":")
        for file in DOCS.glob(re.sub(r".*<(.*)>", r"\1", line) + ".md")
    }
    pages = {str(file.relative_to(DOCS).with_suffix("")) for file in DOCS.glob("[!_]*/*.md")}
    pages |= {file.stem for file in DOCS.glob("*.md")}
    assert listed == pages - {"index"}


def test_the_tables_have_every_config_field(generated):
    rows = re.findall(
        r"^\| `([\w.]+)` \| .*? \| `(.*?)` \|", generated.field_tables(), re.MULTILINE
    )
    assert dict(rows) == {name: repr(field.default) for name, field in FIELDS.items()}


def test_the_help_is_that_of_each_command(generated):
    text = (DOCS / "reference" / "commands.md").read_text()
    assert set(re.findall(r"\{command-help\} ([\w-]+)", text)) == set(generated.COMMANDS)
    for command in generated.COMMANDS:
        assert generated.help_of(command).startswith(f"usage: {command} [-h]")


def test_examples_of_the_extension_hold(generated):
    assert doctest.testmod(generated).attempted
    assert not doctest.testmod(generated).failed
