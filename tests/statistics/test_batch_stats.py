"""What is done to statistics beside training: pooled, folded, started from, recalibrated."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from stepping import loss_fn

from mbn_jax import MemorizedBatchNorm, TrainState, make_train_step
from mbn_jax.core.batch_stats import inference_statistics, pool_batch_stats
from mbn_jax.linen.batch_renorm import BatchRenorm
from mbn_jax.linen.virtual_batches import VirtualBatches
from mbn_jax.statistics.batch_norm import from_batch_norm, to_batch_norm
from mbn_jax.statistics.recalibration import recalibrate, record_norm_inputs

RULE = {"memory_size": 4, "decay": 0.8}
NORMS = {
    "memorized": functools.partial(MemorizedBatchNorm, **RULE),
    "schedule": functools.partial(
        MemorizedBatchNorm,
        memory_size=optax.linear_schedule(1, 4, 4),
        memory_capacity=4,
        decay=0.8,
    ),
    "endless": functools.partial(MemorizedBatchNorm, memory_size=None, decay=0.8),
    "batch_renorm": BatchRenorm,
    "batch": nn.BatchNorm,
    "virtual": lambda use_running_average: VirtualBatches(
        functools.partial(MemorizedBatchNorm, **RULE), 2, use_running_average
    ),
}
every_norm = pytest.mark.parametrize("norm", NORMS)


class Net(nn.Module):
    norm: object

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(self.norm(use_running_average=not train)(nn.Dense(6)(x)))
        x = nn.relu(self.norm(use_running_average=not train)(nn.Dense(4)(x)))
        return nn.Dense(3)(x)


def data(count=5, size=16, seed=0):
    x = np.random.default_rng(seed).normal(size=(count, size, 5)) + 0.5
    return jnp.asarray(x, jnp.float32)


def trained(model, tx=None, steps=3, double_forward="rewrite"):
    tx = tx or optax.sgd(0.1)
    variables = model.init(jax.random.key(0), data()[0], train=False)
    state = TrainState.create(variables, tx, jax.random.key(1))
    step = jax.jit(make_train_step(model.apply, tx, loss_fn, double_forward=double_forward))
    for x in data(steps):
        state, _ = step(state, x)
    return state


def variables_of(state):
    return {"params": state.params, "batch_stats": state.batch_stats}


@every_norm
@pytest.mark.slow
def test_folded_into_batch_norm_the_network_infers_the_same(norm):
    model, x = Net(NORMS[norm]), data(seed=1)[0]
    variables = variables_of(trained(model))
    folded = to_batch_norm(variables)
    batch_norm = Net(nn.BatchNorm)
    plain = batch_norm.init(jax.random.key(0), x, train=False)
    assert jax.tree.map(jnp.shape, folded) == jax.tree.map(jnp.shape, plain)
    # The same formula; pooled here, and in another program.
    np.testing.assert_allclose(
        batch_norm.apply(folded, x, train=False),
        model.apply(variables, x, train=False),
        rtol=1e-5,
        atol=1e-6,
    )


@every_norm
@pytest.mark.slow
def test_started_from_a_batch_norm_checkpoint_the_network_infers_the_same(norm):
    batch_norm, model, x = Net(nn.BatchNorm), Net(NORMS[norm]), data(seed=1)[0]
    checkpoint = variables_of(trained(batch_norm))
    fresh = model.init(jax.random.key(5), x, train=False)
    started = from_batch_norm(checkpoint, fresh)
    assert jax.tree.map(jnp.shape, started) == jax.tree.map(jnp.shape, fresh)
    np.testing.assert_allclose(
        model.apply(started, x, train=False),
        batch_norm.apply(checkpoint, x, train=False),
        rtol=1e-5,
        atol=1e-6,
    )
    if norm == "memorized":  # The averages are one slot, which a new batch joins.
        _, updates = model.apply(started, x, train=True, mutable=["batch_stats"])
        count = updates["batch_stats"]["MemorizedBatchNorm_0"]["count"]
        assert count[:, 0].tolist() == [16.0, 1.0, 0.0, 0.0]
    if norm == "endless":
        _, updates = model.apply(started, x, train=True, mutable=["batch_stats"])
        weight = updates["batch_stats"]["MemorizedBatchNorm_0"]["weight"]
        np.testing.assert_allclose(weight, 1.8, rtol=1e-6)


def test_what_cannot_be_folded_or_started_from_is_refused():
    fresh = Net(NORMS["memorized"]).init(jax.random.key(0), data()[0], train=False)
    other = {**fresh, "params": {**fresh["params"], "Dense_0": {"kernel": jnp.zeros((5, 6))}}}
    with pytest.raises(ValueError, match=r"same network with BatchNorm, and differs in .*Dense_0"):
        from_batch_norm(to_batch_norm(fresh), other)
    narrow = to_batch_norm(fresh)
    narrow["params"]["BatchNorm_1"]["scale"] = jnp.ones(3)
    with pytest.raises(ValueError, match="differs in params/BatchNorm_1/scale"):
        from_batch_norm(narrow, fresh)
    ones = {"mean": jnp.ones(1), "var": jnp.ones(1)}
    both = {"batch_stats": {"BatchNorm_0": ones, "BatchRenorm_0": ones}}
    without_rule = {"batch_stats": {"norm": {**ones, "count": jnp.ones(1)}}}
    with pytest.raises(ValueError, match="need its 'rule'"):
        to_batch_norm(without_rule)
    narrow = to_batch_norm(fresh)
    narrow["batch_stats"]["BatchNorm_1"]["mean"] = jnp.ones(3)
    with pytest.raises(ValueError, match=r"_1 expected statistics of shape \(4,\), got \(3,\)"):
        from_batch_norm(narrow, fresh)
    with pytest.raises(ValueError, match=r"two layers of .*BatchRenorm_0.* would have one name"):
        to_batch_norm(both)


@pytest.mark.slow
def test_arrays_of_other_layers_come_from_the_checkpoint():
    class Spectral(nn.Module):
        norm: object

        @nn.compact
        def __call__(self, x, train):
            x = nn.SpectralNorm(nn.Dense(4))(x, update_stats=train)
            return self.norm(use_running_average=not train)(x)

    x = data()[0]
    old, new = Spectral(nn.BatchNorm), Spectral(NORMS["memorized"])
    checkpoint = old.init(jax.random.key(0), x, train=False)
    _, updates = old.apply(checkpoint, x, train=True, mutable=["batch_stats"])
    checkpoint = {**checkpoint, **updates}
    started = from_batch_norm(checkpoint, new.init(jax.random.key(1), x, train=False))
    np.testing.assert_allclose(
        new.apply(started, x, train=False), old.apply(checkpoint, x, train=False), atol=1e-6
    )


@pytest.mark.parametrize("double_forward", ["rewrite", "transport"])
def test_frozen_beside_trained_memories(double_forward):
    class Half(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.relu(NORMS["memorized"](use_running_average=True)(nn.Dense(6)(x)))
            return NORMS["memorized"](use_running_average=not train)(nn.Dense(4)(x))

    state = trained(Half(), double_forward=double_forward)
    filled = [(state.batch_stats[f"MemorizedBatchNorm_{i}"]["count"] > 0).any() for i in range(2)]
    assert filled == [False, True]


@every_norm
@pytest.mark.slow
def test_a_frozen_norm_is_fine_tuned_around(norm):
    def frozen(use_running_average):
        return NORMS[norm](use_running_average=True)

    state = trained(Net(NORMS[norm]))
    model, tx = Net(frozen), optax.sgd(0.1)
    step = jax.jit(make_train_step(model.apply, tx, loss_fn, frozen_statistics=True))
    start = TrainState.create(variables_of(state), tx, jax.random.key(1))
    after, _ = step(start, data()[0])
    jax.tree.map(np.testing.assert_array_equal, after.batch_stats, start.batch_stats)
    assert np.abs(after.params["Dense_0"]["kernel"] - start.params["Dense_0"]["kernel"]).max() > 0


@every_norm
@pytest.mark.slow
def test_recalibrated_statistics_are_those_of_the_training_data(norm):
    model, batches = Net(NORMS[norm]), data(4, seed=2)
    variables = variables_of(trained(model))

    def apply(variables, x, **options):
        return model.apply(variables, x, train=False, **options)

    whole = batches.reshape(1, -1, 5)
    stats = recalibrate(apply, variables, whole)
    jax.tree.map(
        lambda new, old: np.testing.assert_equal((new.shape, new.dtype), (old.shape, old.dtype)),
        stats,
        variables["batch_stats"],
    )
    # On one batch, inference by them is batch normalization by that batch: in float64, by hand.
    x = np.float64(whole[0])
    params = jax.tree.map(np.float64, variables["params"])
    for i in range(2):
        dense = params[f"Dense_{i}"]
        x = x @ dense["kernel"] + dense["bias"]
        name = next(k for k in params if k.endswith(f"_{i}") and not k.startswith("Dense"))
        mean, var, _ = reference.moments(x)
        x = (x - mean) / np.sqrt(var + 1e-5) * params[name]["scale"] + params[name]["bias"]
        x = np.maximum(x, 0)
    expected = x @ params["Dense_2"]["kernel"] + params["Dense_2"]["bias"]
    y = apply({**variables, "batch_stats": stats}, whole[0])
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)  # Float32 layers.
    # In several batches the first layer, which no other's statistics reach, is the same.
    first = next(iter(stats))
    pieces = recalibrate(apply, variables, batches)[first]
    for got, wanted in zip(
        inference_statistics(pieces), inference_statistics(stats[first]), strict=True
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_averaged_weights_need_recalibration_and_get_it():
    model = Net(NORMS["memorized"])
    ends = [trained(model, steps=steps) for steps in (1, 4)]
    params = jax.tree.map(lambda a, b: (a + b) / 2, *(state.params for state in ends))
    variables = {"params": params, "batch_stats": ends[1].batch_stats}

    def apply(variables, x, **options):
        return model.apply(variables, x, train=False, **options)

    stats = recalibrate(apply, variables, data(3))
    with record_norm_inputs((MemorizedBatchNorm,)) as inputs:
        apply({"params": params, "batch_stats": stats}, data(3).reshape(-1, 5))
    found = {}
    for name, moments in inputs.items():
        found[name] = []
        for kept in (variables["batch_stats"], stats):
            mean, _ = inference_statistics(kept[name])
            found[name].append(float(jnp.abs(mean - moments.mean).max()))
    # The first layer's are exact; the second's are of inputs normalized in three batches.
    first, second = found["MemorizedBatchNorm_0"], found["MemorizedBatchNorm_1"]
    assert first[1] < 1e-5 < 0.1 * first[0]
    assert second[1] < 0.5 * second[0]


def test_a_layer_called_twice_has_the_statistics_of_both_calls():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = nn.BatchNorm(use_running_average=True, use_scale=False, use_bias=False)
            return norm(norm(x) + 4)

    x = data()[0]
    variables = Twice().init(jax.random.key(0), x)
    stats = recalibrate(Twice().apply, variables, [x])["BatchNorm_0"]
    mean, var, _ = reference.moments(x)
    once = (np.float64(x) - mean) / np.sqrt(var + 1e-5)
    mean, var, _ = reference.moments(np.concatenate([np.float64(x), once + 4]))
    np.testing.assert_allclose(stats["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(stats["var"], var, rtol=1e-5)


def test_axes_and_masks_of_the_layer_count_in_its_recalibration():
    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x, keep):
            return MemorizedBatchNorm(memory_size=2, axis=0, use_running_average=True)(x, mask=keep)

    x = data()[0]
    keep = jnp.arange(5)[None] < 3
    model = Masked()
    variables = model.init(jax.random.key(0), x, keep)
    stats = recalibrate(
        lambda v, batch, **options: model.apply(v, *batch, **options), variables, [(x, keep)]
    )["MemorizedBatchNorm_0"]
    mean, var, count = reference.moments(x, 0, keep)
    np.testing.assert_allclose(stats["mean"][0], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats["var"][0], var, rtol=1e-5)
    assert stats["count"].tolist() == [count.tolist(), [0.0] * 16]


def test_nothing_to_recalibrate_is_said():
    dense = nn.Dense(2)
    with pytest.raises(ValueError, match="the variables have no 'batch_stats'"):
        recalibrate(dense.apply, dense.init(jax.random.key(0), data()[0]), data())
    layer = nn.BatchNorm(use_running_average=True)
    with pytest.raises(ValueError, match=r"one batch or more.*; got 0 batches"):
        recalibrate(layer.apply, layer.init(jax.random.key(0), data()[0]), [])


def test_accumulated_gradients_push_a_slot_for_each_batch():
    state = trained(Net(NORMS["memorized"]), optax.MultiSteps(optax.sgd(0.1), 2), steps=4)
    memory = state.batch_stats["MemorizedBatchNorm_0"]
    assert (memory["count"][:, 0] > 0).all()
    kernel, bias = (state.params["Dense_0"][name] for name in ("kernel", "bias"))
    # Two updates of two batches: the newest slot is of the current parameters.
    np.testing.assert_allclose(
        memory["mean"][0], (data(4)[3] @ kernel + bias[None]).mean(0), atol=1e-6
    )
    single = trained(Net(NORMS["memorized"]), optax.sgd(0.1), steps=4)
    assert np.abs(single.params["Dense_0"]["kernel"] - kernel).max() > 1e-3


def test_pooling_keeps_what_is_no_layers():
    stats = {"norm": {"mean": jnp.ones((2, 3)), "var": jnp.ones((2, 3))}, "other": jnp.arange(2)}
    pooled = pool_batch_stats({**stats, "share": jnp.array([1.0, 2.0])})
    assert (int(pooled["other"]), float(pooled["share"])) == (0, 1.5)
