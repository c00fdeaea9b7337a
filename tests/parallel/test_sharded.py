"""The step under jax.jit on a global batch that is sharded over a mesh, without an axis name."""

import functools

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from stepping import Net, batches, endless, loss_fn, memorized, run

from mbn_jax import TrainState, make_train_step

pytestmark = pytest.mark.slow

DEVICES = 8
MODES = {  # With the part of the batch that the second forward sees.
    "off": ("off", 1.0),
    "rewrite": ("rewrite", 1.0),
    "transport": ("transport", 1.0),
    "quarter": ("transport", 0.25),
}


@functools.cache
def run_on_one_device(mode, norm):
    double_forward, fraction = MODES[mode]
    return run(
        Net(norm),
        optax.sgd(0.1),
        batches(3, size=32),
        double_forward,
        double_forward_fraction=fraction,
    )


def run_sharded(mode, norm, axis_type):
    model, tx, data = Net(norm), optax.sgd(0.1), batches(3, size=32)
    double_forward, fraction = MODES[mode]
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("data",), axis_types=(axis_type,))
    variables = model.init(jax.random.key(0), data[0], train=False)
    state = TrainState.create(variables, tx, jax.random.key(1))
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    step = jax.jit(
        make_train_step(
            model.apply,
            tx,
            loss_fn,
            double_forward=double_forward,
            double_forward_fraction=fraction,
        )
    )
    for x in data:
        state, _ = step(state, jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))))
    return state


@pytest.mark.parametrize("norm", [memorized, endless], ids=["memorized", "endless"])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("mode", MODES)
def test_a_sharded_batch_trains_as_on_one_device(mode, axis_type, norm):
    expected, state = run_on_one_device(mode, norm), run_sharded(mode, norm, axis_type)
    # Sums over devices in another order.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, state.params, expected.params)
    jax.tree.map(close, state.batch_stats, expected.batch_stats)
    # It did run on all of them; tests/test_cost.py counts what they exchange.
    assert all(len(leaf.devices()) == DEVICES for leaf in jax.tree.leaves(state))
