"""The command line: every mistake is one sentence and a status, before anything compiles."""

import os
import pathlib
import subprocess
import sys

import pytest

from mbn_jax.errors import UserError
from mbn_jax.main import eval_command, train_command
from mbn_jax.training.config import default_config
from mbn_jax.training.config_files import parse_config
from mbn_jax.training.program import Program

ROOT = pathlib.Path(__file__).parent.parent
DIGITS = str(ROOT / "configs" / "digits.py")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.norm.memry_size=8"], "no field norm.memry_size; did you mean norm.memory_size"),
        (["--config.nrm.decay=1"], "no field nrm.decay; did you mean norm"),
        (["--config.batch_size.x=1"], "no field batch_size.x"),
        (["--config.norm=batch"], "norm is a group; set one of its fields: .*norm.name"),
        (["--config.norm.memory_size=many"], "norm.memory_size=many"),
        (["--config.norm.memory_size=1.5"], "norm.memory_size=1.5"),
        (
            ["--config.norm.memory_size=-1"],
            "norm.memory_size must be at most 65536 and 0 or more, got -1",
        ),
        (["--config.norm.decay=0"], r"norm.decay must be in \(0, 1\], got 0.0"),
        (["--config.norm.decay=1.5"], r"norm.decay must be in \(0, 1\], got 1.5"),
        (["--config.norm.gradient=throgh"], "norm.gradient must be .* Did you mean 'through'"),
        (["--config.norm.name=memorised"], "norm.name must be .* Did you mean 'memorized'"),
        (["--config.norm.sync=all"], "norm.sync must be one of sync, group, local, got 'all'"),
        (["--config.model.name=resnet"], "model.name must be one of convnet, .* got 'resnet'"),
        (
            ["--config.double_forward=on"],
            "must be one of off, rewrite, transport, got 'on'",
        ),
        (
            ["--config.double_forward=transport", "--config.norm.name=batch"],
            "needs norm.name of memorized, got 'batch'; others take 'rewrite'",
        ),
        (["--config.double_forward_fraction=0"], r"must be in \(0, 1\], got 0.0"),
        (
            ["--config.double_forward=off", "--config.double_forward_fraction=0.5"],
            "needs a second forward, and double_forward is 'off'",
        ),
        (
            ["--config.double_forward_fraction=0.5", "--config.norm.name=batch"],
            "needs norm.name of memorized without norm.virtual_batch_size, got 'batch'",
        ),
        (
            ["--config.batch_size=8", "--config.double_forward_fraction=0.5"],
            "must leave whole examples, got 0.5 of 1 examples on a device",
        ),
        (["--config.dataset.random_resized_crop=True"], "needs dataset.image_size, to crop to"),
        (
            ["--config.dataset.validation=True", "--config.dataset.train_split=train[:9]"],
            "validation divides a whole split, got .*'train.:9.'",
        ),
        (["--config.norm.memory_schedule.start_size=65"], "must be at most norm.memory_size=64"),
        (["--config.norm.memory_schedule.begin=1.0"], "0 <= begin < end <= 1, got 1.0 and 1.0"),
        (
            ["--config.batch_size=8", "--config.norm.virtual_batch_size=3"],
            "virtual_batch_size must be a multiple of the 8 devices .* got 3",
        ),
        (["--config.batch_size=0"], "batch_size must be 1 or more, got 0"),
        (["--config.batch_size=12"], "divisible by the 8 devices, got 12"),
        (["--config.batch_size=1440"], "at most the 1437 examples of split 'train'"),
        (["--config.norm.sync=group", "--config.norm.sync_group_size=3"], "must divide the 8"),
        (["--config.norm.sync=group", "--config.norm.sync_group_size=0"], "must be 1 or more"),
        (["--config.model.features=(0,)"], r"model.features must be whole .* got \(0,\)"),
        (
            ["--config.norm.name=group", "--config.norm.num_groups=5"],
            r"norm 'group' cannot take images of \(8, 8, 1\): Number of groups \(5\) does not",
        ),
        (
            ["--config.shift.every_steps=5", "--config.shift.layers=Norm_9"],
            "shift.layers='Norm_9' matches no normalization layer of 'convnet'",
        ),
        (["--config.shift.layers=("], r"shift.layers must be a regular expression, got '\('"),
        (["--config.dataset.classes_per_batch=5"], "must divide batch_size=16, got 5"),
        (["--config.norm.memory_capacity=5"], "at least norm.memory_size=64"),
        (["--config.norm.batch_renorm.begin=0.5"], "begin must be at most r_end=0.25 and d_end"),
        (["--config.norm.batch_renorm.r_max=0.5"], "batch_renorm.r_max must be 1 or more"),
        (["--config.model.features=()"], "model.features must be whole numbers of 1 or more"),
        (["--config.norm.memory_size=99999999999"], "norm.memory_size must be at most 65536"),
        (["--config.schedule.warmup_epochs=9"], "a step before num_epochs=8.0, got 9.0: 801 steps"),
        (
            ["--config.num_epochs=1.05", "--config.schedule.warmup_epochs=1.047"],
            "a step before num_epochs=1.05, got 1.047: 93 steps of 93",
        ),
        (
            [
                "--config.schedule.name=step",
                "--config.schedule.warmup_epochs=1",
                "--config.schedule.step_epochs=(1.001,)",
            ],
            "schedule.step_epochs must rise .* at least a step apart, got .1.001",
        ),
        (
            ["--config.schedule.name=step", "--config.schedule.step_epochs=(3.0,9.0)"],
            "schedule.step_epochs must rise .* got .3.0, 9.0.",
        ),
        (["--config.num_epochs=0"], "num_epochs must be more than 0, got 0.0"),
        (["--config.num_epochs=nan"], "num_epochs must be more than 0, got nan"),
        (["--config.num_epochs=0.001"], "less than one step"),
        (["--config.optimizer.learning_rate=-1"], "learning_rate must be more than 0, got -1.0"),
        (["--config.dataset.name=digit"], "no data set 'digit'. Did you mean 'digits'"),
        (["--config.dataset.test_split=valid"], "'digits' has no examples in split 'valid'"),
        (["--config.log_every_steps=0"], "log_every_steps must be 1 or more, got 0"),
        (
            ["--config.steps_per_dispatch=8", "--config.log_every_steps=100"],
            "log_every_steps must be a multiple of steps_per_dispatch=8, got 100",
        ),
        (["--confg.norm.decay=1"], "unknown argument --confg.norm.decay=1; see --help"),
        (["extra"], "unknown argument extra; see --help"),
    ],
)
def test_mistakes_in_the_config(overrides, message, data_dir, tmp_path, monkeypatch):
    def compile_nothing(self, config):
        raise AssertionError("compiled before the check")

    monkeypatch.setattr(Program, "init_state", compile_nothing)
    fixed = ["--config.batch_size=16", f"--config.dataset.data_dir={data_dir}"]
    argv = [f"--config={DIGITS}", f"--workdir={tmp_path / 'run'}", *fixed, *overrides]
    with pytest.raises(UserError, match=message) as error:
        train_command(argv)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--config is missing; one that works: mbn-train --config=configs/digits.py"),
        ([f"--config={DIGITS}"], "--workdir is missing"),
        (["--config=nowhere.py", "--workdir=w"], "there is no file nowhere.py"),
        ([f"--config={DIGITS}", "--workdir=w", "--process_id=1"], "go together; give all three"),
        (
            [f"--config={DIGITS}", "--workdir=w", "--process_id=1", "--distributed"],
            "--distributed finds the other hosts itself",
        ),
        (
            [f"--config={DIGITS}", "--workdir=w", "--num_processes=2", "--no-distributed"],
            "--no-distributed wants none",
        ),
        (
            [f"--config={DIGITS}", "--workdir=hdfs://store/run"],
            "--workdir must be a folder or an address that begins with gs:// or s3://, got",
        ),
        ([f"--config={DIGITS}", "--workdir=w", "--distributed"], "cannot join the other hosts"),
    ],
)
def test_missing_arguments(argv, message):
    with pytest.raises(UserError, match=message):
        train_command(argv)


