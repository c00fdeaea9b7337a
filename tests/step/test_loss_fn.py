"""What `loss_fn` may do, and what the step refuses: nothing loses statistics without a word."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state
from jax.sharding import Mesh, PartitionSpec
from stepping import Net, batches, endless, loss_fn, memorized, run, stats_of

from mbn_jax import MemorizedBatchNorm, TrainState, make_train_step
from mbn_jax.core.double_forward import BATCH_MOMENTS, FIRST_BATCH_MOMENTS
from mbn_jax.parallel.devices import AXIS_NAME, replicate

MODES = ("off", "rewrite", "transport")
every_mode = pytest.mark.parametrize("mode", MODES)


def created(model, tx, x):
    variables = model.init(jax.random.key(0), x, train=False)
    return TrainState.create(variables, tx, jax.random.key(1))


def step_with(loss, mode="rewrite", norm=memorized, tx=None, **options):
    model, tx, x = Net(norm), tx or optax.sgd(0.1), batches(1)[0]
    step = jax.jit(make_train_step(model.apply, tx, loss, double_forward=mode, **options))
    return step(created(model, tx, x), x)


# Several applies in one loss.


def siamese_loss(apply, pair):
    one, updates = apply(pair[0], train=True)
    other, updates = apply(pair[1], train=True)
    return ((one - other) ** 2).mean() + (one**2).mean(), ({}, updates)


def pairs(steps):
    return batches(2 * steps).reshape(steps, 2, 16, 5)


def run_pairs(mode, rate, norm=memorized, steps=3):
    model, tx, data = Net(norm), optax.sgd(rate), pairs(steps)
    state = created(model, tx, data[0][0])
    step = jax.jit(make_train_step(model.apply, tx, siamese_loss, double_forward=mode))
    for pair in data:
        state, _ = step(state, pair)
    return state


@every_mode
def test_two_applies_push_two_slots_a_step(mode):
    norm = functools.partial(MemorizedBatchNorm, memory_size=8)
    memory = stats_of(run_pairs(mode, 0.1, norm))
    assert (memory["count"] > 0).sum(0).tolist() == [6] * 6


@pytest.mark.parametrize("mode", ["rewrite", "transport"])
@pytest.mark.slow
def test_two_applies_at_rate_0_leave_what_off_leaves(mode):
    # Two programs, in which one batch's moments round alike within some units in the last place.
    check = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-6)
    jax.tree.map(check, run_pairs(mode, 0.0).batch_stats, run_pairs("off", 0.0).batch_stats)


def test_two_applies_move_every_slot_to_where_its_batch_is():
    def change(params):
        dense = jax.tree.map(lambda x: 1.1 * x, params["Dense_0"])
        return {**params, "Dense_0": {**dense, "bias": dense["bias"] + 0.1}}

    def update(grads, state, params):
        return jax.tree.map(jnp.subtract, change(params), params), state

    tx = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    model, data = Net(functools.partial(MemorizedBatchNorm, memory_size=6)), pairs(3)
    state = created(model, tx, data[0][0])
    step = jax.jit(make_train_step(model.apply, tx, siamese_loss, double_forward="transport"))
    for pair in data:
        state, _ = step(state, pair)
    dense = state.params["Dense_0"]
    for slot, x in enumerate(reversed(data.reshape(6, 16, 5))):
        mean = (x @ dense["kernel"] + dense["bias"][None]).mean(0)
        # Float32 statistics.
        np.testing.assert_allclose(stats_of(state)["mean"][slot], mean, atol=1e-5)


class Scaled(nn.Module):
    """Scales its inputs, and normalizes the elements that a mask keeps."""

    @nn.compact
    def __call__(self, x, mask, train):
        x = x * self.param("scale", nn.initializers.ones, (1, 1))
        options = {"memory_size": 8, "decay": 1.0, "use_scale": False, "use_bias": False}
        return MemorizedBatchNorm(use_running_average=not train, **options)(x, mask=mask)


@pytest.mark.parametrize("unusable", ["masked", "not finite"])
def test_slots_of_two_applies_stay_apart_when_a_batch_is_not_usable(unusable):
    def loss_fn(apply, batch):
        apply(batch["one"], batch["mask"], train=True)
        y, updates = apply(batch["other"], None, train=True)
        return 0 * y.sum(), ({}, updates)

    def update(grads, state, params):
        return {"scale": 0.1 * params["scale"]}, state

    tx = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    one, other = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 1)), jnp.float32)
    seen, unseen = jnp.ones((16, 1), bool), jnp.zeros((16, 1), bool)
    model = Scaled()
    variables = model.init(jax.random.key(0), one, seen, train=False)
    state = TrainState.create(variables, tx, jax.random.key(1))
    step = jax.jit(make_train_step(model.apply, tx, loss_fn, double_forward="transport"))
    for number in range(3):
        batch = {"one": one, "other": other + 3, "mask": seen}
        if number == 1 and unusable == "masked":
            batch["mask"] = unseen
        elif number == 1:
            batch["one"] = one.at[0].set(jnp.inf)
        state, _ = step(state, batch)
    memory = {name: stats_of(state)[name][:6, 0] for name in ("mean", "var", "count")}
    filled = memory["count"] > 0
    assert filled.tolist() == [True, True, True, False, True, True]
    # The step without a usable batch had no shift for the slot before it.
    scales = 1.1 ** np.array([3, 3, 3, 3, 3, 2])
    for name, of in (("mean", np.mean), ("var", np.var)):
        expected = [of(s * x) for s, x in zip(scales, 3 * [other + 3, one], strict=True)]
        # Moved twice in float32; epsilon is in the ratio of variances.
        np.testing.assert_allclose(memory[name][filled], np.array(expected)[filled], rtol=1e-5)


def test_two_applies_are_those_of_a_loop_by_hand():
    model, tx, data = Net(), optax.sgd(0.1), pairs(1)
    state = created(model, tx, data[0][0])
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    for x in data[0]:
        _, updates = model.apply(variables, x, train=True, mutable=["batch_stats"])
        variables |= updates
    step = jax.jit(make_train_step(model.apply, tx, siamese_loss, double_forward="off"))
    after = step(state, data[0])[0]
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6),
        after.batch_stats,
        variables["batch_stats"],
    )


def test_two_applies_draw_different_dropout_and_the_second_forward_draws_it_again():
    class Dropped(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Dropout(0.5, deterministic=not train)(nn.Dense(6)(x))
            return memorized(use_running_average=not train)(x)

    def loss(apply, x):
        first, updates = apply(x, train=True)
        second, updates = apply(x, train=True)
        return (first * second).mean(), ({}, updates)

    model, tx, x = Dropped(), optax.sgd(0.0), batches(1)[0]
    state = created(model, tx, x)
    means = [
        stats_of(jax.jit(make_train_step(model.apply, tx, loss, double_forward=mode))(state, x)[0])[
            "mean"
        ]
        for mode in ("off", "rewrite")
    ]
    np.testing.assert_allclose(*means, rtol=1e-6)  # At rate 0; rounded alike.
    assert np.abs(means[0][0] - means[0][1]).max() > 1e-2


# What a loss hands back.


def forgets_updates(apply, x):
    y, _ = apply(x, train=True)
    return y.mean(), {"error": y.mean()}


def hands_back_nothing(apply, x):
    y, _ = apply(x, train=True)
    return y.mean(), ({}, {})


def hands_back_the_collection(apply, x):
    y, updates = apply(x, train=True)
    return y.mean(), ({}, updates["batch_stats"])


def swaps_metrics_and_updates(apply, x):
    y, updates = apply(x, train=True)
    return y.mean(), (updates, {})


def applies_at_inference(apply, x):
    y, updates = apply(x, train=False)
    return y.mean(), ({}, updates)


def hands_back_an_earlier_apply(apply, x):
    _, updates = apply(x, train=True)
    y, _ = apply(x + 1, train=True)
    return y.mean(), ({}, updates)


def never_applies(apply, x):
    return x.mean(), ({}, {})


def reports_a_loss(apply, x):
    y, updates = apply(x, train=True)
    return y.mean(), ({"loss": 2 * y.mean()}, updates)


def reports_a_vector(apply, x):
    y, updates = apply(x, train=True)
    return y.mean(), ({"error": y[0]}, updates)


def returns_the_loss_alone(apply, x):
    return apply(x, train=True)[0].mean()


def applies_a_batch_at_a_time(apply, x):
    y, updates = jax.vmap(lambda x: apply(x, train=True))(x.reshape(2, 8, 5))
    return y.mean(), ({}, updates)


def applies_under_checkpoint(apply, x):
    apply_again = jax.checkpoint(lambda x: apply(x, train=True))
    apply_again(x)
    y, updates = apply_again(x + 1)  # JAX reuses the trace: one batch would be lost.
    return y.mean(), ({}, updates)


def applies_in_a_loop(apply, x):
    _, (y, updates) = jax.lax.scan(
        lambda carry, x: (carry, apply(x, train=True)), 0, x.reshape(2, 8, 5)
    )
    return y.mean(), ({}, jax.tree.map(lambda u: u[-1], updates))


def binds_mutable(apply, x):
    y, updates = apply(x, train=True, mutable=["batch_stats"])
    return y.mean(), ({}, updates)


def narrows_the_statistics(apply, x):
    y, updates = apply(x, train=True)
    return y.mean(), ({}, jax.tree.map(lambda u: u.astype(jnp.bfloat16), updates))


def reports_a_text(apply, x):
    y, updates = apply(x, train=True)
    return y.mean(), ({"note": "fine"}, updates)


def does_not_average(apply, x):
    y, updates = apply(x, train=True)
    return y[0], ({}, updates)


WRONG_LOSSES = {
    forgets_updates: r"got a dict with 'error' in place of \(metrics, updates\)",
    hands_back_nothing: r"must hold 'batch_stats'.*got no collection",
    hands_back_the_collection: r"must hold 'batch_stats'.*MemorizedBatchNorm_0",
    swaps_metrics_and_updates: "got the updates in place of the metrics; swap them",
    applies_at_inference: r"No layer wrote statistics.*train=True.*frozen_statistics=True",
    hands_back_an_earlier_apply: "the updates of an earlier apply; hand back those of the last",
    never_applies: "never called apply",
    reports_a_loss: "hold 'loss', under which the step reports its own; rename it",
    reports_a_vector: r"metric 'error' must be a scalar, got an array of shape \(3,\)",
    returns_the_loss_alone: r"must return \(loss, \(metrics, updates\)\), got an array",
    applies_a_batch_at_a_time: r"inside of jax\.jit, .*jax\.vmap.* nn\.remat",
    applies_under_checkpoint: r"inside of jax\.jit, jax\.checkpoint.* nn\.remat",
    applies_in_a_loop: r"inside of .* a loop of jax\.lax",
    binds_mutable: r"has mutable bound already; .*make_train_step \(mutable, rng_names\)",
    narrows_the_statistics: "layers, shapes and dtypes of the TrainState's",
    reports_a_text: "metric 'note' must be a scalar, got a str",
    does_not_average: r"loss must be a scalar, got shape \(3,\)",
}


@every_mode
@pytest.mark.parametrize("loss", WRONG_LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.slow
def test_a_loss_that_would_lose_statistics_is_refused(loss, mode):
    with pytest.raises(ValueError, match=WRONG_LOSSES[loss]):
        step_with(loss, mode)


@every_mode
def test_a_state_without_the_statistics_of_its_model_is_refused(mode):
    model, tx, x = Net(), optax.sgd(0.1), batches(1)[0]
    variables = model.init(jax.random.key(0), x, train=False)
    state = TrainState.create({"params": variables["params"]}, tx, jax.random.key(1))
    step = make_train_step(model.apply, tx, loss_fn, double_forward=mode)
    with pytest.raises(ValueError, match="the TrainState has none; create it from all that model"):
        jax.jit(step)(state, x)


def test_training_around_frozen_statistics_is_said():
    state, _ = step_with(applies_at_inference, frozen_statistics=True)
    assert not stats_of(state)["count"].any()


@pytest.mark.parametrize("last", ["train", "inference"])
@every_mode
@pytest.mark.slow
def test_an_apply_at_inference_beside_one_in_training(mode, last):
    """Consistency losses, gradient penalties: in any order, with the updates of either."""

    def loss(apply, x):
        def penalty(x):
            return (apply(x, train=False)[0] ** 2).mean()

        if last == "train":
            value, slope = penalty(x), jax.grad(penalty)(x)
            y, updates = apply(x, train=True)
        else:
            y, _ = apply(x, train=True)
            value, slope = penalty(x), jax.grad(penalty)(x)
            _, updates = apply(x, train=False)
        return (y**2).mean() + value + (slope**2).mean(), ({}, updates)

    memory = stats_of(step_with(loss, mode)[0])
    assert memory["count"][:, 0].tolist() == [16, 0, 0, 0]


def test_names_may_be_given_as_one_text():
    class Sowing(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Dropout(0.5, deterministic=not train, rng_collection="noise")(x)
            self.sow("losses", "norm", jnp.float32(100))
            return memorized(use_running_average=not train)(x)

    def loss(apply, x):
        y, updates = apply(x, train=True)
        return y.mean() + sum(jax.tree.leaves(updates.get("losses", {}))), ({}, updates)

    model, tx, x = Sowing(), optax.sgd(0.1), batches(1)[0]
    variables = model.init(jax.random.key(0), x, train=False)
    del variables["losses"]
    state = TrainState.create(variables, tx, jax.random.key(1))
    step = jax.jit(make_train_step(model.apply, tx, loss, mutable="losses", rng_names="noise"))
    assert step(state, x)[1]["loss"] > 99


class Frozen(nn.Module):
    """A frozen norm, inside of a lifted transform or not, beside one that trains."""

    lift: object
    trains: bool = True

    @nn.compact
    def __call__(self, x, train):
        norm = self.lift(MemorizedBatchNorm)
        x = norm(memory_size=4, use_running_average=True)(nn.Dense(6)(x))
        return memorized(use_running_average=not (train and self.trains))(nn.Dense(6)(x))


@pytest.mark.parametrize("lift", [lambda norm: norm, nn.remat, nn.jit], ids=["", "remat", "jit"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.slow
def test_frozen_norms_beside_moving_ones(lift, fraction):
    state = run(Frozen(lift), optax.sgd(0.1), batches(2), double_forward_fraction=fraction)
    counts = [(stats["count"] > 0).any() for stats in state.batch_stats.values()]
    assert sorted(counts) == [False, True]


def test_another_state_is_refused():
    model, tx, x = Net(), optax.sgd(0.1), batches(1)[0]
    variables = model.init(jax.random.key(0), x, train=False)
    other = train_state.TrainState.create(apply_fn=model.apply, params=variables["params"], tx=tx)
    with pytest.raises(ValueError, match=r"expected a mbn_jax.TrainState, got flax\..*create\("):
        make_train_step(model.apply, tx, loss_fn)(other, x)


@pytest.mark.parametrize("norm", [memorized, endless], ids=["memorized", "endless"])
def test_a_batch_norm_checkpoint_in_a_memorized_model_is_refused(norm):
    tx, x = optax.sgd(0.1), batches(1)[0]
    old = Net(functools.partial(nn.BatchNorm, name="norm"))
    new = Net(functools.partial(norm, name="norm"))
    state = created(old, tx, x)
    with pytest.raises(ValueError, match=r"start from a BatchNorm checkpoint by .*from_batch_norm"):
        make_train_step(new.apply, tx, loss_fn)(state, x)


def test_collections_that_a_model_sows_reach_the_loss():
    class Sowing(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = memorized(use_running_average=not train)(nn.Dense(6)(x))
            self.sow("losses", "norm", (x**2).mean())
            return x

    def loss(apply, x):
        y, updates = apply(x, train=True)
        (auxiliary,) = updates["losses"]["norm"]
        return y.mean() + auxiliary, ({"auxiliary": auxiliary}, updates)

    model, tx, x = Sowing(), optax.sgd(0.1), batches(1)[0]
    variables = model.init(jax.random.key(0), x, train=False)
    with pytest.raises(ValueError, match=r"\['losses'\]. Take out .*make_train_step\(mutable"):
        TrainState.create(variables, tx, jax.random.key(1))
    del variables["losses"]
    state = TrainState.create(variables, tx, jax.random.key(1))
    step = jax.jit(make_train_step(model.apply, tx, loss, mutable=("losses",)))
    after, metrics = step(state, x)
    assert metrics["auxiliary"] > 0
    assert jax.tree.structure(after) == jax.tree.structure(state)


# Named axes of step and layers.


def test_an_axis_that_is_not_bound_is_said():
    with pytest.raises(ValueError, match=r"axis_name='batch' of make_train_step is not bound"):
        step_with(loss_fn, axis_name="batch")
    with pytest.raises(ValueError, match=r"a named axis that is not bound .*batch"):
        step_with(loss_fn, norm=functools.partial(memorized, axis_name="batch"))


@pytest.mark.parametrize("norm", [memorized, nn.BatchNorm], ids=["memorized", "batch"])
@pytest.mark.slow
def test_step_and_layers_must_mean_the_same_devices(norm):
    tx, x, devices = optax.sgd(0.1), batches(2), jax.devices()[:2]

    def stepped(layer_axis, step_axis, **options):
        model = Net(functools.partial(norm, axis_name=layer_axis))
        state = replicate(created(model, tx, x[0]), devices)
        step = make_train_step(model.apply, tx, loss_fn, axis_name=step_axis, **options)
        return jax.pmap(step, axis_name=AXIS_NAME, devices=devices)(state, x)

    with pytest.raises(
        ValueError, match=r"sync over 'batch', and make_train_step has axis_name=None"
    ):
        stepped(AXIS_NAME, None)
    with pytest.raises(ValueError, match=r"statistics of their own on each device: .*Norm_0"):
        stepped(None, AXIS_NAME)
    stepped(None, AXIS_NAME, local_statistics=True)
    frozen = Net(functools.partial(norm, axis_name=None))
    step = make_train_step(
        frozen.apply,
        tx,
        lambda apply, x: (lambda y, u: (y.mean(), ({}, u)))(*apply(x, train=False)),
        axis_name=AXIS_NAME,
        frozen_statistics=True,
    )
    jax.pmap(step, axis_name=AXIS_NAME, devices=devices)(
        replicate(created(frozen, tx, x[0]), devices), x
    )
    stepped(AXIS_NAME, AXIS_NAME)
    groups = functools.partial(norm, axis_index_groups=((0,), (1,)))
    model = Net(functools.partial(groups, axis_name=AXIS_NAME))
    step = make_train_step(model.apply, tx, loss_fn, axis_name=AXIS_NAME)
    with pytest.raises(ValueError, match="statistics of their own"):
        jax.pmap(step, axis_name=AXIS_NAME, devices=devices)(
            replicate(created(model, tx, x[0]), devices), x
        )


@pytest.mark.parametrize(
    ("of_layer", "of_step", "message"),
    [
        ("data", ("data", "fsdp"), "keep statistics of their own"),
        ("fsdp", "data", "sync over 'fsdp', and make_train_step has axis_name='data'"),
        (("data", "fsdp"), "data", "sync over 'fsdp'"),
        (("data", "fsdp"), ("data", "fsdp"), None),
    ],
)
def test_on_a_mesh_of_two_axes_step_and_layers_name_both(of_layer, of_step, message):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "fsdp"))
    model, tx, x = Net(functools.partial(memorized, axis_name=of_layer)), optax.sgd(0.1), batches(1)
    state = created(model, tx, x[0])
    step = jax.shard_map(
        make_train_step(model.apply, tx, loss_fn, axis_name=of_step),
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(("data", "fsdp"))),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    if message:
        with pytest.raises(ValueError, match=message):
            jax.jit(step)(state, x[0])
        return
    plain = Net()
    expected, _ = jax.jit(make_train_step(plain.apply, tx, loss_fn))(state, x[0])
    # Sums over devices in another order.
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        jax.jit(step)(state, x[0])[0].batch_stats,
        expected.batch_stats,
    )


@pytest.mark.slow
def test_an_axis_inside_of_the_model_is_the_models_own():
    class Members(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            axes = {"params": 0, "batch_stats": 0, BATCH_MOMENTS: 0, FIRST_BATCH_MOMENTS: 0}
            layer = nn.vmap(
                MemorizedBatchNorm,
                variable_axes=axes,
                split_rngs={"params": True},
                axis_name="members",
            )
            layer = layer(memory_size=4, use_running_average=not train, axis_name="members")
            return layer(x.reshape(2, -1, 5)).reshape(-1, 5)

    assert run(Members(), optax.sgd(0.1), batches(2)).step == 2


# Lifted transforms.


class Recurrent(nn.Module):
    """One memory for all steps of a sequence, carried by nn.scan."""

    norm: object = memorized

    @nn.compact
    def __call__(self, x, train):
        def cell(module, carry, x):
            return carry + module(x), None

        layer = self.norm(use_running_average=not train)
        if self.is_initializing():
            layer(jnp.zeros((1, 6)))
        scan = nn.scan(
            cell,
            variable_broadcast="params",
            variable_carry="batch_stats",
            variable_axes={BATCH_MOMENTS: 0, FIRST_BATCH_MOMENTS: 0},
            split_rngs={"params": False},
        )
        x = nn.Dense(6)(x).reshape(-1, 2, 6).swapaxes(0, 1)
        return scan(layer, jnp.zeros((x.shape[1], 6)), x)[0]


@pytest.mark.parametrize("norm", [memorized, endless], ids=["memorized", "endless"])
@pytest.mark.slow
def test_a_memory_that_a_scan_carries_is_rewritten_but_not_moved(norm):
    model = Recurrent(norm)
    assert run(model, optax.sgd(0.1), batches(2), "rewrite").step == 2
    with pytest.raises(ValueError, match=r"that nn\.scan carries from iteration to iteration"):
        run(model, optax.sgd(0.1), batches(2))
    with pytest.raises(ValueError, match=r"examples of the batch|nn\.scan carries"):
        run(model, optax.sgd(0.1), batches(2), double_forward_fraction=0.5)


class Branching(nn.Module):
    """A norm in both branches, or in one."""

    conditional: str
    both: bool

    @nn.compact
    def __call__(self, x, train):
        layer = memorized(use_running_average=not train)
        if self.is_initializing():
            layer(x)

        def normalized(module, x):
            return module(x)

        def other(module, x):
            return 2 * module(x) if self.both else 2 * x

        if self.conditional == "cond":
            return nn.cond(x.sum() < jnp.inf, normalized, other, layer, x)
        return nn.switch(jnp.int32(x.sum() < jnp.inf), [other, normalized], layer, x)


class NotBranching(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return memorized(use_running_average=not train)(x)


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("conditional", ["cond", "switch"])
@every_mode
@pytest.mark.slow
def test_a_memory_inside_of_a_branch_is_one_outside_or_refused(conditional, both, mode):
    model, tx, data = Branching(conditional, both), optax.sgd(0.1), batches(2)
    if mode == "transport" and not both:
        with pytest.raises(ValueError, match=r"every branch of nn\.cond and nn\.switch"):
            run(model, tx, data, mode)
        return
    expected = run(NotBranching(), tx, data, mode)
    # Another program.
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        run(model, tx, data, mode).batch_stats,
        expected.batch_stats,
    )
