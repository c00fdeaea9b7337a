"""Transport: the second forward moves the whole memory by what the update did."""

import functools
import os
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from stepping import (
    Net,
    batches,
    changing,
    endless,
    loss_fn,
    memorized,
    moments,
    run,
    run_on_devices,
    stats_of,
)

from mbn_jax import MemorizedBatchNorm, TrainState, make_train_step
from mbn_jax.core.double_forward import BATCH_MOMENTS, FIRST_BATCH_MOMENTS
from mbn_jax.core.moments import Moments
from mbn_jax.core.transport import transport
from mbn_jax.linen.virtual_batches import VirtualBatches
from mbn_jax.parallel.devices import (
    AXIS_NAME,
    first_device,
    replicate,
    split_over_devices,
)

HERE = pathlib.Path(__file__).parent


def test_a_scale_and_an_offset_move_every_slot_to_where_its_batch_is():
    data = batches(4)
    scale = jnp.linspace(0.8, 1.3, 6)

    def change(params):
        dense = params["Dense_0"]
        dense = {
            "kernel": dense["kernel"] * scale[None],
            "bias": dense["bias"] * scale + jnp.linspace(-0.2, 0.2, 6),
        }
        return {**params, "Dense_0": dense}

    state = run(Net(), changing(change), data)
    dense = jax.tree.map(np.float64, state.params["Dense_0"])
    memory = stats_of(state)
    for slot, x in enumerate(reversed(data)):
        mean, var = moments(np.float64(x) @ dense["kernel"] + dense["bias"])
        # Float32 statistics, and epsilon's part in the ratio of variances of 0.1 and more.
        np.testing.assert_allclose(memory["mean"][slot], mean, atol=1e-5)
        np.testing.assert_allclose(memory["var"][slot], var, rtol=2e-4)