def test_a_broken_config_file_is_named(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("def get_config():\n  return 1 / 0\n")
    with pytest.raises(
        UserError,
        match=r"broken\.py: get_config\(\) failed: ZeroDivisionError: .* \(broken\.py, line 2\)$",
    ):
        parse_config(str(broken))
    (tmp_path / "neighbour.py").write_text("def value():\n\n  return int('many')\n")
    broken.write_text("import neighbour\ndef get_config():\n  return neighbour.value()\n")
    with pytest.raises(UserError, match=r"ValueError: .* \(neighbour\.py, line 3\)$"):
        parse_config(str(broken))
    broken.write_text("def get_config():\n  return (\n")
    with pytest.raises(UserError, match=r"SyntaxError: .* \(broken\.py, line 2\)$"):
        parse_config(str(broken))


def test_a_config_file_with_a_misspelt_field_is_refused(tmp_path):
    misspelt = tmp_path / "misspelt.py"
    misspelt.write_text(
        "from mbn_jax.training.config import default_config\n"
        "def get_config():\n  config = default_config()\n  config.batchsize = 2\n  return config\n"
    )
    with pytest.raises(
        UserError, match=r"misspelt\.py: get_config\(\) failed: AttributeError: .*batch_size"
    ):
        parse_config(str(misspelt))


def test_a_damaged_config_in_the_workdir(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        eval_command([f"--workdir={tmp_path}"])


def test_a_workdir_that_cannot_be_written(tmp_path, data_dir):
    (tmp_path / "file").write_text("")
    argv = [f"--config={DIGITS}", f"--workdir={tmp_path / 'file' / 'run'}"]
    argv += ["--config.batch_size=16", f"--config.dataset.data_dir={data_dir}"]
    with pytest.raises(UserError, match="Cannot write to --workdir"):
        train_command(argv)


def test_eval_without_a_run(tmp_path):
    with pytest.raises(UserError, match="not the folder of a run"):
        eval_command([f"--workdir={tmp_path}"])


def test_a_mistake_ends_with_a_sentence_a_status_and_no_traceback(tmp_path):
    command = [sys.executable, "-m", "mbn_jax.main", f"--config={DIGITS}"]
    result = subprocess.run(
        [*command, f"--workdir={tmp_path}", "--config.norm.decay=2"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": ""},
    )
    assert result.returncode == 2
    assert result.stderr == "mbn-train: norm.decay must be in (0, 1], got 2.0.\n"


UNRAISABLE = """
import mbn_jax.main
class Late:
    def __init__(self, text):
        self.text = text
    def __del__(self):
        raise RuntimeError(self.text)
def command(argv):
    for text in ("Event loop is closed", "something else"):
        Late(text)
    return 0
mbn_jax.main._run("mbn-train", command)
"""


def test_what_threads_say_late_of_a_full_disk_is_silent():
    told = subprocess.run([sys.executable, "-c", UNRAISABLE], capture_output=True, text=True)
    assert told.returncode == 0
    assert "something else" in told.stderr
    assert "Event loop" not in told.stderr


@pytest.mark.slow
def test_a_run_trains_without_assertions(tmp_path, data_dir):
    argv = [f"--config={DIGITS}", f"--workdir={tmp_path / 'run'}", "--config.num_epochs=0.1"]
    argv += ["--config.schedule.warmup_epochs=0.0", "--config.batch_size=8"]
    argv += [f"--config.dataset.data_dir={data_dir}", "--config.shift.every_steps=10"]
    trained = subprocess.run(
        [sys.executable, "-O", "-m", "mbn_jax.main", *argv], capture_output=True, text=True
    )
    assert trained.returncode == 0, trained.stderr
    assert "test error" in trained.stdout


def test_help_shows_commands_to_type():
    result = subprocess.run(
        [sys.executable, "-m", "mbn_jax.main", "--help"], capture_output=True, text=True, check=True
    )
    assert "mbn-train --config=configs/digits.py --workdir=runs/digits" in result.stdout
    assert "--config.FIELD" in result.stdout


def test_overrides_reach_every_kind_of_field():
    config = parse_config(
        DIGITS,
        [
            "--config.norm.memory_size=8",
            "--config.num_epochs=3",
            "--config.model.features=(4,)",
            "--config.dataset.flip",
            "--config.norm.sync=local",
        ],
    )
    assert config.norm.memory_size == 8
    assert (config.num_epochs, config.model.features) == (3.0, (4,))
    assert (config.dataset.flip, config.norm.sync) == (True, "local")


@pytest.mark.parametrize("path", sorted(map(str, (ROOT / "configs").glob("*.py"))))
def test_every_config_changes_known_fields_only(path):
    def fields(config, prefix=""):
        for name, value in config.items():
            if hasattr(value, "items"):
                yield from fields(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"

    assert set(fields(parse_config(path))) == set(fields(default_config()))


@pytest.mark.parametrize("chosen", [False, True])
def test_compiled_programs_are_kept_where_the_user_keeps_caches(tmp_path, chosen):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": ""}
    if chosen:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "mine")
    program = "from mbn_jax.parallel import devices; devices.keep_compiled_programs(); "
    program += "import jax; print(jax.config.jax_compilation_cache_dir)"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    expected = tmp_path / "mine" if chosen else tmp_path / "mbn_jax" / "compiled"
    assert done.stdout.strip() == str(expected)
