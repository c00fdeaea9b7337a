"""The step: against a hand-written loop, for any norm, with and without the second forward."""

import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mbn_jax import MemorizedBatchNorm, TrainState, make_train_step

NORMS = {"memorized": MemorizedBatchNorm, "batch": nn.BatchNorm}


class Net(nn.Module):
    norm: type[nn.Module]
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train):
        x = self.norm(use_running_average=not train)(nn.Dense(8)(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(x))
        x = self.norm(use_running_average=not train)(nn.Dense(8)(x))
        return nn.Dense(3)(nn.relu(x))


def loss_fn(apply, batch):
    logits, updates = apply(batch["x"], train=True)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
    return loss, ({"examples": batch["y"].shape[0]}, updates)


@pytest.fixture
def batches():
    rng = np.random.default_rng(0)
    return [
        {"x": jnp.asarray(rng.normal(size=(16, 5)), jnp.float32), "y": jnp.arange(16) % 3}
        for _ in range(4)
    ]


def make_state(model, tx, batch):
    variables = model.init(jax.random.key(0), batch["x"][:1], train=False)
    return TrainState.create(variables, tx, jax.random.key(1))


def assert_trees_equal(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("double_forward", ["off", "rewrite"])
@pytest.mark.slow
def test_equals_two_applies_written_by_hand(norm, double_forward, batches):
    model, tx = Net(norm), optax.sgd(0.1, momentum=0.9)
    step = jax.jit(make_train_step(model.apply, tx, loss_fn, double_forward=double_forward))
    state = make_state(model, tx, batches[0])
    params, stats, opt_state = state.params, state.batch_stats, state.opt_state

    def by_hand(params, stats, opt_state, batch):
        def loss(params):
            logits, updates = model.apply(
                {"params": params, "batch_stats": stats},
                batch["x"],
                train=True,
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
            return losses.mean(), updates["batch_stats"]

        (value, first), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        second = loss(params)[1]
        return value, params, second if double_forward == "rewrite" else first, opt_state

    for batch in batches:
        state, metrics = step(state, batch)
        loss, params, stats, opt_state = jax.jit(by_hand)(params, stats, opt_state, batch)
        # The same program but for what the compiler fuses: a few units in the last place.
        tolerance = {"rtol": 1e-5, "atol": 1e-6}
        assert_trees_equal(state.params, params, **tolerance)
        assert_trees_equal(state.batch_stats, stats, **tolerance)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert int(state.step) == len(batches)
    assert metrics["examples"].dtype == jnp.float32
    assert float(metrics["examples"]) == 16


@pytest.mark.slow
def test_rewriting_pushes_one_slot_a_step_and_describes_the_new_parameters(batches):
    model, tx = Net(MemorizedBatchNorm), optax.sgd(0.5)
    before = make_state(model, tx, batches[0])
    states = {
        mode: jax.jit(make_train_step(model.apply, tx, loss_fn, double_forward=mode))(
            before, batches[0]
        )[0]
        for mode in ("off", "rewrite")
    }
    memory = states["rewrite"].batch_stats["MemorizedBatchNorm_0"]
    assert (memory["count"] > 0).sum(0).tolist() == [1] * 8
    dense = states["rewrite"].params["Dense_0"]
    new_mean = (batches[0]["x"] @ dense["kernel"] + dense["bias"][None]).mean(0)
    # Means of 16 float32 numbers of order 1.
    np.testing.assert_allclose(memory["mean"][0], new_mean, atol=1e-6)
    stale = states["off"].batch_stats["MemorizedBatchNorm_0"]["mean"][0]
    assert np.abs(stale - new_mean).max() > 1e-2


@pytest.mark.slow
def test_inference_on_the_batch_equals_the_second_forward(batches):
    model, tx = Net(MemorizedBatchNorm), optax.sgd(0.5)
    step = jax.jit(make_train_step(model.apply, tx, loss_fn))
    state = make_state(model, tx, batches[0])
    for batch in batches:
        stats, (state, _) = state.batch_stats, step(state, batch)
        second, _ = model.apply(
            {"params": state.params, "batch_stats": stats},
            batch["x"],
            train=True,
            mutable=["batch_stats"],
        )
        inferred = model.apply(
            {"params": state.params, "batch_stats": state.batch_stats}, batch["x"], train=False
        )
        # 1e-6 of the output's scale a layer: rounding of the same numbers in another program.
        np.testing.assert_allclose(inferred, second, atol=3e-6 * np.abs(second).max())


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.slow
def test_dropout_is_the_same_in_both_forwards(norm, batches):
    model, tx = Net(norm, dropout=0.5), optax.sgd(0.0)
    state = make_state(model, tx, batches[0])
    stats = [
        jax.jit(make_train_step(model.apply, tx, loss_fn, double_forward=mode))(state, batches[0])
        for mode in ("off", "rewrite")
    ]
    # Nothing moved, so only another dropout mask could make a difference beyond rounding.
    assert_trees_equal(stats[0][0].batch_stats, stats[1][0].batch_stats, rtol=1e-5, atol=1e-6)
    other = state.replace(step=state.step + 1)
    moved, _ = jax.jit(make_train_step(model.apply, tx, loss_fn))(other, batches[0])
    last = sorted(moved.batch_stats)[-1]
    assert np.abs(moved.batch_stats[last]["mean"] - stats[1][0].batch_stats[last]["mean"]).max() > 0


def test_refuses_what_it_cannot_do(batches):
    with pytest.raises(ValueError, match=r"double_forward must be one of .*got 'on'"):
        make_train_step(lambda: None, optax.sgd(0.1), loss_fn, double_forward="on")
    with pytest.raises(ValueError, match=r"the model also has \['cache'\]"):
        TrainState.create({"params": {}, "cache": {}}, optax.sgd(0.1), jax.random.key(0))


def test_layer_and_step_import_none_of_the_framework():
    code = (
        "import sys, mbn_jax\n"
        "heavy = ['tensorflow_datasets', 'grain', 'matplotlib', 'tensorboardX', 'ml_collections']\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
