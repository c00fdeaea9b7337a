"""What a step costs, in counts that do not vary: of the compiled program, and of what is kept."""

import functools
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbn_jax import MemorizedBatchNorm
from mbn_jax.models import MODELS, vgg

SCRIPT = pathlib.Path(__file__).parents[1] / "experiments" / "scripts" / "step_cost.py"


@pytest.fixture(scope="module")
def step_cost():
    spec = importlib.util.spec_from_file_location("step_cost", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def counts(step_cost):
    """Counts of a step of ResNet-20 at batch size 32, as ratios to that with flax's BatchNorm."""
    step = functools.cache(
        lambda name: (
            step_cost.Step(
                step_cost.CASES[name],
                model="cifar_resnet20",
                batch_size=32,
                image_size=32,
                dtype="float32",
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


def test_the_table_is_printed_and_saved(step_cost, tmp_path, monkeypatch, capsys):
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
