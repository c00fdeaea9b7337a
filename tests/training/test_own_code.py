"""Networks, data sets, norms, losses and optimizers that a config names by their import path."""

import functools
import json
import pathlib
import sys

import jax
import numpy as np
import pytest

from mbn_jax.errors import UserError
from mbn_jax.models import MODELS
from mbn_jax.names import import_path, named
from mbn_jax.sweeps.command import load_sweep
from mbn_jax.training.config import default_config, fields, program_key
from mbn_jax.training.config_files import parse_config, with_fields
from mbn_jax.training.evaluation import evaluate_run
from mbn_jax.training.hparams import HParams
from mbn_jax.training.loop import train
from mbn_jax.training.program import Programs
from mbn_jax.training.reporting import read_metrics
from mbn_jax.training.task import Task
from mbn_jax.training.workdir import load_config

HERE = pathlib.Path(__file__).parent
TWO_DEVICES = Programs(jax.devices()[:2])
FIELDS = {
    "import_dir": str(HERE),
    "dataset.name": "own_code:Signals",
    "model.name": "own_code:Net",
    "norm.name": "own_code:MyNorm",
    "loss.name": "own_code:Squares",
    "optimizer.name": "own_code:momentum_sgd",
    "norm.memory_size": 4,
    "batch_size": 8,
    "num_epochs": 2.0,
    "eval_batch_size": 16,
    "log_every_steps": 4,
}


def own_config(**changes):
    names = {name.replace("__", "."): value for name, value in changes.items()}
    return with_fields(default_config(), {**FIELDS, **names}, "the test")


train = functools.partial(train, programs=TWO_DEVICES)


@pytest.mark.slow
def test_what_a_config_names_is_trained_evaluated_recorded_and_resumed(tmp_path):
    config = own_config(double_forward="transport", recalibrate_batches=2, shift__every_steps=8)
    config.model.kwargs.widths = (3,)
    values = train(config, tmp_path)
    assert values["step"] == 16
    assert values["test_loss"] != values["recalibrated_test_loss"]
    assert 0 < values["test_above"] < 1
    assert {"train_above", "recalibrated_test_above"} <= set(values)
    assert any(name == "error_mean/MyNorm_1" for r in read_metrics(tmp_path) for name in r)
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model"]["kwargs"] == {"widths": [3]}
    rebuilt = load_config(tmp_path)
    assert program_key(rebuilt) == program_key(config)
    assert fields(rebuilt) == fields(config)
    assert train(rebuilt, tmp_path) == values
    evaluated = evaluate_run(tmp_path)
    # On other devices, in float32 sums of another order.
    assert evaluated["loss"] == pytest.approx(values["test_loss"], rel=1e-5)
    assert evaluated["above"] == pytest.approx(values["test_above"], rel=1e-5)
    assert evaluate_run(tmp_path, "test[:50%]")["split"] == "test[:50%]"
    config.model.kwargs.widths = (5,)
    with pytest.raises(UserError, match=r"model\.kwargs\.widths was \[3\] and is \[5\]"):
        train(config, tmp_path)


@pytest.mark.parametrize("norm", ["SlowNorm", "slow_norm"])
@pytest.mark.slow
def test_a_norm_of_ones_own_is_recalibrated_too(tmp_path, norm):
    config = own_config(norm__name=f"own_code:{norm}", recalibrate_batches=2, num_epochs=1.0)
    values = train(config, tmp_path)
    assert values["recalibrated_test_loss"] != values["test_loss"]


