"""The training step for NNX models, in both styles, against the same network in linen."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from stepping import batches

import mbn_jax
import mbn_jax.nnx
from mbn_jax import TrainState, make_train_step
from mbn_jax.core.double_forward import (
    BATCH_MOMENTS,
    FIRST_BATCH_MOMENTS,
    SecondForward,
    forwards_of,
)
from mbn_jax.nnx import functional, update_model
from mbn_jax.nnx.functional import ModelFunction

equal = functools.partial(jax.tree.map, np.testing.assert_array_equal)
memorized = functools.partial(mbn_jax.nnx.MemorizedBatchNorm, memory_size=4, decay=0.9)
STEPS = {
    "off": {"double_forward": "off"},
    "rewrite": {"double_forward": "rewrite"},
    "transport": {"double_forward": "transport"},
    "transport_part": {"double_forward": "transport", "double_forward_fraction": 0.25},
}
every_step = pytest.mark.parametrize("options", STEPS.values(), ids=STEPS)


class LinenNet(nn.Module):
    norm: object = functools.partial(mbn_jax.MemorizedBatchNorm, memory_size=4, decay=0.9)

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = nn.Dense(6, name=f"dense_{i}")(x)
            x = nn.relu(self.norm(use_running_average=False, name=f"norm_{i}")(x))
        return nn.Dense(3, name="head")(x)


class Net(nnx.Module):
    def __init__(self, norm=memorized, dropout=0.0, rngs=None):
        rngs = rngs or nnx.Rngs(0)
        self.denses = nnx.List([nnx.Linear(5, 6, rngs=rngs), nnx.Linear(6, 6, rngs=rngs)])
        self.norms = nnx.List([norm(6, rngs=rngs) for _ in range(2)])
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        for dense, norm in zip(self.denses, self.norms, strict=True):
            x = nnx.relu(norm(dense(x)))
        return self.head(self.dropout(x))


def as_linen(tree):
    """Renames what NNX keeps in lists as the linen network has it."""
    lists = {
        f"{kind[:-1]}_{i}": tree[kind][i]
        for kind in ("denses", "norms")
        for i in tree.get(kind, {})
    }
    return {**lists, **({"head": tree["head"]} if "head" in tree else {})}


def linen_loss(apply, x):
    y, updates = apply(x)
    return ((y - 1) ** 2).mean(), ({"size": jnp.abs(y).max()}, updates)


def nnx_loss(model, x):
    y = model(x)
    return ((y - 1) ** 2).mean(), {"size": jnp.abs(y).max()}


def train_linen(variables, tx, data, **options):
    state = TrainState.create(variables, tx, jax.random.key(1))
    step = jax.jit(make_train_step(LinenNet().apply, tx, linen_loss, **options))
    for x in data:
        state, metrics = step(state, x)
    return state, metrics


def train_functional(model, tx, data, **options):
    apply_fn, variables = functional(model)
    state = TrainState.create(variables, tx, jax.random.key(1))
    step = jax.jit(make_train_step(apply_fn, tx, linen_loss, **options))
    for x in data:
        state, metrics = step(state, x)
    return state, metrics


def train_nnx(model, tx, data, loss_fn=nnx_loss, **options):
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    step = nnx.jit(mbn_jax.nnx.make_train_step(loss_fn, **options))
    for x in data:
        metrics = step(model, optimizer, x)
    return optimizer, metrics


def state_of(model, kind=nnx.BatchStat):
    return nnx.to_pure_dict(nnx.state(model, kind))


@every_step
@pytest.mark.slow
def test_both_styles_train_as_linen_does_to_the_bit(options):
    data, tx = batches(5), optax.adam(0.03)
    model = Net()
    _, variables = functional(model)
    linen_variables = {name: as_linen(tree) for name, tree in variables.items()}
    expected, expected_metrics = train_linen(linen_variables, tx, data, **options)
    state, metrics = train_functional(Net(), tx, data, **options)
    equal(as_linen(state.params), expected.params)
    equal(as_linen(state.batch_stats), expected.batch_stats)
    equal(metrics, expected_metrics)
    # Written back into a model, which then goes on.
    update_model(model, state)
    equal(as_linen(state_of(model)), expected.batch_stats)
    equal(as_linen(state_of(model, nnx.Param)), expected.params)

    trained = Net()
    optimizer, metrics = train_nnx(trained, tx, data, **options)
    equal(as_linen(state_of(trained, nnx.Param)), expected.params)
    equal(as_linen(state_of(trained)), expected.batch_stats)
    equal(metrics, expected_metrics)
    assert int(optimizer.step[...]) == 5
    leaves = jax.tree.leaves(nnx.as_pure(optimizer.opt_state))
    for a, b in zip(leaves, jax.tree.leaves(state.opt_state), strict=True):
        np.testing.assert_array_equal(a, b)
    # No records stay.
    assert not jax.tree.leaves(nnx.state(trained, mbn_jax.nnx.BatchMoments))


@pytest.mark.parametrize("norm", [nnx.BatchNorm, mbn_jax.nnx.BatchRenorm])
@pytest.mark.slow
def test_rewrite_takes_any_norm_and_transport_only_memories(norm):
    data, tx = batches(3), optax.sgd(0.1)
    rewritten, plain = Net(norm), Net(norm)
    train_nnx(rewritten, tx, data)
    train_nnx(plain, tx, data, double_forward="off")
    if norm is nnx.BatchNorm:  # Of which training uses no average.
        equal(state_of(rewritten, nnx.Param), state_of(plain, nnx.Param))
    assert not np.array_equal(rewritten.norms[1].mean.get_value(), plain.norms[1].mean.get_value())
    with pytest.raises(ValueError, match="transport' must move every memory, and cannot"):
        train_nnx(Net(norm), tx, data, double_forward="transport")
    with pytest.raises(ValueError, match="needs layers that pool batches"):
        train_nnx(Net(norm), tx, data, double_forward_fraction=0.5)


def test_off_is_what_nnx_computes_without_the_step():
    data, tx = batches(3), optax.sgd(0.1)
    model, plain = Net(), Net()
    train_nnx(model, tx, data, double_forward="off")
    optimizer = nnx.Optimizer(plain, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        grads, _ = nnx.grad(nnx_loss, has_aux=True)(model, x)
        optimizer.update(model, grads)

    for x in data:
        step(plain, optimizer, x)
    for kind in (nnx.Param, nnx.BatchStat):
        equal(state_of(model, kind), state_of(plain, kind))


class Twice(Net):
    """Calls its layers twice, one of them also by another name."""

    def __init__(self):
        super().__init__()
        self.again = self.norms[0]

    def __call__(self, x):
        return super().__call__(x) + self.head(self.again(self.denses[0](x + 1)))


@pytest.mark.slow
def test_a_layer_of_two_names_that_is_called_twice_moves_by_its_own_shifts():
    data, tx = batches(3), optax.sgd(0.1)
    model = Twice()
    train_nnx(model, tx, data, double_forward="transport")
    state, _ = train_functional(Twice(), tx, data, double_forward="transport")
    equal(state_of(model), state_of(written(Twice(), state)))
    rewritten = Twice()
    train_nnx(rewritten, tx, data)
    assert not np.array_equal(model.again.mean.get_value(), rewritten.again.mean.get_value())


def written(model, state):
    update_model(model, state)
    return model


@pytest.mark.slow
def test_a_loss_may_call_the_model_several_times():
    data, tx = batches(3), optax.sgd(0.1)

    def two_calls(apply, x):
        y1, _ = apply(x)
        y2, updates = apply(x + 1)
        return ((y1 - y2 - 1) ** 2).mean(), ({}, updates)

    model = Net()
    train_nnx(
        model,
        tx,
        data,
        lambda model, x: (((model(x) - model(x + 1) - 1) ** 2).mean(), {}),
        double_forward="transport",
    )
    apply_fn, variables = functional(Net())
    state = TrainState.create(variables, tx, jax.random.key(1))
    step = jax.jit(make_train_step(apply_fn, tx, two_calls, double_forward="transport"))
    for x in data:
        state, _ = step(state, x)
    equal(state_of(model), state_of(written(Net(), state)))
    assert model.norms[0].count[:, 0].tolist() == [16] * 4


def test_records_are_those_of_the_calls():
    function = ModelFunction(Twice(), nnx.Param, lambda model, x: model(x))
    x = batches(1)[0]
    variables = {"params": function.params, "batch_stats": function.batch_stats}
    with forwards_of(SecondForward("transport")):
        apply = jax.jit(functools.partial(function.apply, mutable=["batch_stats", BATCH_MOMENTS]))
        _, first = apply(variables, x)
        records = first[BATCH_MOMENTS]
        assert {name: len(r["records"]) for name, r in records["norms"].items()} == {"1": 1}
        assert len(records["again"]["records"]) == 2
        assert "used" not in records["again"]
        _, second = apply({**variables, FIRST_BATCH_MOMENTS: records}, x)
    assert len(second[BATCH_MOMENTS]["again"]["used"]) == 2
    equal(second[BATCH_MOMENTS]["again"]["records"], records["again"]["records"])
    # Nothing is recorded unless asked for.
    _, updates = jax.eval_shape(
        functools.partial(function.apply, mutable=["batch_stats"]), variables, x
    )
    assert set(updates) == {"batch_stats"}


@pytest.mark.parametrize("stream", ["dropout", "default"])
@pytest.mark.slow
def test_both_forwards_draw_the_same_numbers_and_each_step_new_ones(stream):
    class Noisy(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(params=0, **{stream: 1})
            self.dense = nnx.Linear(5, 6, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.norm = memorized(6, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.dropout(self.dense(x)))

    data, tx = jnp.stack([batches(1)[0]] * 3), optax.sgd(0.0)
    for double_forward in ("off", "rewrite"):
        model, options = Noisy(), {"double_forward": double_forward}
        train_nnx(model, tx, data, **options)
        state, _ = train_functional(Noisy(), tx, data, **options)
        for mean in (model.norm.mean.get_value(), state.batch_stats["norm"]["mean"]):
            assert not np.allclose(mean[0], mean[1])
        if double_forward == "off":
            expected = mean
    # At rate 0 the second forward sees what the first one saw.
    np.testing.assert_allclose(mean, expected, atol=1e-6)
    reseeded = Noisy()
    nnx.reseed(reseeded, **{stream: 5})
    train_nnx(reseeded, tx, data)
    assert not np.allclose(reseeded.norm.mean.get_value(), model.norm.mean.get_value())
    with pytest.raises(ValueError, match="rng_names is empty"):
        train_functional(Noisy(), tx, data, rng_names=())


def test_only_the_variables_of_wrt_are_trained():
    model = Net()
    only_head = nnx.All(nnx.Param, nnx.PathContains("head"))
    before = state_of(model, nnx.Param)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=only_head)
    step = nnx.jit(mbn_jax.nnx.make_train_step(nnx_loss, double_forward="transport"))
    step(model, optimizer, batches(1)[0])
    after = state_of(model, nnx.Param)
    equal(after["denses"], before["denses"])
    assert not np.array_equal(after["head"]["kernel"], before["head"]["kernel"])
    _, variables = functional(model, wrt=only_head)
    assert set(variables["params"]) == {"head"}


def test_frozen_statistics_stay():
    model = Net(functools.partial(memorized, use_running_average=True))
    before = state_of(model)
    with pytest.raises(ValueError, match="No layer wrote statistics"):
        train_nnx(model, optax.sgd(0.1), batches(1))
    train_nnx(model, optax.sgd(0.1), batches(1), frozen_statistics=True)
    equal(state_of(model), before)


class Count(nnx.Variable):
    pass


class Counting(Net):
    def __init__(self):
        super().__init__()
        self.calls = Count(jnp.zeros(()))

    def __call__(self, x):
        self.calls[...] += 1
        return super().__call__(x)


class CountingAnew(Net):
    def __call__(self, x):
        self.calls = Count(jnp.ones(()))
        return super().__call__(x)


class Sowing(Net):
    def __call__(self, x):
        self.inputs = nnx.Intermediate(x)
        return super().__call__(x)


def test_a_variable_that_the_step_would_lose_is_refused_by_name():
    lost = r"wrote calls, a Variable of the collection 'Count'"
    for train in (train_nnx, train_functional):
        for model in (Counting, CountingAnew):
            with pytest.raises(ValueError, match=lost):
                train(model(), optax.sgd(0.1), batches(1))
            train(model(), optax.sgd(0.1), batches(1), mutable=("Count",))


def test_what_a_forward_sows_is_lost_without_harm():
    train_functional(Sowing(), optax.sgd(0.1), batches(1))


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda model, x: model(x).mean(), r"loss_fn must return \(loss, metrics\)"),
        (lambda model, x: (model(x).mean(), 1.0), r"loss_fn must return \(loss, metrics\)"),
        (lambda model, x: (model(x), {}), "The loss must be a scalar"),
        (lambda model, x: (model(x).mean(), {"loss": 1.0}), "hold 'loss'"),
    ],
)
def test_a_wrong_loss_is_refused(loss_fn, message):
    with pytest.raises(ValueError, match=message):
        train_nnx(Net(), optax.sgd(0.1), batches(1), loss_fn)


def test_impossible_options_optimizers_and_variables_are_refused():
    with pytest.raises(ValueError, match="double_forward must be one of"):
        mbn_jax.nnx.make_train_step(nnx_loss, double_forward="twice")
    with pytest.raises(ValueError, match="needs a second forward"):
        mbn_jax.nnx.make_train_step(nnx_loss, double_forward="off", double_forward_fraction=0.5)

    class Other(nnx.Optimizer):
        def update(self, model, grads):
            pass

    model = Net()
    with pytest.raises(ValueError, match="cannot use the update of Other"):
        mbn_jax.nnx.make_train_step(nnx_loss)(
            model, Other(model, optax.sgd(0.1), wrt=nnx.Param), batches(1)[0]
        )
    apply_fn, variables = functional(model)
    del variables["params"]["head"]
    with pytest.raises(ValueError, match=r"'params' must be those of the model .* head/bias"):
        apply_fn(variables, batches(1)[0])
    state, _ = train_functional(Twice(), optax.sgd(0.1), batches(1))
    with pytest.raises(ValueError, match="which has no again/"):
        update_model(model, state)


def test_apply_is_used_as_of_linen():
    model, x = Net(), batches(1)[0]
    apply_fn, variables = functional(model)
    y, updates = apply_fn(variables, x, mutable="batch_stats")
    equal(apply_fn(variables, x), y)
    equal(updates, apply_fn(variables, x, mutable=True)[1])
    equal(model(x), y)
    equal(
        state_of(
            written(
                Net(),
                TrainState.create({**variables, **updates}, optax.sgd(0.1), jax.random.key(0)),
            )
        ),
        state_of(model),
    )
