"""The step under jax.jit on a global batch that is sharded over a mesh, without an axis name."""

import functools
import re

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from stepping import Net, batches, endless, loss_fn, memorized, run

from mbn_jax import TrainState, make_train_step

DEVICES = 8
MODES = {
    "off": {"double_forward": "off"},
    "rewrite": {"double_forward": "rewrite"},
    "transport": {"double_forward": "transport"},
    "quarter": {"double_forward": "transport", "double_forward_fraction": 0.25},
}


def sharded_run(model, tx, data, axis_type, **options):
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("data",), axis_types=(axis_type,))
    variables = model.init(jax.random.key(0), data[0], train=False)
    state = TrainState.create(variables, tx, jax.random.key(1))
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    step = jax.jit(make_train_step(model.apply, tx, loss_fn, **options))
    for x in data:
        x = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        if step._cache_size() == 0:
            compiled = step.lower(state, x).compile().as_text()
        state, _ = step(state, x)
    return state, compiled


@pytest.mark.parametrize("norm", [memorized, endless], ids=["memorized", "endless"])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("mode", MODES)
def test_a_sharded_batch_trains_as_on_one_device(mode, axis_type, norm):
    data, model, tx = batches(3, size=32), Net(norm), optax.sgd(0.1)
    expected = run(
        model,
        tx,
        data,
        mode=MODES[mode]["double_forward"],
        **{k: v for k, v in MODES[mode].items() if k != "double_forward"},
    )
    state, compiled = sharded_run(model, tx, data, axis_type, **MODES[mode])
    # Sums over devices in another order.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, state.params, expected.params)
    jax.tree.map(close, state.batch_stats, expected.batch_stats)
    # It did run on all of them.
    assert re.search(r"all-reduce|all-gather", compiled)
