"""Many devices: the same numbers by pmap, by shard_map and on one device, and nothing lost."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from stepping import RUNTIMES

from mbn_jax import MemorizedBatchNorm, TrainState, make_train_step
from mbn_jax.core.batch_stats import pool_batch_stats
from mbn_jax.parallel.devices import (
    AXIS_NAME,
    distribute,
    first_device,
    replicate,
    split_over_devices,
)
from mbn_jax.training.checkpoints import Checkpoints

DEVICES = 8


def test_the_first_device_is_read_from_its_own_shard():
    tree = replicate({"x": np.arange(3.0), "key": jax.random.key(7)})
    first = first_device(tree)
    assert first["x"].devices() == {jax.devices()[0]}  # No program of all devices made it.
    np.testing.assert_array_equal(first["x"], np.arange(3.0))
    assert jax.random.key_data(first["key"]).tolist() == [0, 7]
    np.testing.assert_array_equal(first_device({"x": np.ones((2, 3))})["x"], np.ones(3))


class Net(nn.Module):
    norm: object

    @nn.compact
    def __call__(self, x, train):
        x = self.norm(use_running_average=not train)(nn.Dense(6)(x))
        return nn.Dense(3)(nn.relu(x))


def loss_fn(apply, batch):
    logits, updates = apply(batch["x"], train=True)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return loss.mean(), ({}, updates)


def batch_of(size, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(size, 5)) + np.arange(size)[:, None] / size
    return {"x": x.astype(np.float32), "y": rng.integers(0, 3, size).astype(np.int32)}


def run(norm, *, runtime=None, steps=3, size=32, **options):
    """Trains a few steps on all devices, or without a runtime on one; returns the state."""
    model, tx = Net(norm), optax.sgd(0.2, momentum=0.9)
    axis_name = AXIS_NAME if runtime else None
    step = make_train_step(model.apply, tx, loss_fn, axis_name=axis_name, **options)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 5)), train=False)
    state = TrainState.create(variables, tx, jax.random.key(1))
    if not runtime:
        for i in range(steps):
            state, metrics = jax.jit(step)(state, batch_of(size, i))
        return state, metrics
    mapped = runtime(step, donate_argnums=(0,))
    state = replicate(state)
    for i in range(steps):
        state, metrics = mapped(state, distribute(split_over_devices(batch_of(size, i))))
    return state, metrics


NORMS = {
    "memorized": functools.partial(MemorizedBatchNorm, memory_size=4),
    "batch": nn.BatchNorm,
}


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.slow
def test_eight_synced_devices_equal_one(norm):
    one, _ = run(norm)
    for runtime in RUNTIMES:
        many, _ = run(functools.partial(norm, axis_name=AXIS_NAME), runtime=runtime)
        # Float32 sums in another order, three steps long; a gradient multiplied by the devices
        # would be off by far more.
        tolerance = {"rtol": 1e-4, "atol": 1e-5}
        assert_close(first_device(many).params, one.params, **tolerance)
        assert_close(first_device(many).batch_stats, one.batch_stats, **tolerance)
        assert_close(many.params, replicate(first_device(many).params), atol=0)


@pytest.mark.parametrize("sync", [True, False])
def test_both_runtimes_give_the_same_bits(sync):
    norm = functools.partial(NORMS["memorized"], axis_name=AXIS_NAME if sync else None)
    (a, a_metrics), (b, b_metrics) = (
        run(norm, runtime=runtime, local_statistics=not sync) for runtime in RUNTIMES
    )
    assert_close((a.params, a.batch_stats, a_metrics), (b.params, b.batch_stats, b_metrics), atol=0)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_local_statistics_of_every_device_survive_and_pool_to_those_of_the_whole(runtime):
    state, _ = run(NORMS["memorized"], runtime=runtime, steps=1, local_statistics=True)
    memory = state.batch_stats["MemorizedBatchNorm_0"]
    means = np.asarray(memory["mean"])[:, 0]
    assert means.shape == (DEVICES, 6)
    assert len({tuple(mean) for mean in means}) == DEVICES

    dense = jax.tree.map(np.float64, first_device(state.params)["Dense_0"])
    activations = np.float64(batch_of(32)["x"]) @ dense["kernel"] + dense["bias"][None]
    pooled = pool_batch_stats(state.batch_stats)["MemorizedBatchNorm_0"]
    # Float32 activations of order 1 from a matrix product of length 5.
    np.testing.assert_allclose(pooled["mean"][0], activations.mean(0), atol=1e-6)
    np.testing.assert_allclose(pooled["var"][0], activations.var(0), rtol=1e-5)
    assert np.asarray(pooled["count"][0]).tolist() == [32.0] * 6
    # The mean of variances, by contrast, misses the spread between devices.
    averaged = np.asarray(memory["var"])[:, 0].mean(0)
    assert (averaged < 0.99 * activations.var(0)).any()


def test_shard_map_with_its_check_is_refused():
    model, tx = Net(nn.BatchNorm), optax.sgd(0.1)
    step = make_train_step(model.apply, tx, loss_fn, axis_name=AXIS_NAME)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 5)), train=False)
    state = TrainState.create(variables, tx, jax.random.key(1))
    mesh = Mesh(np.array(jax.devices()), (AXIS_NAME,))
    specs = {"mesh": mesh, "in_specs": (P(), P(AXIS_NAME)), "out_specs": P()}
    with pytest.raises(ValueError, match="check_vma=False only"):
        jax.jit(jax.shard_map(step, **specs))(state, batch_of(32))


def test_groups_of_devices_share_statistics():
    groups = [[0, 1, 2, 3], [4, 5, 6, 7]]
    norm = functools.partial(NORMS["memorized"], axis_name=AXIS_NAME, axis_index_groups=groups)
    for runtime in RUNTIMES:
        state, _ = run(norm, runtime=runtime, local_statistics=True)
        means = np.asarray(state.batch_stats["MemorizedBatchNorm_0"]["mean"])
        for group in groups:
            assert (means[group] == means[group[0]][None]).all()
        assert np.abs(means[0] - means[4]).max() > 1e-3


def test_pooling_weighs_by_counts_and_leaves_integers_alone():
    stats = {
        "a": {
            "mean": jnp.array([[[1.0]], [[4.0]]]),
            "var": jnp.array([[[2.0]], [[0.0]]]),
            "count": jnp.array([[[2.0]], [[1.0]]]),
        },
        "b": {"mean": jnp.array([[0.0], [2.0]]), "var": jnp.array([[1.0], [1.0]])},
        "c": {
            "mean": jnp.array([[0.0], [4.0]]),
            "var": jnp.array([[0.0], [0.0]]),
            "weight": jnp.array([[6.0], [2.0]]),
        },
        "steps": jnp.array([7, 7], jnp.int32),
        "mean": {"kernel": jnp.array([1.0, 3.0])},
    }
    pooled = pool_batch_stats(stats)
    # Three values with mean 2: (2 * 1 + 4) / 3; variance (2 * (2 + 1) + (0 + 4)) / 3.
    np.testing.assert_allclose(pooled["a"]["mean"], [[2.0]], rtol=1e-6)
    np.testing.assert_allclose(pooled["a"]["var"], [[10 / 3]], rtol=1e-6)
    assert pooled["a"]["count"].tolist() == [[3.0]]
    assert (pooled["b"]["mean"].tolist(), pooled["b"]["var"].tolist()) == ([1.0], [2.0])
    # An average that goes on from its groups' has seen as many batches as each of them.
    assert {k: x.tolist() for k, x in pooled["c"].items()} == {
        "mean": [1.0],
        "var": [3.0],
        "weight": [4.0],
    }
    assert (pooled["steps"].dtype, int(pooled["steps"])) == (jnp.int32, 7)
    assert float(pooled["mean"]["kernel"]) == 2.0


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_donation_reuses_the_state_and_spares_what_it_was_made_from(runtime):
    source = {"w": jnp.arange(4.0)}
    on_devices = replicate(source)
    mapped = runtime(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=(0,))
    result = mapped(on_devices)
    assert on_devices["w"].is_deleted()
    assert source["w"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert result["w"].shape == (DEVICES, 4)


COUNTS = (1, 2, 4, 8)
LAYERS_OF_NORM = {
    "memorized": NORMS["memorized"],
    "endless": functools.partial(MemorizedBatchNorm, memory_size=None),
    "batch": nn.BatchNorm,
}


@pytest.mark.parametrize("norm", LAYERS_OF_NORM)
@pytest.mark.parametrize("written", COUNTS)
@pytest.mark.slow
def test_a_checkpoint_is_restored_on_any_number_of_devices(tmp_path, norm, written):
    model, tx = Net(LAYERS_OF_NORM[norm]), optax.sgd(0.2, momentum=0.9)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 5)), train=False)
    fresh = TrainState.create(variables, tx, jax.random.key(1))
    rng = np.random.default_rng(written)

    def drawn(x, *axes):
        return rng.uniform(1, 2, (*axes, *x.shape)).astype(x.dtype)

    state = fresh.replace(
        params=jax.tree.map(drawn, fresh.params), opt_state=jax.tree.map(drawn, fresh.opt_state)
    )
    of_each = jax.tree.map(lambda x: drawn(x, written), fresh.batch_stats)
    devices = jax.devices()
    on_devices = replicate(state, devices[:written])
    local = on_devices.replace(batch_stats=distribute(of_each, devices[:written]))
    synced = on_devices.replace(
        batch_stats=replicate(jax.tree.map(lambda x: x[0], of_each), devices[:written])
    )
    pooled = jax.device_get(pool_batch_stats(jax.tree.map(jnp.asarray, of_each)))
    for name, saved in {"local": local, "synced": synced}.items():
        checkpoints = Checkpoints(tmp_path / name)
        checkpoints.save(saved, local_statistics=name == "local")
        for count in COUNTS:
            found = checkpoints.restore(
                fresh, local_statistics=name == "local", devices=devices[:count]
            )
            shared = (state.step, state.params, state.opt_state, jax.random.key_data(state.key))
            again = (found.step, found.params, found.opt_state, jax.random.key_data(found.key))
            # All to the bit, whatever the devices, but for the statistics of other devices.
            assert_close(again, replicate(shared, devices[:count]), rtol=0)
            stats = pooled if name == "local" else jax.tree.map(lambda x: x[0], of_each)
            expected = replicate(stats, devices[:count])
            if name == "local" and count == written:
                expected = of_each
            assert_close(found.batch_stats, expected, rtol=0)
        checkpoints.close()
