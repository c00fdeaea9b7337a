"""Config files: their arguments, their neighbours, and what a command line sets."""

import sys

import pytest

from mbn_jax.errors import UserError
from mbn_jax.training.checks import validate
from mbn_jax.training.config_files import call_in_file, parse_config
from mbn_jax.training.presets import PRESETS, preset_of

RETURNS = "from ml_collections import ConfigDict\ndef get_config({}):\n  return ConfigDict({})\n"


def test_a_config_file_may_take_an_argument(tmp_path, monkeypatch):
    (tmp_path / "takes.py").write_text(RETURNS.format("text", "{'text': text}"))
    (tmp_path / "may.py").write_text(RETURNS.format("text='none'", "{'text': text}"))
    (tmp_path / "none.py").write_text(RETURNS.format("", "{'text': ''}"))
    (tmp_path / "odd.py:x").write_text(RETURNS.format("", "{'text': 'odd'}"))
    assert parse_config(f"{tmp_path}/takes.py:resnet20,cifar10").text == "resnet20,cifar10"
    assert parse_config(f"{tmp_path}/takes.py:a:b").text == "a:b"
    assert parse_config(f"{tmp_path}/may.py").text == "none"
    assert parse_config(f"{tmp_path}/odd.py:x").text == "odd"
    assert parse_config(f"{tmp_path}/takes.py:a", ["--config.text=set"]).text == "set"
    with pytest.raises(UserError, match=r"takes\.py needs an argument; give it as .*takes\.py:ARG"):
        parse_config(f"{tmp_path}/takes.py")
    with pytest.raises(UserError, match=r"none\.py takes no argument, got 'resnet20'; use .*none"):
        parse_config(f"{tmp_path}/none.py:resnet20")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_config("~/takes.py:x").text == "x"


def test_a_preset_sets_several_fields_and_others_override_it(tmp_path):
    (tmp_path / "config.py").write_text(
        "from mbn_jax.training.config import default_config as get_config\n"
    )
    path = f"{tmp_path}/config.py"
    for name, fields in PRESETS.items():
        config = parse_config(path, ["--config.seed=1", f"--config.preset={name}"])
        validate(config)
        assert preset_of(config) == name
        config.update_from_flattened_dict(dict(fields))
        assert config == parse_config(path, [f"--config.preset={name}", "--config.seed=1"])
    both = ["--config.norm.memory_size=4", "--config.preset=paper"]
    config = parse_config(path, both)
    assert (config.norm.memory_size, config.norm.decay, preset_of(config)) == (4, 1.0, None)
    assert preset_of(parse_config(path)) is None
    with pytest.raises(UserError, match="preset must be one of paper, recommended, got 'papers'"):
        parse_config(path, ["--config.preset=papers"])
    with pytest.raises(UserError, match="give the preset as"):
        parse_config(path, ["--config.preset", "paper"])


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def read_neighbour(package=""):
    return f"def get_config():\n  from {package}neighbour import NAME\n  return NAME\n"


def test_a_file_imports_its_neighbours_and_those_of_the_users_project(tmp_path, monkeypatch):
    # An installed package of the same name, which Python itself would prefer.
    write(tmp_path / "installed" / "configs" / "__init__.py", "")
    write(tmp_path / "installed" / "configs" / "neighbour.py", "NAME = 'installed'\n")
    monkeypatch.syspath_prepend(tmp_path / "installed")
    for project in ("one", "two"):
        folder = tmp_path / project
        write(folder / "configs" / "neighbour.py", f"NAME = '{project}'\n")
        write(folder / "configs" / "a.py", read_neighbour())
        write(folder / "configs" / "b.py", read_neighbour("configs."))
        write(folder / "experiments" / "c.py", read_neighbour("configs."))
        write(folder / "experiments" / "deep" / "d.py", read_neighbour("configs."))
        before, path = set(sys.modules), list(sys.path)
        for name in ("configs/a.py", "configs/b.py", "experiments/c.py"):
            assert call_in_file(str(folder / name), "get_config") == project
        monkeypatch.chdir(folder)
        assert call_in_file("experiments/deep/d.py", "get_config") == project
        assert (set(sys.modules), sys.path) == (before, path)
    # Where the user has none, the installed one serves.
    write(tmp_path / "three" / "x" / "e.py", read_neighbour("configs."))
    monkeypatch.chdir(tmp_path / "three")
    assert call_in_file("x/e.py", "get_config") == "installed"


def test_a_folder_that_is_a_project_is_not_taken_for_the_package_in_it(tmp_path):
    write(tmp_path / "cfg.py", "def get_config():\n  import wave, tabnanny, ghost\n  return 1\n")
    write(tmp_path / "ghost" / "setup.py", "")
    write(tmp_path / "ghost" / "pyproject.toml", "")
    write(tmp_path / "wave.py", "raise RuntimeError('not the standard library')\n")
    with pytest.raises(UserError, match="No module named 'ghost'"):
        call_in_file(str(tmp_path / "cfg.py"), "get_config")