@pytest.mark.slow
def test_evaluation_is_exact_with_a_padded_last_batch(tmp_path):
    config = own_config(num_epochs=0.25)
    values = train(config, tmp_path)  # 22 examples, in batches of 16.
    program = TWO_DEVICES.get(config)
    state = program.init_state(config)
    from mbn_jax.training.checkpoints import Checkpoints
    from mbn_jax.training.workdir import CHECKPOINTS

    checkpoints = Checkpoints(tmp_path / CHECKPOINTS)
    state = checkpoints.restore(state, local_statistics=False, devices=TWO_DEVICES.devices)
    checkpoints.close()
    state = jax.tree.map(lambda x: x[0], jax.device_get(state.replace(key=None)))
    task = program.task
    test = task.test.in_memory
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    y = task.model(HParams.from_config(config)).apply(variables, test["x"], train=False)
    loss = (test["weight"] * (np.asarray(y) - test["y"]) ** 2).mean()
    above = (test["weight"] * (np.abs(y) > 1)).sum() / test["weight"].sum()
    assert values["test_loss"] == pytest.approx(loss, rel=1e-5)
    assert values["test_above"] == pytest.approx(above, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__name": "own_code:Nett"}, "'own_code' has no 'Nett'. Did you mean 'Net'"),
        ({"model__name": "no_such_module:Net"}, "no module 'no_such_module' in .*; run in the "),
        ({"model__name": "convnett"}, "model.name must be one of convnet, .* Did you mean 'convn"),
        ({"model__name": "own_code:NOT_CALLABLE"}, "must be a class or function, got int"),
        ({"model__kwargs__wdth": 3}, "has no argument 'wdth'. Did you mean 'width'?"),
        ({"model__name": "own_code:WithoutTrain"}, "a network must take train="),
        ({"model__name": "own_code:IgnoresNorm"}, "it never calls its norm="),
        ({"model__name": "own_code:WithoutNorm"}, "must take norm=, a factory"),
        ({"model__name": "own_code:Fails"}, r"KeyError: 'no such key' \(own_code.py, line \d+\)"),
        ({"model__dtype": "bfloat16"}, "model.dtype=bfloat16 needs a network with the argument"),
        ({"model__kwargs__widths": {"a": 1}}, "must be a number, a text, .* got ConfigDict"),
        ({"loss__name": "cross_entropy"}, "batches of .*KeyError: 'image'"),
        ({"loss__name": "own_code:MeanOnly"}, r"an array of shape \(2,\) .* got shape \(\)"),
        ({"loss__name": "own_code:NoUpdates"}, r"loss_fn must return \(loss, \(metrics, updates\)"),
        ({"loss__name": "own_code:plain_loss"}, "plain_loss.* missing|must name a class of losses"),
        ({"norm__name": "batch", "double_forward": "transport"}, "needs norm.name of memorized"),
        (
            {"norm__name": "flax.linen:BatchNorm", "double_forward": "transport"},
            "must move every memory, and cannot",
        ),
        ({"optimizer__weight_decay": 0.1}, "has none; set it to 0"),
        (
            {"optimizer__name": "optax:sgd"},
            "optimizer.momentum=0.9 is for sgd alone; set optimizer.kwargs.momentum for 'optax",
        ),
        (
            {"optimizer__kwargs__weight_decay": 0.1, "optimizer__name": "optax:adamw"},
            "optimizer.kwargs.weight_decay=0.1 would replace what a field of the config",
        ),
        ({"norm__kwargs__decay": 0.5}, "norm.kwargs.decay=0.5 would replace .* set the field"),
        (
            {"norm__kwargs__epsilon": 0.5, "norm__name": "group"},
            "norm.kwargs.epsilon=0.5 would replace",
        ),
        (
            {
                "model__kwargs__dtype": "bfloat16",
                "model__name": "convnet",
                "dataset__name": "digits",
                "loss__name": "cross_entropy",
            },
            "model.kwargs.dtype='bfloat16' would replace",
        ),
        (
            {"dataset__name": "own_code:the_same"},
            "has the same examples in train_split='train' and test_split='test'",
        ),
        ({"optimizer__name": "own_code:plain_loss"}, "missing 1 required positional argument"),
        ({"dataset__name": "own_code:uneven"}, r"Example 2 of .* 'x' of shape \(5, 2\)"),
        ({"dataset__name": "own_code:no_source"}, "returns a data source.* TypeError: object of"),
        ({"dataset__name": "own_code:arrays"}, "a data source.* its example 0 is of ndarray"),
        ({"dataset__name": "own_code:texts"}, "has 'text' of <U6, expected numbers under a text"),
        (
            {"dataset__name": "own_code:Unreadable"},
            r"^Example 3 of .*Unreadable.* cannot be read: OSError: no such record \(own_code",
        ),
        ({"dataset__train_split": "nothing"}, "for split 'nothing': ValueError"),
        ({"dataset__train_split": "train["}, r"'own_code:Signals' has no split 'train\[' \("),
        ({"dataset__image_size": 8}, "'own_code:Signals' is a function; resize in the data source"),
        ({"dataset__flip": True}, "move 'image' alone"),
        ({"dataset__classes_per_batch": 2}, "needs a whole number 'label'"),
        ({"dataset__test_split": "train[:10%]"}, "must be apart, and share 6 examples"),
    ],
)
def test_what_is_wrong_is_said_before_anything_compiles(changes, message, monkeypatch):
    monkeypatch.setattr(jax._src.compiler, "backend_compile_and_load", None)
    with pytest.raises(UserError, match=message):
        Task.build(own_config(**changes), num_devices=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / 0", r"'own_broken_0:Net' cannot be imported: ZeroDivisionError: division by zero"),
        ("import json\njson.lods", "'own_broken_1:Net' cannot be imported: .* has no attribute"),
    ],
)
def test_a_module_that_cannot_be_imported_is_told(text, message, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    name = message[1:].split(":")[0]
    (tmp_path / f"{name}.py").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        named(f"{name}:Net", {}, "model.name")
    assert "\n" not in str(error.value)


def test_every_short_name_is_also_an_import_path():
    assert named("mbn_jax.models.convnet:ConvNet", {}, "model.name") is MODELS["convnet"]
    config = own_config(
        dataset__name="mbn_jax.datasets.digits:Digits",
        model__name="mbn_jax.models.convnet:ConvNet",
        norm__name="mbn_jax:MemorizedBatchNorm",
        loss__name="mbn_jax.training.losses:CrossEntropy",
        optimizer__name="mbn_jax.training.optimizers:adam",
    )
    config.model.kwargs.features = [4, 4]
    task = Task.build(config, num_devices=2)
    assert task.model(HParams.from_config(config)).features == (4, 4)
    assert task.train.num_classes == 10


CONFIG = """
from mbn_jax.training.config import default_config
from beside import Net

class Here:
    pass

def get_config(argument="Net"):
    config = default_config()
    config.model.name = {"Net": Net, "Here": Here, "text": "beside:Net"}[argument]
    config.model.kwargs.width = 3
    return config
"""


def test_a_config_file_may_set_the_class_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside.py").write_text((HERE / "own_code.py").read_text())
    (tmp_path / "config.py").write_text(CONFIG)
    path = f"{tmp_path}/config.py"
    config = parse_config(path, ["--config.model.kwargs.width=8", "--config.seed=3"])
    assert (config.model.name, config.import_dir) == ("beside:Net", str(tmp_path))
    assert (
        config.to_json()
        == parse_config(
            f"{path}:text", ["--config.model.kwargs.width", "8", "--config.seed", "3"]
        ).to_json()
    )
    assert (config.model.kwargs.width, config.seed) == (8, 3)
    new = parse_config(path, ["--config.model.kwargs.widths=(1, 2)", "--config.loss.kwargs.a=b"])
    assert new.model.kwargs.widths == (1, 2)
    assert new.loss.kwargs.a == "b"
    with pytest.raises(UserError, match=r"no field model\.kwargs\.a\.b; kwargs have no groups"):
        parse_config(path, ["--config.model.kwargs.a.b=1"])
    with pytest.raises(UserError, match=r"that a module has under its own name, got .*Here"):
        parse_config(f"{path}:Here")
    assert import_path(Task) == "mbn_jax.training.task:Task"


def test_members_of_a_sweep_may_differ_in_what_is_the_users_own(tmp_path):
    (tmp_path / "config.py").write_text(
        "from mbn_jax.training.config import default_config as get_config\n"
    )
    (tmp_path / "experiment.py").write_text(
        "from mbn_jax.sweeps import Sweep\n"
        "def get_sweep():\n"
        "  return Sweep(title='Own', configs={'digits': 'config.py'}, seeds=1, axes={\n"
        "    'model.name': ('convnet', 'own_code:Net'), 'optimizer.kwargs.decay': (0.5, 0.9)})\n"
    )
    sweep, config = load_sweep(str(tmp_path / "experiment.py"), [], None)
    assert config.import_dir == str(tmp_path)
    configs = [member.config(config) for member in sweep.members()]
    assert [c.optimizer.kwargs.decay for c in configs] == [0.5, 0.9, 0.5, 0.9]
    assert len({program_key(c) for c in configs}) == 4
