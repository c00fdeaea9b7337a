"""What imports what: the library stands on few packages, and modules depend one way."""

import ast
import contextlib
import graphlib
import importlib.metadata
import json
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.specifiers import SpecifierSet

ROOT = pathlib.Path(__file__).parent.parent
LIBRARY_PACKAGES = {"jax", "flax", "optax", "numpy"}
# Of each room of the library: packages it may import, and other parts of mbn_jax.
LIBRARY = {
    "core": ({"jax", "numpy"}, set()),
    "linen": (LIBRARY_PACKAGES, {"core"}),
    "statistics": (LIBRARY_PACKAGES, {"core", "linen"}),
    "nnx": (LIBRARY_PACKAGES, {"core", "step"}),
    "step": (LIBRARY_PACKAGES, {"core", "errors"}),
}
# Imported by other packages of the extra, or read as files, not imported by mbn_jax.
INDIRECT = {"importlib_resources", "pyarrow", "sklearn"}


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / "mbn_jax").rglob("*.py"))}


def imports(name: str) -> set[str]:
    """Returns what a module imports, anywhere in it: modules of mbn_jax, and other packages."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            targets = [full if full in MODULES else node.module for full in submodules]
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith("import_module")
            and isinstance(node.args[0], ast.Constant)
        ):
            targets = [node.args[0].value]
        else:
            continue
        found |= {t if t.split(".")[0] == "mbn_jax" else t.split(".")[0] for t in targets}
    return found - set(sys.stdlib_module_names)


GRAPH = {name: imports(name) for name in MODULES}


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def packages(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] != "mbn_jax"}


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) in LIBRARY])
def test_a_module_of_the_library_imports_few_packages_and_rooms(name):
    may_import, may_use = LIBRARY[room(name)]
    assert packages(GRAPH[name]) <= may_import
    rooms = {room(used) for used in GRAPH[name] - packages(GRAPH[name])}
    assert rooms <= may_use | {room(name)}


def test_the_package_itself_imports_the_library_alone():
    assert not packages(GRAPH["mbn_jax"])
    assert {room(used) for used in GRAPH["mbn_jax"]} <= set(LIBRARY)


def test_no_module_imports_itself_through_others():
    modules = {name: used & set(MODULES) for name, used in GRAPH.items()}
    graphlib.TopologicalSorter(modules).prepare()  # Raises CycleError and names the circle.


TRAIN_PACKAGES = set().union(*map(packages, GRAPH.values())) - LIBRARY_PACKAGES


def packages_in_memory(imported: str) -> set[str]:
    program = f"import json, sys, {imported}\nprint(json.dumps(sorted(sys.modules)))"
    command = [sys.executable, "-c", program]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    return {name.split(".")[0] for name in json.loads(output.splitlines()[-1])}


@pytest.fixture(scope="module")
def dependencies_in_memory():
    return packages_in_memory(", ".join(sorted({*LIBRARY_PACKAGES, "flax.nnx"})))


@pytest.mark.slow
def test_importing_the_library_brings_no_package_but_its_dependencies(dependencies_in_memory):
    library = ["mbn_jax", *(name for name in MODULES if room(name) in LIBRARY)]
    brought = packages_in_memory(", ".join(library)) - dependencies_in_memory
    assert brought - set(sys.stdlib_module_names) == {"mbn_jax"}


def test_importing_the_package_waits_neither_for_jax_nor_for_nnx():
    assert not packages_in_memory("mbn_jax") & LIBRARY_PACKAGES
    assert packages_in_memory("mbn_jax.nnx") >= {"jax", "flax"}


def test_the_extra_has_what_the_framework_imports_and_no_more():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.match(r"[\w-]+", each)[0] for each in extras["optional-dependencies"]["train"]}
    distributions = importlib.metadata.packages_distributions()

    def normalized(names):
        return {re.sub(r"[-_.]+", "-", name).lower() for name in names}

    provided = {name: normalized(distributions[name]) for name in TRAIN_PACKAGES | INDIRECT}
    assert all(names & normalized(declared) for names in provided.values())
    assert normalized(declared) - LIBRARY_PACKAGES <= set().union(*provided.values())


def test_pinned_packages_run_on_the_oldest_python():
    """pip-compile takes what the Python runs on that it was called with, to the last digit."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = project["requires-python"].removeprefix(">=") + ".0"
    refusing, checked = {}, 0
    pins = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    for name, version in pins:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found = importlib.metadata.distribution(name)
            checked += found.version == version
            python = found.metadata["Requires-Python"] or ""
            if oldest not in SpecifierSet(python):
                refusing[name] = python
    assert not refusing
    assert checked > 100


ARGUMENTS = {
    "train": ["--config=configs/digits.py", "--workdir=nowhere"],
    "eval": ["--workdir=nowhere"],
    "sweep": ["experiments/memory_size.py", "--workdir=nowhere"],
    "report": ["nowhere"],
}


@pytest.mark.parametrize("is_missing", ["all", "ml_collections"])
@pytest.mark.slow
def test_commands_without_the_extra_say_so(dependencies_in_memory, is_missing):
    missing = sorted((TRAIN_PACKAGES | INDIRECT) - dependencies_in_memory)
    assert "optuna" in missing
    if is_missing != "all":
        missing = [is_missing]
    program = f"""
import importlib.util, sys
missing = {missing!r}
sys.modules.update(dict.fromkeys(missing))  # None: as if it were not installed.
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name in missing else find_spec(name)
import mbn_jax.main
for name, argv in {ARGUMENTS!r}.items():
    sys.argv = [f"mbn-{{name}}", *argv]
    try:
        getattr(mbn_jax.main, f"{{name}}_main")()
    except SystemExit as end:
        print(end.code)
"""
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    assert ended.stdout == "2\n2\n2\n2\n"
    told = re.sub(rf"\b({'|'.join(missing)}) is not", "PACKAGE is not", ended.stderr)
    assert told == "".join(
        f"mbn-{name}: the package PACKAGE is not installed; this command needs the extra 'train': "
        "pip install 'mbn-jax[train]'\n"
        for name in ARGUMENTS
    )
