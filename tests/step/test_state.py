"""The train state: made, donated, written and read; optimizers that ask for more than gradients."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from stepping import Net, batches, loss_fn, memorized, run_on_devices

from mbn_jax import TrainState, make_train_step
from mbn_jax.parallel.devices import AXIS_NAME, first_device


def created(tx, freeze=lambda variables: variables, key=None):
    model, x = Net(), batches(1)[0]
    variables = freeze(model.init(jax.random.key(0), x, train=False))
    key = jax.random.key(1) if key is None else key
    return model, TrainState.create(variables, tx, key)


def train(model, tx, state, data, **options):
    step = jax.jit(make_train_step(model.apply, tx, loss_fn), donate_argnums=0, **options)
    losses = []
    for x in data:
        state, metrics = step(state, x)
        losses.append(float(metrics["loss"]))
    return state, losses


def test_frozen_variables_are_taken():
    tx = optax.sgd(0.1)
    model, state = created(tx, flax.core.freeze)
    _, expected = created(tx)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    assert train(model, tx, state, batches(2))[0].step == 2


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
@pytest.mark.slow
def test_flax_serialization_restores_the_state_to_the_bit(make_key):
    tx, data = optax.adam(0.1), batches(4)
    model, state = created(tx, key=make_key(1))
    state, _ = train(model, tx, state, data[:2])
    _, fresh = created(tx, key=make_key(2))
    restored = flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    ends = [train(model, tx, s, data[2:])[0] for s in (state, restored)]
    plain = [s.replace(key=jnp.asarray(jax.random.key_data(s.key))) for s in ends]
    jax.tree.map(np.testing.assert_array_equal, *plain)


def test_a_subclass_of_the_state_is_serialized_with_its_fields():
    class WithAverage(TrainState):
        average: object = None

    tx = optax.sgd(0.1)
    _, state = created(tx)
    states = [WithAverage(**vars(state), average={"x": jnp.full(2, value)}) for value in (1.0, 2.0)]
    restored = flax.serialization.from_bytes(states[1], flax.serialization.to_bytes(states[0]))
    assert restored.average["x"].tolist() == [1, 1]
    assert jax.random.key_data(restored.key).tolist() == [0, 1]


OPTIMIZERS = {
    "plateau": lambda: optax.chain(
        optax.adam(0.05), optax.contrib.reduce_on_plateau(patience=1, factor=0.5)
    ),
    "polyak": lambda: optax.polyak_sgd(max_learning_rate=0.1),
    "lbfgs": optax.lbfgs,
    "dog": lambda: optax.contrib.dog(1.0),
    "prodigy": lambda: optax.contrib.prodigy(0.1),
    "sam": lambda: optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.01)),
    "schedule_free": lambda: optax.contrib.schedule_free_sgd(0.1),
    "multi_steps": lambda: optax.MultiSteps(optax.sgd(0.1), 2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:.*linesearch.*:UserWarning")
@pytest.mark.slow
def test_optimizers_that_take_more_than_gradients_train_a_donated_state(name):
    tx = OPTIMIZERS[name]()
    model, state = created(tx)
    x = batches(1, size=64)
    _, losses = train(model, tx, state, jnp.concatenate([x] * 12))
    # Some feel their way: 'dog' and 'prodigy' begin with tiny steps.
    assert losses[-1] < losses[0]


def test_a_plateau_is_seen_in_the_loss_of_the_step():
    tx = optax.contrib.reduce_on_plateau(patience=1, factor=0.5, accumulation_size=1)
    model, state = created(tx)
    zero = optax.chain(optax.set_to_zero(), tx)
    _, state = created(zero)
    state, _ = train(model, zero, state, jnp.concatenate([batches(1)] * 6))
    assert float(state.opt_state[1].scale) < 1  # The loss never fell.


@pytest.mark.filterwarnings("ignore:.*linesearch.*:UserWarning")
@pytest.mark.slow
def test_a_line_search_on_two_devices_is_that_on_one():
    model, tx = Net(functools.partial(memorized, axis_name=AXIS_NAME)), optax.lbfgs()
    data = batches(3)
    ends = [
        first_device(run_on_devices(model, tx, data.reshape(3, n, -1, 5), n, "rewrite").params)
        for n in (1, 2)
    ]
    # Sums over devices in another order, through a search for a step size.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), *ends)
