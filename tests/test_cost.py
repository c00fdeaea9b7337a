"""What a step costs, in counts that do not vary: of the compiled program, and of what is kept.

Everything that reads a compiled program is here: its text, its FLOPs, its collectives. Another XLA
may compile otherwise. These were counted with jax and jaxlib 0.10.2, flax 0.12.8, on CPU.
"""

import functools
import json
import logging
import pathlib
import re
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import stepping
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mbn_jax import MemorizedBatchNorm, TrainState, make_train_step
from mbn_jax.errors import StoppedError
from mbn_jax.models import MODELS, vgg
from mbn_jax.parallel.devices import (
    AXIS_NAME,
    distribute,
    replicate,
    split_over_devices,
)
from mbn_jax.training.config import default_config
from mbn_jax.training.loop import train

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "experiments" / "scripts"))

import step_cost

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def counts():
    """Counts of a step of ResNet-20 at batch size 32, as ratios to that with flax's BatchNorm."""
    step = functools.cache(
        lambda name: (
            step_cost.Step(
                step_cost.CASES[name],
                model="cifar_resnet20",
                batch_size=32,
                image_size=32,
                dtype="float32",
                device=jax.devices()[0],  # Compiled for it alone: without a state, and not run.
            ).counts
        )
    )
    base = step(step_cost.BASE)
    return lambda name: {key: value / base[key] for key, value in step(name).items()}


def test_a_memorized_step_is_no_dearer_than_that_of_batch_norm(counts):
    found = counts("memorized, 64")
    assert found["FLOPs"] <= 1.005
    assert found["bytes"] <= 1.0
    assert found["memory"] <= 1.0


@pytest.mark.parametrize("mode", ["rewrite", "transport"])
def test_a_second_forward_is_a_third_of_a_step(counts, mode):
    found = counts(f"memorized, {mode}")
    assert found["FLOPs"] <= 1.339
    assert found["bytes"] <= 1.25
    assert found["memory"] <= 1.0


def test_a_second_forward_by_a_quarter_is_a_quarter_of_that(counts):
    found = counts("memorized, transport by 1/4")
    assert found["FLOPs"] <= 1.09
    assert found["bytes"] <= 1.06
    assert found["memory"] <= 1.001


def test_remat_keeps_a_third_between_forward_and_backward(counts):
    found = counts("memorized, remat")
    assert found["kept"] <= 1 / 3
    assert found["FLOPs"] <= 1.02


@pytest.mark.parametrize("name", ["convnet", "cifar_resnet8", "vgg16"])
def test_remat_changes_neither_variables_nor_gradients(name, monkeypatch):
    monkeypatch.setattr(vgg, "STAGES", ((4, 1), (8, 2)))  # Fewer take less time to compile.
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 32, 32, 3)), jnp.float32)

    def gradients(remat):
        norm = functools.partial(MemorizedBatchNorm, memory_size=2)
        model = MODELS[name](num_classes=3, norm=norm, remat=remat)
        variables = model.init(jax.random.key(0), x, train=False)

        @jax.jit
        def of_loss(params):
            def loss(params):
                y, updates = model.apply(
                    {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
                )
                return (y[:, 0] - 1).mean(), updates

            return jax.value_and_grad(loss, has_aux=True)(params)

        return variables, of_loss(variables["params"])

    (variables, expected), (same, actual) = gradients(False), gradients(True)
    jax.tree.map(np.testing.assert_array_equal, variables, same)
    # Computed once more, in another order: some roundoffs of the largest of an array.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()) + 1e-6),
        actual,
        expected,
    )


def test_the_table_is_printed_and_saved(tmp_path, monkeypatch, capsys):
    arguments = "--model=convnet --image_size=8 --batch_sizes=4 --rounds=1"
    cases = ["batch", "batch, step of flax's example", "memorized, transport by 1/4"]
    argv = [*arguments.split(), "--cases", *cases, f"--workdir={tmp_path}"]
    monkeypatch.setattr("sys.argv", ["step_cost.py", *argv])
    step_cost.main()
    printed = capsys.readouterr().out
    assert printed.strip() == (tmp_path / "step_cost.md").read_text().strip()
    found = [json.loads(line) for line in (tmp_path / "step_cost.jsonl").read_text().splitlines()]
    assert [row["step"] for row in found] == cases
    assert found[0]["time"] == found[0]["FLOPs"] == 1
    assert all(row["seconds"] >= row["host ms"] / 1e3 > 0 for row in found)


def test_two_programs_are_compiled_up_to_the_first_step(data_dir, tmp_path, caplog):
    config = default_config()
    config.dataset.data_dir = data_dir
    config.batch_size = 16
    config.model.features = (8, 8)
    compiled = []

    def stop_asked(first_step, last_step):
        assert (first_step, last_step) == (1, 1)
        told = (record.getMessage() for record in caplog.records)
        compiled.extend(line for line in told if line.startswith("Finished XLA compilation of"))
        return True

    jax.clear_caches()  # What other tests compiled would not count.
    jax.config.update("jax_log_compiles", True)  # In all threads.
    try:
        with caplog.at_level(logging.WARNING, "jax"), pytest.raises(StoppedError):
            train(config, tmp_path, stop_asked=stop_asked)
    finally:
        jax.config.update("jax_log_compiles", False)
    # The state before the step, and the step: no operation has a program of its own.
    assert len(compiled) == 2, compiled


