"""The README's code runs as it stands, and the commands that it names exist."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_in_the_readme_runs(block):
    exec(compile(block, "README.md", "exec"), {})


def test_readme_has_an_example_of_the_layer_and_the_step():
    assert any("MemorizedBatchNorm" in block and "make_train_step" in block for block in BLOCKS)


@pytest.mark.parametrize("page", [README, *(p.read_text() for p in (ROOT / "docs").glob("*.md"))])
def test_files_that_the_docs_name_exist(page):
    named = re.findall(
        r"\b(?:configs|experiments|docs|mbn_jax|tests)/[\w/]+\.(?:py|md|png)\b", page
    )
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_links_in_the_docs_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)