def test_equals_transport_by_hand_in_float64():
    data, tx = batches(3), optax.sgd(0.3)
    before = run(Net(), tx, data[:2])
    state = run(Net(), tx, data[2:], state=before)

    def of_batch(params):
        dense = jax.tree.map(np.float64, params["Dense_0"])
        return moments(np.float64(data[2]) @ dense["kernel"] + dense["bias"])

    (m, v), (m_after, v_after) = of_batch(before.params), of_batch(state.params)
    old, new = stats_of(before), stats_of(state)
    assert np.abs(m_after - m).max() > 1e-3
    ratio = (v_after + 1e-5) / (v + 1e-5)
    for slot in range(2):
        mean = m_after + np.sqrt(ratio) * (old["mean"][slot] - m)
        # Float32 against float64.
        np.testing.assert_allclose(new["mean"][slot + 1], mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(new["var"][slot + 1], old["var"][slot] * ratio, rtol=1e-4)
    np.testing.assert_allclose(new["mean"][0], m_after, atol=1e-5)
    np.testing.assert_allclose(new["var"][0], v_after, rtol=1e-4)
    assert new["count"][:, 0].tolist() == [16, 16, 16, 0]


def assert_that_at_rate_0_nothing_moves():
    data, model, tx = batches(5), Net(memorized, layers=2), optax.sgd(0.0)
    state = run(model, tx, data[:1])
    for x in data[1:]:
        before, state = state, run(model, tx, x[None], state=state)
        for layer in ("MemorizedBatchNorm_0", "MemorizedBatchNorm_1"):
            old, new = stats_of(before, layer), stats_of(state, layer)
            for name in ("mean", "var", "count"):  # To the bit.
                np.testing.assert_array_equal(new[name][1:], old[name][:-1])


@pytest.mark.slow
def test_at_rate_0_nothing_moves():
    # In a process of its own: the tests compile without optimization, where the two forwards may
    # round differently.
    program = (
        f"import sys; sys.path[:0] = {[str(folder) for folder in (HERE, HERE.parent)]}\n"
        "import test_transport; test_transport.assert_that_at_rate_0_nothing_moves()"
    )
    environment = os.environ | {"XLA_FLAGS": ""}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


def test_at_rate_0_a_memory_without_end_does_not_move():
    data, model = batches(5), Net(endless, layers=2)
    rewritten, moved = (run(model, optax.sgd(0.0), data, mode) for mode in ("rewrite", "transport"))
    # Computed in place, it rounds as the compiler fuses it.
    check = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(check, rewritten.batch_stats, moved.batch_stats)


@pytest.mark.parametrize("norm", [memorized, endless], ids=["memorized", "endless"])
@pytest.mark.slow
def test_inference_on_the_batch_is_the_second_forward(norm):
    data, model, tx = batches(4), Net(norm, layers=2), optax.sgd(0.3)
    before = run(model, tx, data[:3])
    first = model.apply(
        {"params": before.params, "batch_stats": before.batch_stats},
        data[3],
        train=True,
        mutable=["batch_stats", BATCH_MOMENTS],
    )[1][BATCH_MOMENTS]
    after = run(model, tx, data[3:], state=before)
    second, _ = model.apply(
        {
            "params": after.params,
            "batch_stats": before.batch_stats,
            FIRST_BATCH_MOMENTS: first,
        },
        data[3],
        train=True,
        mutable=["batch_stats", BATCH_MOMENTS],
    )
    inferred = model.apply(
        {"params": after.params, "batch_stats": after.batch_stats}, data[3], train=False
    )
    # Rounding of the same numbers in another program.
    np.testing.assert_allclose(inferred, second, atol=3e-6 * np.abs(second).max())


@pytest.mark.parametrize("norm", [memorized, endless], ids=["memorized", "endless"])
@pytest.mark.slow
def test_what_is_kept_is_nearer_to_the_current_network(norm):
    # With a mean, as a layer's inputs have after a ReLU: most of a shift is common to all batches.
    data, tx = batches(20) + 1, optax.sgd(0.003)
    size = 20 if norm is memorized else None
    norm = functools.partial(norm, decay=1.0, memory_size=size)
    errors = {}
    for mode in ("off", "rewrite", "transport"):
        state = run(Net(norm), tx, data, mode)
        dense = state.params["Dense_0"]
        mean, _ = moments(data.reshape(-1, 5) @ dense["kernel"] + dense["bias"][None])
        kept = stats_of(state)["mean"]
        kept = kept.mean(0) if kept.ndim == 2 else kept
        errors[mode] = float(jnp.abs(kept - mean).mean())
    assert errors["transport"] < 0.3 * errors["rewrite"] < 0.4 * errors["off"]


def test_one_bad_update_does_not_spoil_the_memory():
    data = batches(3)
    good = run(Net(), optax.sgd(0.1), data)
    for factor in (1e6, np.nan):
        bad = changing(lambda params: jax.tree.map(lambda p: p * factor, params))  # noqa: B023
        old, new = stats_of(good), stats_of(run(Net(), bad, data[:1], state=good))
        slots = slice(1, 4) if np.isfinite(factor) else slice(0, 3)
        ratio = new["var"][slots] / old["var"][:3]
        assert np.isfinite(ratio).all()
        assert (ratio <= 2).all()
        # Two standard deviations of the slots' own distance, at most, beside the bounded shift.
        moved = np.abs(new["mean"][slots] - old["mean"][:3]) / np.sqrt(old["var"][:3].max(0))
        assert moved.max() < 3


@pytest.mark.parametrize("var", [0.0, 1e-12, 1.0])
def test_bounds_of_the_shift(var):
    slots = Moments(jnp.zeros((2, 1)), jnp.full((2, 1), var), jnp.full((2, 1), 8.0))
    before = Moments(jnp.zeros(1), jnp.full(1, var), jnp.full(1, 8.0))
    after = Moments(jnp.full(1, -50.0), jnp.full(1, 90.0), jnp.full(1, 8.0))
    moved = transport(slots, before, after, 1e-5)
    np.testing.assert_allclose(moved.mean, -np.sqrt(var + 1e-5), rtol=1e-5)
    np.testing.assert_allclose(moved.var, 2 * var, rtol=1e-6)
    unseen = before._replace(count=jnp.zeros(1))
    for pair in ((unseen, after), (before, after._replace(mean=jnp.full(1, jnp.inf)))):
        jax.tree.map(np.testing.assert_array_equal, transport(slots, *pair, 1e-5), slots)


def test_masked_rows_move_nothing():
    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x, keep = x[:, :-1], x[:, -1:] > 0
            return memorized(use_running_average=not train)(nn.Dense(6)(x), mask=keep)

    data = batches(3)
    keep = jnp.ones((3, 16, 1)).at[:, 10:].set(0)
    tx = changing(lambda params: jax.tree.map(lambda p: 1.1 * p + 0.1, params))
    short = run(Masked(), tx, jnp.concatenate([data, keep], -1)[:, :10])
    masked = run(Masked(), tx, jnp.concatenate([data.at[:, 10:].set(jnp.nan), keep], -1))
    # Sums of 10 and of 16 numbers, 6 of them 0.
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
        masked.batch_stats,
        short.batch_stats,
    )
    still = run(Masked(), optax.sgd(0.0), jnp.concatenate([data, keep], -1)[:, :10])
    assert np.abs(stats_of(still)["mean"] - stats_of(short)["mean"]).max() > 0.1


