"""Paths and fields on the command line."""

import os
import pwd
import subprocess
import sys

import pytest

import mbn_jax
from mbn_jax.command_line import add_config_fields, command_parser, folder, parse_with_fields
from mbn_jax.datasets.find import open_split as load_split
from mbn_jax.datasets.tfds_splits import find_data_dir
from mbn_jax.errors import UserError
from mbn_jax.parallel.devices import keep_compiled_programs


def test_home_is_expanded_where_it_is_known(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder("~/x") == tmp_path / "x"
    assert find_data_dir("~/d") == f"{tmp_path}/d"
    assert find_data_dir("") is None
    assert find_data_dir("/data/~") == "/data/~"


@pytest.fixture
def homeless(monkeypatch):
    """A user without HOME, whom the system does not know."""

    def unknown(*_):
        raise KeyError("uid not found")

    for name in ("HOME", "XDG_CACHE_HOME", "TFDS_DATA_DIR", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(pwd, "getpwnam", unknown)


@pytest.mark.usefixtures("homeless")
def test_a_user_without_a_home_is_told_and_no_folder_gets_its_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--workdir=~/x: the home folder of ~ is not known; write"):
        folder("~/x")
    with pytest.raises(UserError, match=r"dataset\.data_dir=~me/x: the home folder of ~me is not"):
        find_data_dir("~me/x")
    with pytest.raises(UserError, match=r"home folder, which is not known; set dataset\.data_dir"):
        load_split("digits", "train")
    keep_compiled_programs()
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert find_data_dir(None) is None


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_data_folder_that_cannot_be_written_is_named():
    with pytest.raises(
        UserError, match=r"prepared in /proc/nothing .*; set dataset\.data_dir to a"
    ):
        load_split("digits", "train", data_dir="/proc/nothing")


def test_fields_may_have_their_value_after_them():
    parser = command_parser("mbn-train", "")
    parser.add_argument("--workdir")
    argv = ["--config.seed", "3", "--workdir=w", "--config.norm.decay", "-1", "--config.x=1"]
    args, overrides = parse_with_fields(parser, argv)
    assert args.workdir == "w"
    assert overrides == ["--config.seed", "3", "--config.norm.decay", "-1", "--config.x=1"]
    for wrong in (["--config.seed=3", "4"], ["--sed=3"], ["-3"]):
        with pytest.raises(UserError, match=f"unknown argument {wrong[-1]}"):
            parse_with_fields(parser, wrong)


def test_a_field_before_a_positional_argument_needs_its_value_at_once(tmp_path):
    parser = command_parser("mbn-sweep", "")
    parser.add_argument("experiment")
    parser.add_argument("--workdir")
    add_config_fields(parser, "")
    file = tmp_path / "experiment.py"
    file.touch()
    for argv in (["--config.norm.decay", "0.9", str(file)], ["--config.norm.decay", "0.9"]):
        with pytest.raises(UserError, match=r"^--config.norm.decay needs =VALUE: .*decay=0\.9$"):
            parse_with_fields(parser, argv)
    for argv in (
        ["--config.dataset.flip", str(file)],  # True or False, the former without saying so.
        [str(file), "--config.dataset.flip"],
        [str(file), "--config.norm.decay", "0.9"],
    ):
        args, overrides = parse_with_fields(parser, argv)
        assert args.experiment == str(file)
        assert overrides == [text for text in argv if text != str(file)]
    for argv in (["--config.FIELD=3"], ["--config.FIELD", "3"]):
        with pytest.raises(UserError, match=r"--config\.FIELD stands for a field's name"):
            parse_with_fields(parser, [str(file), *argv])


def test_the_library_is_imported_when_it_is_used():
    program = (
        "import sys, mbn_jax; assert 'jax' not in sys.modules; "
        "from mbn_jax import *; assert TrainState and 'jax' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ)
    assert set(mbn_jax.__all__) <= set(dir(mbn_jax))
    assert all(getattr(mbn_jax, name).__name__ == name for name in mbn_jax.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Memorised'"):
        _ = mbn_jax.Memorised
