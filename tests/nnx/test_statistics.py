"""Functions over the statistics of NNX models, and Orbax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from stepping import batches

import mbn_jax.nnx
from mbn_jax.nnx import from_batch_norm, recalibrate, to_batch_norm

equal = functools.partial(jax.tree.map, np.testing.assert_array_equal)
NORMS = {
    "memorized": functools.partial(mbn_jax.nnx.MemorizedBatchNorm, memory_size=4, decay=0.9),
    "endless": functools.partial(mbn_jax.nnx.MemorizedBatchNorm, memory_size=None),
    "renorm": mbn_jax.nnx.BatchRenorm,
}
every_norm = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)


class Net(nnx.Module):
    def __init__(self, norm, seed=0):
        rngs = nnx.Rngs(seed)
        self.layers = nnx.List([nnx.Linear(5, 6, rngs=rngs), nnx.Linear(6, 6, rngs=rngs)])
        self.norms = nnx.List([norm(6, rngs=rngs) for _ in range(2)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = nnx.relu(norm(layer(x)))
        return self.dropout(x)


def loss_fn(model, x):
    return ((model(x) - 1) ** 2).mean(), {}


def trained(norm, **options):
    model = Net(norm)
    optimizer = nnx.Optimizer(model, optax.adam(0.05), wrt=nnx.Param)
    step = nnx.jit(mbn_jax.nnx.make_train_step(loss_fn, **options))
    for x in batches(6):
        step(model, optimizer, x)
    return model, optimizer


def inferred(model, x):
    return nnx.view(model, use_running_average=True, deterministic=True)(x)


@every_norm
@pytest.mark.slow
def test_folded_into_batch_norm_the_output_at_inference_is_the_same(norm):
    model, _ = trained(norm)
    deployed = Net(nnx.BatchNorm, seed=1)
    to_batch_norm(model, deployed)
    x = batches(1, seed=9)[0]
    np.testing.assert_allclose(inferred(deployed, x), inferred(model, x), atol=2e-6)


@every_norm
@pytest.mark.slow
def test_started_from_batch_norm_the_output_at_inference_is_the_same(norm):
    checkpoint, _ = trained(nnx.BatchNorm)
    model = Net(norm, seed=1)
    streams = jax.random.key_data(model.dropout.rngs.key.get_value())
    from_batch_norm(checkpoint, model)
    x = batches(1, seed=9)[0]
    np.testing.assert_allclose(inferred(model, x), inferred(checkpoint, x), atol=2e-6)
    equal(jax.random.key_data(model.dropout.rngs.key.get_value()), streams)
    if norm is NORMS["memorized"]:
        assert model.norms[0].count[:, 0].tolist() == [1, 0, 0, 0]
        # It counts as one batch and leaves as newer ones come.
        model(x)
        assert model.norms[0].count[:, 0].tolist() == [16, 1, 0, 0]


def test_models_that_differ_are_refused_by_name():
    class Other(Net):
        def __init__(self, norm):
            super().__init__(norm)
            self.head = nnx.Linear(6, 2, rngs=nnx.Rngs(0))

    norm = NORMS["memorized"]
    with pytest.raises(ValueError, match="differs in params/head/bias, params/head/kernel"):
        from_batch_norm(Other(nnx.BatchNorm), Net(norm))
    with pytest.raises(ValueError, match="differs in params/head/bias, params/head/kernel"):
        to_batch_norm(Net(norm), Other(nnx.BatchNorm))


@pytest.mark.parametrize("norm", [*NORMS.values(), nnx.BatchNorm], ids=[*NORMS, "batch"])
@pytest.mark.slow
def test_recalibrated_statistics_are_those_of_all_the_batches(norm):
    model, _ = trained(norm)
    data = batches(3, size=8, seed=4)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    flag = model.norms[0].use_running_average
    recalibrate(model, data)
    equal(nnx.to_pure_dict(nnx.state(model, nnx.Param)), params)
    assert model.norms[0].use_running_average == flag
    assert not jax.tree.leaves(nnx.state(model, mbn_jax.nnx.BatchMoments))
    assert type(model.norms[0]) is type(norm(6, rngs=nnx.Rngs(0)))
    inputs = model.layers[0](data.reshape(-1, 5))
    mean, var = (model.norms[0].mean[...], model.norms[0].var[...])
    if norm is NORMS["memorized"]:
        assert model.norms[0].count[:, 0].tolist() == [24, 0, 0, 0]
        mean, var = mean[0], var[0]
    np.testing.assert_allclose(mean, inputs.mean(0), atol=1e-5)
    np.testing.assert_allclose(var, inputs.var(0), rtol=1e-4)


def test_recalibration_is_that_of_linen():
    import flax.linen as nn

    linen = nn.Sequential([mbn_jax.MemorizedBatchNorm(memory_size=2, use_running_average=True)])
    data = batches(3)
    variables = linen.init(jax.random.key(0), data[0])
    expected = mbn_jax.recalibrate(linen.apply, variables, data)["layers_0"]
    layer = mbn_jax.nnx.MemorizedBatchNorm(5, memory_size=2, rngs=nnx.Rngs(0))
    recalibrate(layer, data)
    equal(nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat)), expected)


def test_recalibration_needs_batches_and_calls():
    norm = NORMS["memorized"]
    with pytest.raises(ValueError, match="got 0 batches"):
        recalibrate(Net(norm), [])
    with pytest.raises(ValueError, match="got 1 batches, and no such call"):
        recalibrate(Net(norm), batches(1), lambda model, batch: batch)


@every_norm
@pytest.mark.slow
def test_a_model_and_its_optimizer_go_through_orbax(norm, tmp_path):
    model, optimizer = trained(norm, double_forward="rewrite")
    saved = nnx.state((model, optimizer), nnx.Not(nnx.RngState))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", nnx.to_pure_dict(saved))
        checkpointer.wait_until_finished()
        fresh = Net(norm, seed=1)
        fresh_optimizer = nnx.Optimizer(fresh, optax.adam(0.05), wrt=nnx.Param)
        target = nnx.state((fresh, fresh_optimizer), nnx.Not(nnx.RngState))
        restored = checkpointer.restore(tmp_path / "step", nnx.to_pure_dict(target))
    nnx.replace_by_pure_dict(target, restored)
    nnx.update((fresh, fresh_optimizer), target)
    for node, other in ((model, fresh), (optimizer, fresh_optimizer)):
        states = [nnx.state(n, nnx.Not(nnx.RngState)) for n in (node, other)]
        equal(*map(nnx.to_pure_dict, states))
    # And trains on as the saved one does.
    nnx.update(fresh, nnx.state(model, nnx.RngState))
    step = nnx.jit(mbn_jax.nnx.make_train_step(loss_fn, double_forward="off"))
    for m, o in ((model, optimizer), (fresh, fresh_optimizer)):
        step(m, o, batches(1)[0])
    equal(*(nnx.to_pure_dict(nnx.state(m, nnx.BatchStat)) for m in (model, fresh)))
    assert jnp.isfinite(jax.tree.leaves(nnx.state(fresh, nnx.BatchStat))[0]).all()