@pytest.mark.parametrize("calls", [2, 3])
@pytest.mark.slow
def test_a_layer_called_several_times_moves_the_slots_of_each_call_by_its_own_shift(calls):
    class Several(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            norm = MemorizedBatchNorm(
                memory_size=3 * calls, use_running_average=not train, decay=0.9
            )
            # No call's input depends on another's output.
            return sum(norm(nn.Dense(6)(x)) for _ in range(calls))

    def change(params):
        return {
            name: {**dense, "bias": dense["bias"] + 0.1 * (i + 1)} if "Dense" in name else dense
            for i, (name, dense) in enumerate(sorted(params.items()))
        }

    data = batches(3)
    state = run(Several(), changing(change), data)
    mean = stats_of(state)["mean"]
    newest_first = [
        data[step] @ state.params[f"Dense_{call}"]["kernel"]
        + state.params[f"Dense_{call}"]["bias"][None]
        for step in (2, 1, 0)
        for call in reversed(range(calls))
    ]
    # Every slot is where its batch is under the current parameters.
    for slot, inputs in enumerate(newest_first):
        np.testing.assert_allclose(mean[slot], inputs.mean(0), atol=1e-5)


def test_several_calls_of_a_memory_without_end_are_refused():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            norm = MemorizedBatchNorm(memory_size=None, use_running_average=not train)
            return norm(norm(nn.Dense(6)(x)))

    assert run(Twice(), optax.sgd(0.1), batches(2), "rewrite").step == 2
    with pytest.raises(ValueError, match="cannot tell the 2 calls of its layer"):
        run(Twice(), optax.sgd(0.1), batches(2))


@pytest.mark.parametrize(("size", "moves"), [(4, False), (5, True)])
def test_so_few_values_that_their_shift_is_noise_move_nothing(size, moves):
    data, tx = batches(3, size), optax.sgd(0.1)
    before = run(Net(), tx, data[:2])
    after = run(Net(), tx, data[2:], state=before)
    differs = np.abs(stats_of(after)["mean"][1:] - stats_of(before)["mean"][:-1]).max() > 0
    assert differs == moves


@pytest.mark.slow
def test_local_statistics_move_by_the_shift_of_their_own_batch():
    model, tx, data = Net(), optax.sgd(0.2), batches(3, size=16)
    variables = model.init(jax.random.key(0), data[0], train=False)
    start = TrainState.create(variables, tx, jax.random.key(1))
    devices = jax.devices()[:2]
    step = make_train_step(
        model.apply,
        tx,
        loss_fn,
        double_forward="transport",
        axis_name=AXIS_NAME,
        local_statistics=True,
    )
    step, end = jax.pmap(step, axis_name=AXIS_NAME, devices=devices), replicate(start, devices)
    for x in data:
        before = jax.device_get(end)
        end, _ = step(end, split_over_devices(x, devices=devices))
    for device in range(2):
        part = data[2][8 * device : 8 * device + 8]
        old, new = (
            jax.tree.map(lambda x: x[device], s.batch_stats["MemorizedBatchNorm_0"])  # noqa: B023
            for s in (before, end)
        )
        of_batch = []
        for params in (before.params, end.params):
            dense = jax.tree.map(lambda x: x[device], params["Dense_0"])  # noqa: B023
            mean, var = moments(part @ dense["kernel"] + dense["bias"][None])
            of_batch.append(Moments(mean, var, jnp.full(6, 8.0)))
        slots = Moments(old["mean"], old["var"], old["count"])
        expected = transport(slots, *of_batch, 1e-5)
        # Float32 moments in another program.
        np.testing.assert_allclose(new["mean"][1:3], expected.mean[:2], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(new["var"][1:3], expected.var[:2], rtol=1e-4)


class Lifted(nn.Module):
    collections: tuple[str, ...]

    @nn.compact
    def __call__(self, x, train):
        layer = nn.vmap(
            MemorizedBatchNorm,
            variable_axes=dict.fromkeys(self.collections, 0),
            split_rngs={"params": True},
            in_axes=0,
        )
        return layer(memory_size=4, use_running_average=not train)(x[None])[0]


def test_a_memory_that_would_be_left_behind_is_an_error():
    shown = ("params", "batch_stats")
    data = batches(2)
    for lifted in (shown, (*shown, BATCH_MOMENTS), (*shown, FIRST_BATCH_MOMENTS)):
        with pytest.raises(ValueError, match=r"VmapMemorizedBatchNorm_0.*variable_axes"):
            run(Lifted(lifted), optax.sgd(0.1), data)
    both = (*shown, BATCH_MOMENTS, FIRST_BATCH_MOMENTS)
    assert run(Lifted(both), optax.sgd(0.1), data).step == 2
    with pytest.raises(ValueError, match=r"no layer has a memory.*take 'rewrite'"):
        run(Net(nn.BatchNorm), optax.sgd(0.1), data)


def test_a_second_forward_by_hand_that_cannot_count_calls_is_an_error():
    model, x = Net(), batches(1)[0]
    variables = model.init(jax.random.key(0), x, train=False)
    mutable = ["batch_stats", BATCH_MOMENTS]
    _, first = model.apply(variables, x, train=True, mutable=mutable)
    second = {**variables, FIRST_BATCH_MOMENTS: first[BATCH_MOMENTS]}
    with pytest.raises(ValueError, match="make 'batch_moments' mutable in this apply too"):
        model.apply(second, x, train=True, mutable=["batch_stats"])


def test_other_norms_beside_a_memory_are_left_alone():
    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(6)(x))
            return memorized(use_running_average=not train)(nn.Dense(6)(x))

    data, tx = batches(2), changing(lambda params: jax.tree.map(lambda p: p + 0.1, params))
    before = run(Mixed(), tx, data[:1])
    modes = ("rewrite", "transport")
    states = [run(Mixed(), tx, data[1:], mode, state=before) for mode in modes]
    names = ("BatchNorm_0", "MemorizedBatchNorm_0")
    differ = [np.abs(np.subtract(*(stats_of(s, name)["mean"] for s in states))) for name in names]
    # The same forward, in two programs.
    assert differ[0].max() < 1e-6 < 1e-3 < differ[1].max()


@pytest.mark.parametrize("virtual", [False, True])
@pytest.mark.slow
def test_eight_devices_move_as_one(virtual):
    norm = functools.partial(memorized, axis_name=AXIS_NAME)
    if virtual:  # Of two groups on each device, each over all devices.
        norm = functools.partial(VirtualBatches, norm, 2)
    model, tx, data = Net(norm), optax.sgd(0.2), batches(4, size=32)
    split = data.reshape(4, 8, 4, 5)
    if virtual:  # So that a group holds the same examples on one device as on eight.
        split = data.reshape(4, 2, 8, 2, 5).swapaxes(1, 2).reshape(4, 8, 4, 5)
    ends = [
        first_device(run_on_devices(model, tx, x, count).batch_stats)
        for count, x in ((1, data[:, None]), (8, split))
    ]
    # Sums over devices in another order.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5), *ends)


def test_between_the_updates_of_accumulated_gradients_nothing_moves():
    data, tx = batches(6), optax.MultiSteps(optax.sgd(0.3), every_k_schedule=3)
    state = run(Net(), tx, data[:2])
    plain = run(Net(), tx, data[:2], mode="rewrite")
    jax.tree.map(np.testing.assert_array_equal, state.batch_stats, plain.batch_stats)
    moved = run(Net(), tx, data[2:3], state=state)
    slots = [np.asarray(stats_of(s)["mean"]) for s in (state, moved)]
    assert np.abs(slots[1][1] - slots[0][0]).max() > 1e-3


def test_in_bfloat16_the_statistics_move_in_float32():
    norm = functools.partial(memorized, dtype=jnp.bfloat16)
    state = run(Net(norm), optax.sgd(0.1), batches(3))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.batch_stats)} == {jnp.dtype("float32")}
    exact = stats_of(run(Net(), optax.sgd(0.1), batches(3)))
    # bfloat16 keeps 8 bits: inputs of order 1.
    np.testing.assert_allclose(stats_of(state)["mean"], exact["mean"], atol=3e-2)


@pytest.mark.slow
def test_memory_size_and_decay_may_be_traced():
    data, tx = batches(4), optax.sgd(0.2)

    def run_traced(memory_size, decay):
        norm = functools.partial(
            MemorizedBatchNorm, memory_capacity=4, memory_size=memory_size, decay=decay
        )
        model = Net(norm)
        variables = model.init(jax.random.key(0), data[0], train=False)
        state = TrainState.create(variables, tx, jax.random.key(1))
        step = make_train_step(model.apply, tx, loss_fn, double_forward="transport")
        for x in data:
            state, _ = step(state, x)
        return state.batch_stats

    traced = jax.jit(run_traced)(3, 0.5)
    fixed = run(Net(functools.partial(memorized, memory_size=3, decay=0.5)), tx, data).batch_stats
    jax.tree.map(
        # One program of four steps against four of one.
        lambda a, b: np.testing.assert_allclose(a[: len(b)], b, rtol=1e-5, atol=1e-6),
        traced["MemorizedBatchNorm_0"],
        fixed["MemorizedBatchNorm_0"],
    )
