"""The layers for NNX: as those for linen to the bit, and used as `nnx.BatchNorm` is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mbn_jax.linen.batch_renorm
import mbn_jax.nnx
from mbn_jax.nnx import MemorizedBatchNorm

equal = functools.partial(jax.tree.map, np.testing.assert_array_equal)


def normal(*shape, seed=0, mean=0.0):
    return jnp.asarray(np.random.default_rng(seed).normal(mean, size=shape), jnp.float32)


def rngs():
    return nnx.Rngs(0)


def linen_pair(name, **options):
    linen = getattr(mbn_jax, name)(use_running_average=False, **options)
    return linen, getattr(mbn_jax.nnx, name)(3, rngs=rngs(), **options)


def stats(layer):
    return nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))


SCHEDULES = {
    "memory_size": optax.linear_schedule(1, 4, 3),
    "decay": optax.linear_schedule(1.0, 0.5, 2),
    "memory_capacity": 4,
}
PAIRS = {
    "memorized": ("MemorizedBatchNorm", {"memory_size": 3}),
    "through": ("MemorizedBatchNorm", {"memory_size": 3, "gradient": "through"}),
    "two_pass": ("MemorizedBatchNorm", {"memory_size": 3, "use_fast_variance": False}),
    "schedule": ("MemorizedBatchNorm", SCHEDULES),
    "endless": ("MemorizedBatchNorm", {"memory_size": None, "decay": 0.9}),
    "no_scale": ("MemorizedBatchNorm", {"memory_size": 3, "use_scale": False, "epsilon": 0.1}),
    "bfloat16": ("MemorizedBatchNorm", {"memory_size": 3, "dtype": jnp.bfloat16}),
    "renorm": ("BatchRenorm", {"r_max": 2.0, "d_max": 1.0, "momentum": 0.5}),
    "renorm_schedule": ("BatchRenorm", {}),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("name", "options"), PAIRS.values(), ids=PAIRS)
@pytest.mark.slow
def test_outputs_gradients_and_statistics_are_those_of_linen_to_the_bit(name, options, masked):
    linen, layer = linen_pair(name, **options)
    data = [normal(6, 4, 3, seed=seed, mean=seed) for seed in range(4)]
    mask = normal(6, 4, 3, seed=9) > 0 if masked else None
    variables = linen.init(jax.random.key(0), data[0])
    equal(variables["batch_stats"], stats(layer))

    def objective(y):
        y = y if mask is None else jnp.where(mask, y, 0)
        return (y * normal(6, 4, 3, seed=8)).sum() + jnp.sin(y).sum(), y

    def linen_loss(params, x, batch_stats):
        y, updates = linen.apply(
            {"params": params, "batch_stats": batch_stats}, x, mask=mask, mutable=["batch_stats"]
        )
        loss, y = objective(y)
        return loss, (y, updates["batch_stats"])

    linen_step = jax.jit(jax.grad(linen_loss, argnums=(0, 1), has_aux=True))
    step = nnx.jit(
        nnx.grad(lambda layer, x: objective(layer(x, mask=mask)), argnums=(0, 1), has_aux=True)
    )
    for x in data:
        expected, (y, batch_stats) = linen_step(variables["params"], x, variables["batch_stats"])
        variables = {**variables, "batch_stats": batch_stats}
        (to_params, to_x), actual = step(layer, x)
        equal(actual, y)
        equal(nnx.to_pure_dict(to_params), expected[0])
        equal(to_x, expected[1])
        equal(stats(layer), batch_stats)
    y = jax.jit(functools.partial(linen.clone(use_running_average=True).apply))(variables, data[0])
    before = stats(layer)
    layer.eval()
    equal(nnx.jit(lambda layer, x: layer(x))(layer, data[0]), y)
    equal(stats(layer), before)


def test_the_layer_is_used_as_batch_norm_is():
    class Net(nnx.Module):
        def __init__(self, norm):
            self.linear = nnx.Linear(4, 3, rngs=rngs())
            self.norm = norm(3, rngs=rngs())

        def __call__(self, x):
            return self.norm(self.linear(x))

    x = normal(8, 4)
    for norm in (nnx.BatchNorm, MemorizedBatchNorm, mbn_jax.nnx.BatchRenorm):
        model = Net(norm)
        assert model.norm.use_running_average is False
        kept = nnx.state(model, nnx.BatchStat)
        assert kept["norm"]["mean"].get_value().any() == 0
        model(x)
        trained = nnx.clone(nnx.state(model, nnx.BatchStat))
        assert trained["norm"]["mean"].get_value().any()
        for inference in (model.eval, lambda m=model: m.set_attributes(use_running_average=True)):
            model.train()
            inference()
            assert model.norm.use_running_average is True
            model(x)
            equal(nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)), nnx.to_pure_dict(trained))
        view = nnx.view(model, use_running_average=False)
        assert (view.norm.use_running_average, model.norm.use_running_average) == (False, True)
        assert set(nnx.to_pure_dict(nnx.state(model, nnx.Param))["norm"]) == {"scale", "bias"}
        model.norm(normal(8, 3), use_running_average=False)  # Takes precedence.
        assert not np.array_equal(model.norm.mean[...], trained["norm"]["mean"][...])


def test_metadata_of_parameters_is_kept():
    layer = MemorizedBatchNorm(
        3, scale_metadata={"note": "a"}, bias_metadata={"note": "b"}, rngs=rngs()
    )
    assert (layer.scale.note, layer.bias.note) == ("a", "b")
    bare = MemorizedBatchNorm(3, use_scale=False, use_bias=False, rngs=rngs())
    assert bare.scale is None
    assert bare.bias is None


def test_traced_memory_size_and_decay_share_one_program():
    x = normal(3, 6, 3)

    @jax.jit
    def run(memory_size, decay):
        layer = MemorizedBatchNorm(
            3, memory_size=memory_size, decay=decay, memory_capacity=3, rngs=rngs()
        )
        for batch in x[:-1]:
            layer(batch)
        return layer(x[-1])

    for size, decay in ((1, 0.9), (2, 0.9), (3, 0.5)):
        fixed = MemorizedBatchNorm(3, memory_size=size, decay=decay, memory_capacity=3, rngs=rngs())
        for batch in x:
            y = fixed(batch)
        np.testing.assert_allclose(run(size, decay), y, atol=5e-6)
    assert run._cache_size() == 1


def test_the_memory_size_of_a_model_is_changed_without_compiling_again():
    model = nnx.Sequential(
        MemorizedBatchNorm(
            3, memory_size=1, memory_capacity=4, use_running_average=True, rngs=rngs()
        )
    )
    [layer] = model.layers
    for seed in range(4):
        layer(normal(8, 3, seed=seed, mean=seed), use_running_average=False)
    outputs, traces = [], []

    @nnx.jit
    def compiled(model, x):
        traces.append(x)
        return model(x)

    for size in (1, 4):
        model.set_attributes(memory_size=nnx.data(jnp.asarray(size)))
        outputs.append(compiled(model, normal(8, 3)))
        fixed = nnx.clone(model)
        fixed.layers[0].memory_size = nnx.static(size)
        np.testing.assert_allclose(outputs[-1], fixed(normal(8, 3)), atol=1e-6)
    assert len(traces) == 1
    assert not np.allclose(*outputs)


@pytest.mark.parametrize("dtype", ["float64", "complex64"])
@pytest.mark.slow
def test_statistics_are_wide_where_the_layer_is_made_so(dtype):
    with jax.enable_x64(True):
        layer = MemorizedBatchNorm(3, memory_size=2, dtype=jnp.dtype(dtype), rngs=rngs())
        x = normal(8, 3).astype(dtype)
        assert layer(x).dtype == dtype
        assert layer.mean.dtype == dtype
        narrow = MemorizedBatchNorm(3, memory_size=2, rngs=rngs())
        with pytest.raises(ValueError, match="in NNX, give it the dtype"):
            narrow(x)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (MemorizedBatchNorm, {"memory_size": 0}, r"memory_size must be .* got 0"),
        (MemorizedBatchNorm, {"decay": 0.0}, r"decay must be in \(0, 1\], got 0"),
        (MemorizedBatchNorm, {"gradient": "exact"}, "gradient must be one of"),
        (MemorizedBatchNorm, {"memory_size": abs}, "traced or a function needs memory_capacity"),
        (MemorizedBatchNorm, {"axis_index_groups": ((0, 1),)}, "divides a named axis"),
        (mbn_jax.nnx.BatchRenorm, {"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        (mbn_jax.nnx.BatchRenorm, {"r_max": 0.5}, "r_max must be 1 or more"),
        (mbn_jax.nnx.BatchRenorm, {"axis_index_groups": ((0, 1),)}, "divides a named axis"),
    ],
)
def test_impossible_options_are_refused_on_construction(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(3, rngs=rngs(), **options)


def test_inputs_that_do_not_fit_are_refused():
    layer = MemorizedBatchNorm(3, rngs=rngs())
    with pytest.raises(ValueError, match=r"expected 3 features .*got an input of shape \(4, 2\)"):
        layer(normal(4, 2))
    with pytest.raises(ValueError, match="floating-point inputs, got int32"):
        layer(jnp.ones((4, 3), int))
    layer.count.set_value(layer.count.get_value()[:2])
    with pytest.raises(ValueError, match=r"expected a memory of shape \(64, 3\)"):
        layer(normal(4, 3))
    undecided = MemorizedBatchNorm(3, use_running_average=None, rngs=rngs())
    with pytest.raises(ValueError, match="needs use_running_average"):
        undecided(normal(4, 3))


@pytest.mark.parametrize("groups", [None, [[0, 1, 2, 3], [4, 5, 6, 7]]])
def test_devices_share_statistics_as_those_of_linen_do(groups):
    x = normal(8, 4, 3, mean=1)
    options = {"memory_size": 2, "axis_name": "batch", "axis_index_groups": groups}
    linen, layer = linen_pair("MemorizedBatchNorm", **options)
    variables = linen.init(jax.random.key(0), x[0])

    def apply_linen(x):
        return linen.apply(variables, x, mutable=["batch_stats"])

    @functools.partial(nnx.pmap, in_axes=(None, 0), axis_name="batch", graph=False)
    def apply(layer, x):
        copy = nnx.clone(layer)
        return copy(x), stats(copy)

    y, updates = jax.pmap(apply_linen, axis_name="batch")(x)
    equal(apply(layer, x), (y, updates["batch_stats"]))
