"""A second forward on a part of the batch."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from stepping import (
    Net,
    changing,
    endless,
    loss_fn,
    memorized,
    moments,
    run,
    run_on_devices,
    stats_of,
)
from stepping import batches as any_batches

from mbn_jax import MemorizedBatchNorm, TrainState, make_train_step
from mbn_jax.core.double_forward import (
    BATCH_MOMENTS,
    RECORDS,
    SecondForward,
    forwards_of,
)
from mbn_jax.linen.batch_renorm import BatchRenorm
from mbn_jax.linen.virtual_batches import VirtualBatches
from mbn_jax.parallel.devices import AXIS_NAME, first_device

batches = functools.partial(any_batches, size=32)
run_quarter = functools.partial(run, double_forward_fraction=0.25)
both_modes = pytest.mark.parametrize("mode", ["rewrite", "transport"])
both_norms = pytest.mark.parametrize("norm", [memorized, endless], ids=["memorized", "endless"])


@both_modes
@pytest.mark.slow
def test_a_part_that_is_the_batch_is_the_full_scheme(mode):
    # Small steps, so that no bound binds.
    data, tx = batches(4), optax.sgd(0.1)
    full = run(Net(), tx, data, mode)
    part = run(Net(), tx, data, mode, double_forward_fraction=1 - 1e-12)
    # The same numbers in another order.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, part.batch_stats, full.batch_stats)
    first = run(Net(), tx, data, "off")
    assert np.abs(stats_of(full)["mean"] - stats_of(first)["mean"]).max() > 1e-3


@both_modes
def test_equals_the_part_by_hand_in_float64(mode):
    data, tx = batches(3), optax.sgd(0.3)
    before = run_quarter(Net(), tx, data[:2], mode)
    after = run_quarter(Net(), tx, data[2:], mode, state=before)

    def of(params, rows):
        dense = jax.tree.map(np.float64, params["Dense_0"])
        return moments(np.float64(data[2][:rows]) @ dense["kernel"] + dense["bias"])

    (m, v), (m_after, v_after) = of(before.params, 8), of(after.params, 8)
    if mode == "transport":
        assert np.abs(m_after - m).max() > 1e-3
    ratio = np.clip((v_after + 1e-5) / (v + 1e-5), 0.5, 2)

    def moved(mean, var):
        return mean + (m_after - m) + (np.sqrt(ratio) - 1) * (mean - m), var * ratio

    old, new = stats_of(before), stats_of(after)
    slots = [moved(*of(before.params, 32))]
    for mean, var in zip(old["mean"][:2], old["var"][:2], strict=True):
        slots.append(moved(mean, var) if mode == "transport" else (mean, var))
    for slot, (mean, var) in enumerate(slots):
        # Float32 against float64.
        np.testing.assert_allclose(new["mean"][slot], mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(new["var"][slot], var, rtol=1e-4)
    assert new["count"][:, 0].tolist() == [32, 32, 32, 0]


def test_a_scale_and_an_offset_move_every_slot_to_where_its_batch_is():
    data = batches(4)

    def change(params):
        dense = jax.tree.map(lambda x: 1.1 * x, params["Dense_0"])
        return {**params, "Dense_0": {**dense, "bias": dense["bias"] + 0.1}}

    state = run_quarter(Net(), changing(change), data)
    dense, memory = jax.tree.map(np.float64, state.params["Dense_0"]), stats_of(state)
    for slot, x in enumerate(reversed(data)):
        mean, var = moments(np.float64(x) @ dense["kernel"] + dense["bias"])
        # Float32 statistics, and epsilon's part in the ratio of variances of 0.1 and more.
        np.testing.assert_allclose(memory["mean"][slot], mean, atol=1e-5)
        np.testing.assert_allclose(memory["var"][slot], var, rtol=2e-4)


class Dropped(nn.Module):
    norm: object

    @nn.compact
    def __call__(self, x, train):
        for _ in range(2):
            x = nn.Dropout(0.5, deterministic=not train)(nn.Dense(6)(x))
            x = nn.relu(self.norm(use_running_average=not train)(x))
        return nn.Dense(3)(x)


@both_modes
@both_norms
@pytest.mark.slow
def test_at_rate_0_nothing_moves_and_dropout_draws_the_same(norm, mode):
    data, tx = batches(5), optax.sgd(0.0)
    moved = run_quarter(Dropped(norm), tx, data, mode).batch_stats
    first = run(Dropped(norm), tx, data, "off").batch_stats
    # The part's moments in two programs.
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6)
    jax.tree.map(close, moved, first)


@both_modes
@both_norms
@pytest.mark.slow
def test_inference_on_the_part_is_the_second_forward(norm, mode):
    model, tx, data = Net(norm, layers=2), optax.sgd(0.3), batches(4)
    outputs = []

    def keeping_loss(apply, x):
        y, updates = apply(x, train=True)
        outputs.append(y)
        return ((y - 1) ** 2).mean(), ({}, updates)

    before = run_quarter(model, tx, data[:3], mode)
    options = {"double_forward": mode, "double_forward_fraction": 0.25}
    step = make_train_step(model.apply, tx, keeping_loss, **options)

    @jax.jit
    def step_and_output(state, x):
        state, _ = step(state, x)
        return state, outputs[-1]  # The second forward's.

    after, second = step_and_output(before, data[3])
    assert second.shape == (8, 3)
    inferred = model.apply(
        {"params": after.params, "batch_stats": after.batch_stats}, data[3][:8], train=False
    )
    # Rounding of the same numbers in another program.
    np.testing.assert_allclose(inferred, second, atol=3e-6 * np.abs(second).max())


@both_modes
@pytest.mark.slow
def test_devices_pool_their_parts(mode):
    norm = functools.partial(memorized, axis_name=AXIS_NAME)
    model, tx, data = Net(norm), optax.sgd(0.2), batches(3)
    # The first examples of both devices come first on the one.
    blocks = data.reshape(3, 4, 2, 4, 5)
    split = {1: blocks.reshape(3, 1, 32, 5), 2: blocks.swapaxes(1, 2).reshape(3, 2, 16, 5)}
    ends = [
        first_device(
            run_on_devices(model, tx, x, count, mode, double_forward_fraction=0.25).batch_stats
        )
        for count, x in split.items()
    ]
    # Sums over devices in another order.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5), *ends)


@pytest.mark.parametrize("kept", [0, 4, 5])
@pytest.mark.slow
def test_masked_examples_of_the_part_tell_nothing(kept):
    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x, keep = x[:, :-1], x[:, -1:] > 0
            return memorized(use_running_average=not train)(nn.Dense(6)(x), mask=keep)

    data = batches(3)
    keep = jnp.ones((3, 32, 1)).at[:, kept:8].set(0)
    tx = changing(lambda params: jax.tree.map(lambda p: 1.1 * p + 0.1, params))
    ends = [
        run_quarter(Masked(), tx, jnp.concatenate([x, keep], -1))
        for x in (data, data.at[:, kept:8].set(jnp.nan))
    ]
    jax.tree.map(np.testing.assert_array_equal, *(end.batch_stats for end in ends))
    first = run(Masked(), tx, jnp.concatenate([data, keep], -1), "off")
    difference = np.abs(stats_of(ends[0])["mean"] - stats_of(first)["mean"])[:3].max()
    # Four values tell more of their noise than of the shift: nothing moves, but for the rounding of
    # moments in two programs.
    assert difference > 0.01 if kept > 4 else difference < 1e-6


def test_a_layer_called_twice_moves_by_the_part_of_each_call():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            norm = MemorizedBatchNorm(memory_size=4, use_running_average=not train)
            return norm(nn.Dense(6)(x)) + norm(nn.Dense(6)(x))

    def change(params):
        return {
            name: {**dense, "bias": dense["bias"] + 0.1 * (i + 1)} if "Dense" in name else dense
            for i, (name, dense) in enumerate(sorted(params.items()))
        }

    data = batches(2)
    state = run_quarter(Twice(), changing(change), data)
    inputs = [
        x @ state.params[name]["kernel"] + state.params[name]["bias"][None]
        for x in reversed(data)
        for name in ("Dense_1", "Dense_0")
    ]
    for slot, x in enumerate(inputs):
        np.testing.assert_allclose(stats_of(state)["mean"][slot], x.mean(0), atol=1e-5)


def test_what_is_traced_for_one_part_is_not_reused_for_another():
    model = Net(nn.jit(MemorizedBatchNorm))
    data, tx = batches(2), optax.sgd(0.0)
    first = run(model, tx, data, "off").batch_stats
    for fraction in (0.25, 0.5):
        moved = run(model, tx, data, double_forward_fraction=fraction).batch_stats
        # At rate 0 nothing moves, but for rounding of moments in two programs.
        close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6)
        jax.tree.map(close, moved, first)


class TwoViews(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = jnp.concatenate([x, 3 * x + 1])
        return memorized(use_running_average=not train)(nn.Dense(6)(x))


class Lifted(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        axes = {"params": 0, "batch_stats": 0, BATCH_MOMENTS: 0}
        layer = nn.vmap(MemorizedBatchNorm, variable_axes=axes, split_rngs={"params": True})
        return layer(use_running_average=not train)(x[None])[0]


@pytest.mark.slow
def test_what_cannot_be_done_is_refused():
    data, tx = batches(1), optax.sgd(0.1)
    for norm in (nn.BatchNorm, BatchRenorm):
        with pytest.raises(ValueError, match=rf"needs layers that pool .*: {norm.__name__}_0"):
            run_quarter(Net(norm), tx, data, "rewrite")
    with pytest.raises(ValueError, match="leave some groups of VirtualBatches without"):
        run_quarter(Net(functools.partial(VirtualBatches, memorized, 2)), tx, data)
    with pytest.raises(ValueError, match=r"whole examples, got 0.3 of 32"):
        run(Net(), tx, data, double_forward_fraction=0.3)
    with pytest.raises(ValueError, match=r"needs the 32 examples of the batch.* with axis=0 got"):
        run_quarter(Net(functools.partial(memorized, axis=0)), tx, data)
    with pytest.raises(ValueError, match=r"in their order, on the first axis.*shape \(64, 6\)"):
        run_quarter(TwoViews(), tx, data)
    with pytest.raises(ValueError, match=r"VmapMemorizedBatchNorm_0.*in their variable_axes"):
        run_quarter(Lifted(), tx, data, "rewrite")
    for options, message in (
        ({"double_forward_fraction": 0.0}, r"in \(0, 1\], got 0.0"),
        ({"double_forward": "off", "double_forward_fraction": 0.5}, "is 'off'"),
    ):
        with pytest.raises(ValueError, match=message):
            make_train_step(Net().apply, tx, loss_fn, **options)


def test_every_array_of_the_batch_must_have_the_examples_first():
    model, tx, x = Net(), optax.sgd(0.1), batches(1)[0]
    variables = model.init(jax.random.key(0), x, train=False)
    state = TrainState.create(variables, tx, jax.random.key(1))
    step = make_train_step(
        model.apply, tx, lambda apply, b: loss_fn(apply, b["x"]), double_forward_fraction=0.5
    )
    for other in (jnp.ones(()), jnp.ones(3)):
        with pytest.raises(ValueError, match="first axis of every array of the batch, got arrays"):
            step(state, {"x": x, "other": other})


def test_a_model_without_statistics_is_left_alone():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(3)(x)

    assert run_quarter(Plain(), optax.sgd(0.1), batches(2), "rewrite").step == 2


@pytest.mark.slow
def test_the_part_is_recorded_while_it_is_asked_for():
    model, x = Net(), batches(1)[0]
    variables = model.init(jax.random.key(0), x, train=False)

    def parts():
        _, updates = model.apply(variables, x, train=True, mutable=["batch_stats", BATCH_MOMENTS])
        return [record.part for record in updates[BATCH_MOMENTS]["MemorizedBatchNorm_0"][RECORDS]]

    with forwards_of(SecondForward("rewrite", 0.5), 32):
        (part,) = parts()
    assert part.count.tolist() == [16] * 6
    assert parts() == [None]
