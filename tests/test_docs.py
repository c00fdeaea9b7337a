"""The docs: their code runs, their commands parse, and what they name and link exists."""

import contextlib
import pathlib
import re
import shlex
import subprocess

import jax
import jax.numpy as jnp
import optax
import pandas as pd
import pytest

from mbn_jax import MemorizedBatchNorm, TrainState
from mbn_jax.errors import UserError
from mbn_jax.parallel.devices import replicate
from mbn_jax.sweeps.arguments import report_command
from mbn_jax.sweeps.command import load_sweep
from mbn_jax.training.arguments import eval_command
from mbn_jax.training.checkpoints import Checkpoints
from mbn_jax.training.checks import validate
from mbn_jax.training.config_files import is_in_kwargs, parse_config

ROOT = pathlib.Path(__file__).parent.parent
DOCS = [page for page in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in page.parts]
PAGES = [ROOT / "README.md", *DOCS, ROOT / "CHANGELOG.md", *sorted(ROOT.glob("examples/*/*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


def blocks_of(language):
    """The fenced code of all pages in a language, by page and number."""
    return {
        f"{name}:{i}": block
        for name, page in zip(IDS, PAGES, strict=True)
        for i, block in enumerate(
            re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
        )
    }


BLOCKS, CELLS, SHELL = map(blocks_of, ("python", r"\{code-cell\} python", "bash"))


def write_checkpoint(folder):
    """Writes the checkpoint of a network whose devices keep their own statistics."""
    layer = MemorizedBatchNorm(use_running_average=False, memory_size=2)
    variables = layer.init(jax.random.key(0), jnp.zeros((4, 3)))
    state = TrainState.create(variables, optax.sgd(0.1), jax.random.key(0))
    folder.parent.mkdir(parents=True)
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        checkpoints.save(replicate(state), local_statistics=True)


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.slow
def test_python_in_the_docs_runs(block, monkeypatch, tmp_path):
    results = tmp_path / "runs" / "memory_size" / "results.parquet"  # What one block reads.
    results.parent.mkdir(parents=True)
    columns = {"norm.memory_size": [1, 4], "last": [True, True], "test_error": [0.5, 0.1]}
    pd.DataFrame(columns).to_parquet(results)
    monkeypatch.chdir(tmp_path)
    if "/shared/imagenet" in block:  # What another reads.
        block = block.replace("/shared/imagenet", str(tmp_path / "imagenet"))
        write_checkpoint(tmp_path / "imagenet" / "checkpoints")
    names = {}
    exec(compile(block, "docs", "exec"), names)
    if "folded" in names and "params" in names:
        assert names["folded"]["batch_stats"]["mean"].shape == (3,)
    if "get_sweep" in names:
        monkeypatch.chdir(ROOT)
        assert names["get_sweep"]().members()


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_cells_of_the_tutorial_parse(cell):
    # The build of the site executes them.
    compile(re.sub(r"^:.*\n", "", cell), "docs", "exec")


@pytest.mark.parametrize("block", SHELL.values(), ids=SHELL)
def test_shell_in_the_docs_parses(block):
    subprocess.run(["bash", "-n"], input=block, text=True, check=True)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_fence_names_a_language_that_is_checked(page):
    fences = re.findall(r"^```([^\n]*)\n.*?^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    shown = {"", "text"}  # Output and trees of files.
    directives = re.compile(r"\{(toctree|eval-rst|config-fields|command-help)\}")
    code = {fence for fence in fences if not directives.match(fence)}
    assert code <= {"python", "{code-cell} python", "bash"} | shown


def test_readme_has_an_example_of_the_layer_and_the_step():
    readme = [block for name, block in BLOCKS.items() if name.startswith("README.md")]
    assert any("MemorizedBatchNorm" in block and "make_train_step" in block for block in readme)


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
@pytest.mark.slow
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


READERS = {"mbn-eval": eval_command, "mbn-report": report_command}
"""Of what a run or a sweep wrote."""


@pytest.mark.parametrize("block", SHELL.values(), ids=SHELL)
def test_commands_that_read_a_workdir_parse(block, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for program, *words in map(shlex.split, re.findall(r"^mbn-(?:eval|report) .*", block, re.M)):
        with pytest.raises(UserError, match="runs/"):  # Nothing has run there.
            READERS[program](words)


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
