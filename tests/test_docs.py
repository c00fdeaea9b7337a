"""The README's code runs as it stands, and the commands that it names exist."""

import pathlib
import re

import pytest

from mbn_jax.sweeps.command import load_sweep
from mbn_jax.training.config_files import parse_config
from mbn_jax.training.rules import validate

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [b for p in PAGES for b in re.findall(r"```python\n(.*?)```", p.read_text(), re.DOTALL)]


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_in_the_docs_runs(block):
    names = {}
    exec(compile(block, "docs", "exec"), names)
    if "get_sweep" in names:
        assert names["get_sweep"]().members()


def test_readme_has_an_example_of_the_layer_and_the_step():
    assert any("MemorizedBatchNorm" in block and "make_train_step" in block for block in BLOCKS)


@pytest.mark.parametrize("experiment", sorted((ROOT / "experiments").glob("*.py")), ids=str)
def test_every_experiment_is_a_sweep_that_can_be_declared(experiment):
    if "def get_sweep" not in experiment.read_text():
        return
    sweep, config = load_sweep(str(experiment), [], None)
    assert len({member.folder for member in sweep.members()}) == len(sweep.members())
    assert config.dataset.name == next(iter(sweep.configs))
    for member in sweep.members():
        validate(member.config(config))
    _, config = load_sweep(str(experiment), ["--config.dataset.name=cifar10"], None)
    assert (config.dataset.name, config.dataset.image_size) == ("cifar10", 16)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_is_valid_and_says_how_to_run_it(path):
    validate(parse_config(str(path), []))
    assert f"mbn-train --config=configs/{path.name} " in path.read_text()


@pytest.mark.parametrize("page", [p.read_text() for p in PAGES], ids=[p.name for p in PAGES])
def test_files_that_the_docs_name_exist(page):
    named = re.findall(
        r"\b(?:configs|experiments|docs|mbn_jax|tests)/[\w/]+\.(?:py|md|png)\b", page
    )
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_links_in_the_docs_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)
