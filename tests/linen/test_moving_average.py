"""`MovingAverageBatchNorm`: both passes, against NumPy and flax, in one step and over devices."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from stepping import Net, batches, loss_fn, run

from mbn_jax import TrainState, VirtualBatches, make_train_step, recalibrate, to_batch_norm
from mbn_jax.core.batch_stats import layers_with_statistics
from mbn_jax.linen.moving_average import MovingAverageBatchNorm

LAYER = "MovingAverageBatchNorm_0"
short = functools.partial(
    MovingAverageBatchNorm, forward_batches=3, backward_batches=4, warmup_steps=2
)
sgd = optax.sgd(0.1)


def variables_of(state):
    return {"params": state.params, "batch_stats": state.batch_stats}


class Inputs(nn.Module):
    """A layer whose inputs are the parameters, so that an update shows their gradient."""

    norm: object

    @nn.compact
    def __call__(self, train):
        x = self.param("x", lambda key: jax.random.normal(key, (6, 2)) + 1)
        return self.norm(use_running_average=not train, use_scale=False, use_bias=False)(x)


def weighted_sum(apply, weights):
    y, updates = apply(train=True)
    return (weights * y).sum(), ({}, updates)


def in_numpy(x, weights, layer, rate):
    """The inputs after steps of gradient descent, in float64."""
    forward, backward, running = [], [], np.ones(2)
    for step, g in enumerate(weights):
        is_warm = step >= layer.warmup_steps
        forward.insert(0, (x.mean(0), (x**2).mean(0)))
        used = np.mean(forward[: layer.forward_batches if is_warm else 1], 0)
        mean = used[0] if layer.center else 0
        var = used[1] - mean**2
        s = np.sqrt(var + layer.epsilon)
        n = (x - mean) / s
        r = np.clip(s / np.sqrt(running + layer.epsilon), 1 / layer.r_max, layer.r_max)
        h = g * (r if step >= layer.correction_steps else 1)
        backward.insert(0, (h.mean(0), (h * n).mean(0)))
        a, b = np.mean(backward[: layer.backward_batches if is_warm else 1], 0)
        x = x - rate * (h - (a if layer.center else 0) - n * b) / s
        running = layer.momentum * running + (1 - layer.momentum) * var
    return x


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("correction_steps", [100, 3])
def test_both_passes_are_those_of_numpy(center, correction_steps):
    norm = functools.partial(
        short, center=center, correction_steps=correction_steps, r_max=1.2, momentum=0.5
    )
    model, tx = Inputs(norm), optax.sgd(0.3)
    state = TrainState.create(model.init(jax.random.key(0), False), tx, jax.random.key(1))
    weights = np.random.default_rng(0).normal(size=(9, 6, 2))
    expected = in_numpy(np.float64(state.params["x"]), weights, norm(), 0.3)
    step = jax.jit(make_train_step(model.apply, tx, weighted_sum, double_forward="off"))
    for g in weights:
        state, _ = step(state, jnp.float32(g))
    # Nine steps of float32 arithmetic on numbers of size 1.
    np.testing.assert_allclose(state.params["x"], expected, atol=2e-5)


@pytest.mark.parametrize("mode", ["off", "rewrite"])
def test_one_batch_with_centering_is_batch_normalization(mode):
    one = functools.partial(short, center=True, forward_batches=1, backward_batches=1)
    state = run(Net(one), sgd, batches(4), mode)
    expected = run(Net(nn.BatchNorm), sgd, batches(4), mode)
    jax.tree.map(
        # flax's one-pass variance is the less exact side.
        functools.partial(np.testing.assert_allclose, atol=1e-5),
        state.params["Dense_0"],
        expected.params["Dense_0"],
    )


def test_data_far_from_zero_is_normalized():
    layer = MovingAverageBatchNorm(center=True, warmup_steps=1, use_running_average=False)
    rng = np.random.default_rng(0)
    variables = layer.init(jax.random.key(0), jnp.zeros((64, 3)))
    for _ in range(4):
        x = jnp.float32(1000 + 0.1 * rng.normal(size=(64, 3)))
        y, updates = layer.apply(variables, x, mutable=["batch_stats"])
        variables = variables | updates
    # The first batch, around 0, is as inexact as flax's; it has a quarter of the weight.
    assert 0.1 < float(y.std()) < 3


def test_a_gradient_outside_of_the_step_is_refused():
    layer = short(use_running_average=False)
    x = batches(1)[0]
    variables = layer.init(jax.random.key(0), x)

    def loss(x):
        return layer.apply(variables, x, mutable=["batch_stats"])[0].sum()

    assert jnp.isfinite(loss(x))
    with pytest.raises(ValueError, match=r"MovingAverageBatchNorm needs .*make_train_step"):
        jax.grad(loss)(x)


def test_transport_and_impossible_options_are_refused():
    with pytest.raises(ValueError, match="no layer has a memory"):
        run(Net(short), sgd, batches(1), "transport")
    with pytest.raises(ValueError, match="forward_batches must be 1 or more, got 0"):
        MovingAverageBatchNorm(forward_batches=0)
    with pytest.raises(ValueError, match=r"r_max must be 1 or more, got 0\.5"):
        MovingAverageBatchNorm(r_max=0.5)


class Twice(nn.Module):
    norm: object = short

    @nn.compact
    def __call__(self, x, train):
        norm = self.norm(use_running_average=not train)
        return norm(x) + norm(x)


def test_a_layer_called_twice_hands_on_the_mean_of_its_backward_statistics():
    data = batches(2)
    state = run(Twice(), sgd, data[:1], "off")
    total, calls = np.split(state.batch_stats[LAYER]["backward_sums"], [2])
    np.testing.assert_array_equal(calls, 2)
    after = run(Twice(), sgd, data[1:], "off", state=state)
    # The second call of the step pushes nothing: it has no backward statistics of its own.
    kept = after.batch_stats[LAYER]["backward"]
    np.testing.assert_allclose(kept[0, :2], total / 2, rtol=1e-6)
    np.testing.assert_array_equal(kept[0, 2], 1)
    np.testing.assert_array_equal(kept[1:], 0)


def test_a_masked_batch_and_a_nan_hand_on_no_statistics():
    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x, mask, train):
            return short(use_running_average=not train)(nn.Dense(3)(x), mask=mask)

    def loss(apply, batch):
        y, updates = apply(*batch, train=True)
        return jnp.where(batch[1], y, 0).sum(), ({}, updates)

    x = batches(1)[0]
    model, rows = Masked(), jnp.arange(16)[:, None] < 12
    state = TrainState.create(model.init(jax.random.key(0), x, rows, False), sgd, jax.random.key(1))
    step = jax.jit(make_train_step(model.apply, sgd, loss, double_forward="off"))
    poisoned = jnp.where(rows, x, jnp.nan)
    first, expected = (step(state, (data, rows))[0] for data in (poisoned, x))
    jax.tree.map(np.testing.assert_array_equal, first.batch_stats, expected.batch_stats)
    none, _ = step(first, (x, jnp.zeros_like(rows)))
    np.testing.assert_array_equal(none.batch_stats[LAYER]["backward_sums"], 0)
    np.testing.assert_array_equal(
        none.batch_stats[LAYER]["forward"], first.batch_stats[LAYER]["forward"]
    )


@pytest.mark.parametrize("warmup_steps", [0, 100])
def test_a_batch_that_is_not_finite_spoils_no_statistics(warmup_steps):
    layer = MovingAverageBatchNorm(warmup_steps=warmup_steps, use_running_average=False)
    x = batches(1)[0]
    variables = layer.init(jax.random.key(0), x)
    _, before = layer.apply(variables, x, mutable=["batch_stats"])
    _, after = layer.apply(variables | before, x.at[0].set(jnp.nan), mutable=["batch_stats"])
    names = ("mean", "forward", "backward", *(("var",) if warmup_steps else ()))
    for name in names:
        kept, expected = (tree["batch_stats"][name] for tree in (after, before))
        np.testing.assert_array_equal(kept, expected)
    assert jnp.isfinite(after["batch_stats"]["var"]).all()


@pytest.mark.slow
def test_synced_devices_are_one_device():
    data = batches(6)
    expected = run(Net(short), sgd, data, "rewrite")
    model = Net(functools.partial(short, axis_name="batch"))
    variables = model.init(jax.random.key(0), data[0], train=False)
    state = TrainState.create(variables, sgd, jax.random.key(1))
    step = jax.vmap(
        make_train_step(model.apply, sgd, loss_fn, axis_name="batch"),
        in_axes=(None, 0),
        out_axes=0,
        axis_name="batch",
    )
    for x in data:
        states, _ = step(state, x.reshape(4, 4, -1))
        state = jax.tree.map(lambda leaf: leaf[0], states)
    jax.tree.map(
        # Sums over devices are added in another order.
        functools.partial(np.testing.assert_allclose, atol=2e-6),
        (state.params, state.batch_stats),
        (expected.params, expected.batch_stats),
    )


def test_virtual_batches_keep_backward_statistics_of_their_own():
    model = Net(functools.partial(VirtualBatches, short, 4))
    state = run(model, sgd, batches(5), "off")
    stats = state.batch_stats["VirtualBatches_0"]
    assert stats["backward"].shape == (4, 4, 3, 6)
    assert len(np.unique(stats["backward"][:, 0, 1, 0])) == 4
    assert jnp.isfinite(model.apply(variables_of(state), batches(1)[0], train=False)).all()


@pytest.mark.parametrize("center", [False, True])
def test_recalibration_and_folding_read_what_inference_normalizes_by(center):
    norm = functools.partial(short, center=center)
    model, x = Net(norm), batches(1)[0] + 3
    state = run(model, sgd, batches(5) + 3, "off")

    def apply(variables, x, **options):
        return model.apply(variables, x, train=False, **options)

    fresh = recalibrate(apply, variables_of(state), [x])
    [stats] = layers_with_statistics(fresh).values()
    inputs = nn.Dense(6).apply({"params": state.params["Dense_0"]}, x)
    mean = inputs.mean(0) if center else jnp.zeros(6)
    np.testing.assert_allclose(stats["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(stats["var"], ((inputs - mean[None]) ** 2).mean(0), rtol=1e-5)
    variables = {"params": state.params, "batch_stats": fresh}
    np.testing.assert_allclose(
        Net(nn.BatchNorm).apply(to_batch_norm(variables), x, train=False),
        apply(variables, x),
        atol=1e-5,
    )
