"""The docs: their code runs, their commands parse, and what they name and link exists."""

import pathlib
import re
import shlex

import pytest

from mbn_jax.sweeps.command import load_sweep
from mbn_jax.training.checks import validate
from mbn_jax.training.config_files import is_in_kwargs, parse_config

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "CHANGELOG.md"]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
BLOCKS = [b for p in PAGES for b in re.findall(r"```python\n(.*?)```", p.read_text(), re.DOTALL)]


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_in_the_docs_runs(block):
    names = {}
    exec(compile(block, "docs", "exec"), names)
    if "get_sweep" in names:
        assert names["get_sweep"]().members()


def test_readme_has_an_example_of_the_layer_and_the_step():
    assert any("MemorizedBatchNorm" in block and "make_train_step" in block for block in BLOCKS)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 110


def commands_of(text):
    """The command lines of a text that start mbn-train or mbn-sweep, as words."""
    text = text.replace("\\\n", " ")
    lines = re.findall(r"^.*\bmbn-(?:train|sweep) .*$", text, re.MULTILINE)
    for line in lines:
        inline = re.findall(r"`(mbn-(?:train|sweep) [^`]*)`", line)
        for command in inline or [line.strip()]:
            command = re.sub(r"^.*?(?=mbn-(?:train|sweep) )", "", command).rstrip("'")
            words = shlex.split(command)
            if len(words) > 1 and words[1].startswith(("-", "experiments/")):
                yield words


def placeholders_filled(words):
    """The words without those that the reader has to fill in."""
    return [word for word in words if not word.endswith(("=...", "..."))]


COMMANDS = {
    f"{page.name}: {' '.join(words)}": words
    for page in [*PAGES, *sorted(ROOT.glob("configs/*.py")), *sorted(ROOT.glob("experiments/*.py"))]
    for words in commands_of(page.read_text())
}
"""Of the docs, and of the openings of config and sweep files."""


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_commands_in_the_docs_parse(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, *words = placeholders_filled(words)
    overrides = [word for word in words if word.startswith("--config.")]
    if program == "mbn-train":
        [file] = [w.removeprefix("--config=") for w in words if w.startswith("--config=")] or [None]
        if file is None:  # A part of a command: --config=... stands for any.
            file = "configs/digits.py"
        validate(parse_config(file, overrides))
    else:
        load_sweep(words[0], overrides, None)


def test_the_docs_have_commands_of_both_kinds():
    programs = [words[0] for words in COMMANDS.values()]
    assert programs.count("mbn-train") > 10
    assert programs.count("mbn-sweep") > 20


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_fields_that_the_docs_set_are_fields(page):
    overrides = re.findall(r"(--config\.[\w.]+=)", page.read_text())
    known = {"FIELD", "preset"}
    for field in {o.removeprefix("--config.").removesuffix("=") for o in overrides} - known:
        if is_in_kwargs(field):
            continue  # Of the reader's own.
        group = parse_config(str(ROOT / "configs" / "digits.py"))
        for name in field.split("."):
            assert name in group, field
            group = group[name]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_files_that_the_docs_name_exist(page):
    if page.name == "CHANGELOG.md":
        pytest.skip("names files of the past too")
    text = page.read_text()
    named = re.findall(
        r"\b(?:configs|experiments|docs|mbn_jax|tests)/[\w/]+\.(?:py|md|png)\b", text
    )
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_config_arguments_that_the_docs_name_exist():
    named = {
        match
        for page in [*PAGES, *ROOT.glob("experiments/**/*.py")]
        for match in re.findall(r"\bconfigs/\w+\.py:[\w,]*\w", page.read_text())
    }
    assert "configs/cifar.py:resnet20,cifar10" in named
    for file in named:
        parse_config(str(ROOT / file))


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_in_the_docs_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([\w-]+))?\)", page.read_text()):
        file = page.parent / target if target else page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in slugs, (target, anchor)


def test_the_layout_names_every_file_of_the_larger_packages():
    text = (ROOT / "docs" / "layout.md").read_text()
    packages = ("core", "linen", "nnx", "step", "statistics", "training", "sweeps")
    named = set(re.findall(rf"`((?:{'|'.join(packages)})/\w+\.py)`", text))
    files = {
        f"{package}/{file.name}"
        for package in packages
        for file in (ROOT / "mbn_jax" / package).glob("*.py")
        if file.name != "__init__.py"
    }
    assert named == files
