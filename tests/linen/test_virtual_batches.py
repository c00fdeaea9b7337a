"""Virtual batches against the groups normalized one by one."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbn_jax import MemorizedBatchNorm
from mbn_jax.core.batch_stats import pool_batch_stats
from mbn_jax.linen.batch_renorm import BatchRenorm
from mbn_jax.linen.virtual_batches import VirtualBatches
from mbn_jax.parallel.devices import AXIS_NAME

NORMS = {
    "memorized": functools.partial(MemorizedBatchNorm, memory_size=3),
    "endless": functools.partial(MemorizedBatchNorm, memory_size=None),
    "batch": nn.BatchNorm,
    "batch_renorm": functools.partial(BatchRenorm, r_max=2.0, d_max=1.0),
}
every_norm = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
# The same numbers in a batched program.
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def batches(count, size=12, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(count, size, 5, 3)), jnp.float32)


def train(layer, variables, x, **options):
    y, updates = layer.apply(variables, x, mutable=["batch_stats"], **options)
    return y, {**variables, **updates}


@every_norm
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.slow
def test_each_group_is_a_layer_of_its_own(norm, masked):
    virtual = VirtualBatches(norm, num_groups=3)
    data = batches(3)
    mask = jnp.asarray(np.random.default_rng(1).random((12, 5, 1)) < 0.7)
    options = {"use_running_average": False, **({"mask": mask} if masked else {})}
    variables = virtual.init(jax.random.key(0), data[0], use_running_average=False)
    alone = [norm().init(jax.random.key(0), data[0], use_running_average=True)] * 3
    for x in data:
        y, variables = train(virtual, variables, x, **options)
        for group in range(3):
            part = slice(4 * group, 4 * group + 4)
            options_alone = {**options, "mask": mask[part]} if masked else options
            expected, alone[group] = train(norm(), alone[group], x[part], **options_alone)
            close(y[part], expected)
    stacked = jax.tree.map(lambda *s: jnp.stack(s), *(v["batch_stats"] for v in alone))
    stacked["groups"] = jnp.arange(3)
    jax.tree.map(close, variables["batch_stats"], stacked)
    pooled = {**alone[0], "batch_stats": pool_batch_stats(stacked)}
    close(
        virtual.apply(variables, data[0], use_running_average=True),
        norm().apply(pooled, data[0], use_running_average=True),
    )


@every_norm
def test_parameters_are_where_they_would_be_and_init_binds_no_batch(norm):
    x = batches(1)[0]
    plain = norm(use_running_average=False).init(jax.random.key(0), x)
    for example in (x, x[:1], x[:5]):
        for inference in (False, True):
            virtual = VirtualBatches(norm, num_groups=3, use_running_average=inference)
            variables = virtual.init(jax.random.key(0), example)
            jax.tree.map(np.testing.assert_array_equal, variables["params"], plain["params"])
            stacked = jax.tree.map(lambda s: jnp.stack([s] * 3), plain["batch_stats"])
            stacked["groups"] = jnp.arange(3)
            jax.tree.map(np.testing.assert_array_equal, variables["batch_stats"], stacked)


@every_norm
@pytest.mark.slow
def test_one_group_is_the_layer_and_gradients_agree(norm):
    x = batches(1)[0]
    plain, virtual = norm(), VirtualBatches(norm, num_groups=1)
    variables = plain.init(jax.random.key(0), x, use_running_average=True)
    in_group = virtual.init(jax.random.key(0), x, use_running_average=True)

    def loss(layer, variables, params):
        y, _ = train(layer, {**variables, "params": params}, x, use_running_average=False)
        return (y**3).sum()

    grads = [
        jax.grad(functools.partial(loss, layer, v))(v["params"])
        for layer, v in ((plain, variables), (virtual, in_group))
    ]
    jax.tree.map(functools.partial(close, rtol=1e-4, atol=1e-3), *grads)  # Sums of 60 cubes.


@pytest.mark.slow
def test_gradient_auto_counts_the_group():
    x = batches(1, size=4)[0][:, 0]
    layers = {
        gradient: VirtualBatches(functools.partial(MemorizedBatchNorm, gradient=gradient), 2, False)
        for gradient in ("auto", "through", "renorm")
    }
    variables = layers["auto"].init(jax.random.key(0), x)
    # With a memory, for alone with one batch the rules are one.
    _, variables = train(layers["auto"], variables, batches(1, size=4, seed=1)[0][:, 0])

    def grad(gradient):
        def loss(x):
            y, _ = train(layers[gradient], variables, x)
            return (y * jnp.arange(12.0).reshape(4, 3)).sum()

        return jax.grad(loss)(x)

    np.testing.assert_array_equal(grad("auto"), grad("through"))
    assert np.abs(grad("auto") - grad("renorm")).max() > 1e-3


@every_norm
@pytest.mark.slow
def test_groups_are_spread_over_devices(norm):
    x = batches(1, size=16)[0]
    alone = VirtualBatches(norm, 2, use_running_average=False)
    spread = VirtualBatches(functools.partial(norm, axis_name=AXIS_NAME), 2, False)
    variables = alone.init(jax.random.key(0), x)
    y, after = train(alone, variables, x)
    devices = 4
    # Group g of every device together: examples [g, device, ...].
    per_device = x.reshape(2, devices, 2, 5, 3).swapaxes(0, 1).reshape(devices, 4, 5, 3)
    mapped = jax.pmap(
        functools.partial(train, spread),
        axis_name=AXIS_NAME,
        in_axes=(None, 0),
        devices=jax.devices()[:devices],
    )
    y_spread, after_spread = mapped(variables, per_device)
    y_spread = y_spread.reshape(devices, 2, 2, 5, 3).swapaxes(0, 1).reshape(16, 5, 3)
    close(y, y_spread)
    jax.tree.map(
        lambda one, many: [close(one, device) for device in many],
        after["batch_stats"],
        after_spread["batch_stats"],
    )


def test_what_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="num_groups must be 1 or more, got 0"):
        VirtualBatches(nn.BatchNorm, 0)
    layer = VirtualBatches(nn.BatchNorm, 5, use_running_average=False)
    x = batches(1)[0]
    with pytest.raises(ValueError, match="divisible by num_groups=5, got 12 examples"):
        train(layer, layer.init(jax.random.key(0), x), x)
