"""Statistics that nn.scan and nn.vmap stack: folded, started from, pooled, read."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mbn_jax import (
    BatchRenorm,
    MemorizedBatchNorm,
    VirtualBatches,
    from_batch_norm,
    pool_batch_stats,
    recalibrate,
    to_batch_norm,
)
from mbn_jax.core.batch_stats import inference_statistics, moments_shape

LAYERS = 3
memorized = functools.partial(MemorizedBatchNorm, memory_size=LAYERS, decay=0.8)
NORMS = {
    # As many slots as layers: shapes alone cannot tell one axis from the other.
    "memorized": memorized,
    "schedule": functools.partial(
        memorized, memory_capacity=LAYERS, memory_size=optax.linear_schedule(1, LAYERS, 4)
    ),
    "endless": functools.partial(MemorizedBatchNorm, memory_size=None, decay=0.8),
    "batch_renorm": functools.partial(BatchRenorm, r_max=2.0, d_max=1.0),
    "batch": nn.BatchNorm,
    "virtual": lambda use_running_average: VirtualBatches(memorized, LAYERS, use_running_average),
    "virtual_batch": lambda use_running_average: VirtualBatches(
        nn.BatchNorm, LAYERS, use_running_average
    ),
}
AXES = {"params": 0, "batch_stats": 0}


class Block(nn.Module):
    norm: object

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(LAYERS)(x)  # As many features, too.
        return nn.tanh(self.norm(use_running_average=not train)(x))


class Scanned(nn.Module):
    norm: object

    @nn.compact
    def __call__(self, x, train):
        scan = nn.scan(
            lambda block, x, _: (block(x, train), None),
            variable_axes=AXES,
            split_rngs={"params": True},
            length=LAYERS,
        )
        return scan(Block(self.norm, name="block"), x, None)[0]


class Mapped(nn.Module):
    norm: object

    @nn.compact
    def __call__(self, x, train):
        members = nn.vmap(Block, variable_axes=AXES, split_rngs={"params": True}, in_axes=(0, None))
        x = jnp.stack([x, 2 * x, x + 1])
        return members(self.norm, name="block")(x, train).sum(0)


every_stack = pytest.mark.parametrize("stack", [Scanned, Mapped])
every_norm = pytest.mark.parametrize("norm", NORMS)


def batches(count, seed=0):
    x = np.random.default_rng(seed).normal(size=(count, 12, LAYERS)) * 2 + 1
    return jnp.asarray(x, jnp.float32)


@functools.cache
def trained(stack, norm):
    model = stack(NORMS[norm])
    variables = model.init(jax.random.key(0), batches(1)[0], train=False)
    apply = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))
    for x in batches(5, seed=1):
        variables = {**variables, **apply(variables, x)[1]}
    return model, variables


# Pooled here and there, in other programs.
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


@every_stack
@every_norm
@pytest.mark.slow
def test_a_folded_stack_infers_the_same(stack, norm):
    model, variables = trained(stack, norm)
    x = batches(1, seed=2)[0]
    folded = to_batch_norm(variables)
    expected = model.apply(variables, x, train=False)
    close(stack(nn.BatchNorm).apply(folded, x, train=False), expected)


@every_stack
@every_norm
@pytest.mark.slow
def test_a_stack_started_from_batch_norm_infers_the_same(stack, norm):
    old, checkpoint = trained(stack, "batch")
    new = stack(NORMS[norm])
    x = batches(1, seed=2)[0]
    started = from_batch_norm(checkpoint, new.init(jax.random.key(3), x, train=False))
    close(new.apply(started, x, train=False), old.apply(checkpoint, x, train=False))


@every_stack
@every_norm
def test_statistics_of_a_stack_are_those_of_its_layers(stack, norm):
    _, variables = trained(stack, norm)
    (stats,) = variables["batch_stats"]["block"].values()
    shape = jax.tree.map(jnp.shape, inference_statistics(stats))
    assert shape == ((LAYERS, LAYERS),) * 2 == (moments_shape(stats),) * 2
    for layer in range(LAYERS):
        alone = inference_statistics(jax.tree.map(lambda x: x[layer], stats))  # noqa: B023
        for value, expected in zip(inference_statistics(stats), alone, strict=True):
            close(value[layer], expected)


@every_norm
def test_stacks_of_devices_are_pooled_layer_by_layer(norm):
    _, variables = trained(Scanned, norm)
    other = jax.tree.map(lambda x: x if x.dtype == jnp.int32 else 1.5 * x, variables["batch_stats"])
    stacked = jax.tree.map(lambda *x: jnp.stack(x), variables["batch_stats"], other)
    pooled = pool_batch_stats(stacked)
    for layer in range(LAYERS):
        alone = pool_batch_stats(jax.tree.map(lambda x: x[:, layer], stacked))  # noqa: B023
        jax.tree.map(close, jax.tree.map(lambda x: x[layer], pooled), alone)  # noqa: B023


@every_stack
def test_layers_inside_of_a_stack_cannot_be_recalibrated(stack):
    model, variables = trained(stack, "memorized")

    def apply(variables, x, **options):
        return model.apply(variables, x, train=False, **options)

    with pytest.raises(ValueError, match=r"block/.*cannot be recorded inside of nn\.scan"):
        recalibrate(apply, variables, batches(2))


def test_statistics_without_groups_are_not_pooled():
    _, variables = trained(Scanned, "memorized")
    layer = jax.tree.map(lambda x: x[0], variables["batch_stats"])
    for stats in (layer, {"norm": {"mean": jnp.ones(3), "var": jnp.ones(3)}}):
        with pytest.raises(ValueError, match=r"expected statistics \[groups, \.\.\.\]"):
            pool_batch_stats(stats)


def test_parameters_that_are_called_mean_and_var_are_parameters():
    class Gaussian(nn.Module):
        norm: object

        @nn.compact
        def __call__(self, x):
            names = ("mean", "var", "count")
            mean, var, count = (self.param(name, nn.initializers.normal(), (3,)) for name in names)
            x = nn.BatchNorm(use_running_average=True)(x) if not self.norm else self.norm(x)
            return x * mean[None] + (var + count)[None]

    x = batches(1)[0]
    old = Gaussian(None).init(jax.random.key(0), x)
    new = Gaussian(None).init(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, from_batch_norm(old, new), old)
    jax.tree.map(np.testing.assert_array_equal, to_batch_norm(old), old)


def test_layers_that_are_stacked_on_another_axis_are_refused():
    layer = nn.vmap(
        memorized,
        variable_axes={"params": 1, "batch_stats": 1},
        split_rngs={"params": True},
    )(use_running_average=False)
    x = batches(LAYERS + 1)
    variables = layer.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"must stack batch_stats on axis 0 .* got a memory of"):
        to_batch_norm(variables)


def test_names_of_lifted_layers_are_those_of_batch_norm():
    def lifted(norm):
        return nn.vmap(norm, variable_axes=AXES, split_rngs={"params": True})(
            use_running_average=True
        )

    class Net(nn.Module):
        norm: object

        @nn.compact
        def __call__(self, x):
            return lifted(self.norm)(x)

    x = batches(LAYERS)
    variables = Net(MemorizedBatchNorm).init(jax.random.key(0), x)
    expected = Net(nn.BatchNorm).init(jax.random.key(0), x)
    assert jax.tree.structure(to_batch_norm(variables)) == jax.tree.structure(expected)