SECOND_FORWARDS = {
    "off": {"double_forward": "off"},
    "rewrite": {},
    "transport": {"double_forward": "transport"},
    "transport by a part": {"double_forward": "transport", "double_forward_fraction": 0.5},
    "transport by a quarter": {"double_forward": "transport", "double_forward_fraction": 0.25},
    "rewrite by a part": {"double_forward_fraction": 0.5},
}


def step_of(model, second_forward, **options):
    options = {**SECOND_FORWARDS[second_forward], **options}
    return make_train_step(model.apply, optax.sgd(0.1), stepping.loss_fn, **options)


def state_of(model, x):
    variables = model.init(jax.random.key(0), x, train=False)
    return TrainState.create(variables, optax.sgd(0.1), jax.random.key(1))


def flops(model, second_forward, x):
    step, state = step_of(model, second_forward), state_of(model, x)
    return jax.jit(step).lower(state, x).compile().cost_analysis()["flops"]


def test_the_second_forward_computes_the_part_only():
    count = functools.partial(flops, stepping.Net(layers=3), x=jnp.ones((4096, 5)))
    off, full, quarter = map(count, ["off", "transport", "transport by a quarter"])
    # A quarter of the forward, and in layers so thin the moments of the part count for something.
    assert 0.25 < (quarter - off) / (full - off) < 0.4


def test_a_model_without_statistics_pays_nothing_for_the_second_forward():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(3)(nn.relu(nn.Dense(64)(x)))

    count = functools.partial(flops, Plain(), x=jnp.ones((16, 5)))
    assert count("off") == count("rewrite") > 0


LAYERS = 3
GROUPS = ((0, 1, 2, 3), (4, 5, 6, 7))
SYNCS = {
    "local": {},
    "all": {"axis_name": AXIS_NAME},
    "groups": {"axis_name": AXIS_NAME, "axis_index_groups": GROUPS},
    "all, two passes": {"axis_name": AXIS_NAME, "use_fast_variance": False},
}


def collectives(compiled):
    """The operands of each all-reduce, its groups of devices, and the names of what is no reduce.

    `-done` ends what `-start` began; only the start counts.
    """
    text = compiled.as_text()
    reduces = re.findall(
        r" all-reduce(?:-start)?\((.*?)\), .*?replica_groups=(\{\{.*?\}\}|\S+?),", text
    )
    kinds = r" (all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    operands = [arguments.count("%") for arguments, _ in reduces]
    return operands, [groups for _, groups in reduces], re.findall(kinds, text)


@pytest.mark.parametrize(
    ("sync", "second_forward", "of_a_layer"),
    [
        ("local", "off", 0),
        ("local", "transport by a part", 0),
        # One forward and one backward,
        ("all", "off", 2),
        # and one in the second forward, which has no backward; both parts in one.
        ("all", "rewrite", 3),
        ("all", "transport", 3),
        ("all", "transport by a part", 3),
        ("all", "rewrite by a part", 3),
        ("groups", "rewrite", 3),
        # Twice as many, and one more where the second forward has two batches to center.
        ("all, two passes", "off", 4),
        ("all, two passes", "transport", 6),
        ("all, two passes", "transport by a part", 7),
    ],
)
@pytest.mark.parametrize("runtime", stepping.RUNTIMES, ids=["pmap", "shard_map"])
def test_collectives_of_a_step(runtime, sync, second_forward, of_a_layer):
    model = stepping.Net(functools.partial(stepping.memorized, **SYNCS[sync]), LAYERS)
    data = stepping.batches(1, 32)[0]
    options = {"axis_name": AXIS_NAME, "local_statistics": not sync.startswith("all")}
    state = state_of(model, data)
    mapped = runtime(step_of(model, second_forward, **options))
    arguments = replicate(state), distribute(split_over_devices(data))
    operands, groups, others = collectives(mapped.lower(*arguments).compile())
    assert not others
    # One more for all gradients; that of the metrics is joined with another.
    assert len(operands) == of_a_layer * LAYERS + 1
    assert max(operands) >= len(jax.tree.leaves(state.params))
    over = groups.count("{{0,1,2,3},{4,5,6,7}}")
    assert over == (of_a_layer * LAYERS if sync == "groups" else 0)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    "norm", [stepping.memorized, stepping.endless], ids=["memorized", "endless"]
)
@pytest.mark.parametrize(
    ("second_forward", "of_a_layer", "permutes"),
    [
        # As many all-reduces as with an axis name and statistics synced over it, above.
        ("off", 2, 0),
        ("rewrite", 3, 0),
        ("transport", 3, 0),
        # The first examples of the global batch lie on some devices only, and move to the others.
        ("transport by a quarter", 3, 4 + 4 * LAYERS),
    ],
)
def test_collectives_of_a_sharded_step_without_an_axis_name(
    second_forward, of_a_layer, permutes, norm, axis_type
):
    data = stepping.batches(1, 32)[0]
    model = stepping.Net(norm, LAYERS)
    step, state = step_of(model, second_forward), state_of(model, data)
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(axis_type,))
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    data = jax.device_put(data, NamedSharding(mesh, PartitionSpec("data")))
    operands, _, others = collectives(jax.jit(step).lower(state, data).compile())
    assert len(operands) == of_a_layer * LAYERS + 1
    assert others == ["collective-permute"] * permutes
