"""A small network that is stepped by hand: for the tests of the second forward."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from mbn_jax import MemorizedBatchNorm, TrainState, make_train_step
from mbn_jax.parallel.devices import AXIS_NAME, replicate

memorized = functools.partial(MemorizedBatchNorm, memory_size=4, decay=0.9)
endless = functools.partial(MemorizedBatchNorm, memory_size=None)


class Net(nn.Module):
    norm: object = memorized
    layers: int = 1

    @nn.compact
    def __call__(self, x, train):
        for _ in range(self.layers):
            x = nn.relu(self.norm(use_running_average=not train)(nn.Dense(6)(x)))
        return nn.Dense(3)(x)


def loss_fn(apply, x):
    y, updates = apply(x, train=True)
    return ((y - 1) ** 2).mean(), ({}, updates)


def changing(change):
    """An optimizer that sets the parameters to `change(params)`, whatever the gradient."""

    def update(grads, state, params):
        return jax.tree.map(jnp.subtract, change(params), params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def batches(steps, size=16, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(steps, size, 5)), jnp.float32)


@functools.lru_cache(maxsize=16)
def compiled_step(model, tx, mode, **options):
    """The step of a test, compiled once however often the test goes on from a state."""
    return jax.jit(make_train_step(model.apply, tx, loss_fn, double_forward=mode, **options))


def run(model, tx, data, mode="transport", state=None, **options):
    if state is None:
        variables = model.init(jax.random.key(0), data[0], train=False)
        state = TrainState.create(variables, tx, jax.random.key(1))
    step = compiled_step(model, tx, mode, **options)
    for x in data:
        state, _ = step(state, x)
    return state


def stats_of(state, name="MemorizedBatchNorm_0"):
    return state.batch_stats[name]


def moments(x):
    return x.mean(0), x.var(0)


def run_on_devices(model, tx, data, count, mode="transport", **options):
    """Trains on `data`, batches split as `[devices, ...]`; returns the state of all devices."""
    variables = model.init(jax.random.key(0), data[0][0], train=False)
    devices = jax.devices()[:count]
    state = replicate(TrainState.create(variables, tx, jax.random.key(1)), devices)
    step = make_train_step(
        model.apply, tx, loss_fn, double_forward=mode, axis_name=AXIS_NAME, **options
    )
    step = jax.pmap(step, axis_name=AXIS_NAME, devices=devices)
    for x in data:
        state, _ = step(state, x)
    return state


def by_shard_map(function, donate_argnums=()):
    """Does what `jax.pmap` does, for arrays of the same layout."""

    def per_device(*args):
        out = function(*jax.tree.map(lambda x: x[0], args))
        return jax.tree.map(lambda x: x[None], out)

    mesh, spec = Mesh(np.array(jax.devices()), (AXIS_NAME,)), PartitionSpec(AXIS_NAME)
    # With check_vma=True, a gradient averaged by lax.pmean comes out multiplied by the devices.
    mapped = jax.shard_map(per_device, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return jax.jit(mapped, donate_argnums=donate_argnums)


RUNTIMES = (functools.partial(jax.pmap, axis_name=AXIS_NAME), by_shard_map)
