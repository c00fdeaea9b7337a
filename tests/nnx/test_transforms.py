"""The training step for models that use, or are used in, the transforms of NNX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from stepping import batches

import mbn_jax.nnx
from mbn_jax.nnx import recalibrate

pytestmark = pytest.mark.slow

equal = functools.partial(jax.tree.map, np.testing.assert_array_equal)
close = functools.partial(
    jax.tree.map, functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
)
memorized = functools.partial(mbn_jax.nnx.MemorizedBatchNorm, memory_size=4, decay=0.9)
STEPS = {
    "off": {"double_forward": "off"},
    "rewrite": {"double_forward": "rewrite"},
    "transport": {"double_forward": "transport"},
    "part": {"double_forward": "transport", "double_forward_fraction": 0.5},
}
every_step = pytest.mark.parametrize("options", STEPS.values(), ids=STEPS)


class Block(nnx.Module):
    def __init__(self, rngs, **options):
        self.dense = nnx.Linear(5, 5, rngs=rngs)
        self.norm = memorized(5, rngs=rngs, **options)

    def __call__(self, x):
        return nnx.tanh(self.norm(self.dense(x)))


@nnx.split_rngs(splits=3)
@nnx.vmap
def make_blocks(rngs):
    return Block(rngs)


def loss_fn(model, x):
    return ((model(x) - 1) ** 2).mean(), {}


def train(model, data, loss=loss_fn, **options):
    optimizer = nnx.Optimizer(model, optax.sgd(0.3), wrt=nnx.Param)
    step = nnx.jit(mbn_jax.nnx.make_train_step(loss, **options))
    for x in data:
        step(model, optimizer, x)
    return model


class Stack(nnx.Module):
    """Three blocks one after the other, under a transform."""

    def __init__(self, run):
        self.blocks = make_blocks(nnx.Rngs(0))
        self.run = run

    def __call__(self, x):
        return self.run(self.blocks, x)


class Three(nnx.Module):
    """The same blocks as members of a list."""

    def __init__(self):
        graphdef, state = nnx.split(make_blocks(nnx.Rngs(0)))
        self.blocks = nnx.List(
            [nnx.merge(graphdef, jax.tree.map(lambda leaf, i=i: leaf[i], state)) for i in range(3)]
        )

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class ThreeRemat(Three):
    def __call__(self, x):
        for block in self.blocks:
            x = nnx.remat(lambda block, x: block(x))(block, x)
        return x


class Ensemble(Three):
    def __call__(self, x):
        return jnp.stack([block(x) for block in self.blocks])


def stacked(model):
    states = [nnx.to_pure_dict(nnx.state(block)) for block in model.blocks]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def scanned(blocks, x, **mode):
    return nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry, **mode)(
        x, blocks
    )


def scanned_remat(blocks, x):
    return nnx.scan(
        nnx.remat(lambda x, block: block(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
    )(x, blocks)


def mapped(blocks, x, axes=0, **mode):
    return nnx.vmap(lambda block, x: block(x), in_axes=(axes, None), **mode)(blocks, x)


def mapped_by_type(blocks, x):
    return mapped(blocks, x, nnx.StateAxes({nnx.Param: 0, nnx.BatchStat: 0, ...: None}))


TRANSFORMS = {
    "scan": (scanned, Three),
    "scan_tree": (functools.partial(scanned, graph=False), Three),
    "scan_no_updates": (functools.partial(scanned, graph_updates=False), Three),
    "scan_remat": (scanned_remat, Three),
    "vmap": (mapped, Ensemble),
    "vmap_tree": (functools.partial(mapped, graph=False), Ensemble),
    "vmap_no_updates": (functools.partial(mapped, graph_updates=False), Ensemble),
    "vmap_by_type": (mapped_by_type, Ensemble),
}
PLAIN = ("scan", "vmap")


@functools.cache
def trained_without(plain, mode):
    return stacked(train(plain(), batches(3), **STEPS[mode]))


# Each mode under the plain transforms; the most that a step asks of layers under all of them.
CASES = [(name, mode) for name in TRANSFORMS for mode in STEPS if mode == "part" or name in PLAIN]


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_blocks_under_a_transform_train_as_blocks_in_a_list(name, mode):
    run, plain = TRANSFORMS[name]
    model = train(Stack(run), batches(3), **STEPS[mode])
    close(nnx.to_pure_dict(nnx.state(model.blocks)), trained_without(plain, mode))


@every_step
def test_remat_and_jit_within_the_model_change_nothing(options):
    def jitted(model, x):
        y = nnx.jit(lambda model, x: model(x))(model, x)
        return ((y - 1) ** 2).mean(), {}

    expected = stacked(train(Three(), batches(2), **options))
    close(stacked(train(ThreeRemat(), batches(2), jitted, **options)), expected)


class Carried(nnx.Module):
    """One block, three times, carried through a loop."""

    def __init__(self, loop):
        self.block = Block(nnx.Rngs(0))
        self.loop = loop

    def __call__(self, x):
        return self.loop(self.block, x)


def scan_loop(block, x):
    def body(carry, _):
        block, x = carry
        return (block, block(x)), None

    (_, x), _ = nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))(
        (block, x), jnp.arange(3)
    )
    return x


def fori_loop(block, x):
    return nnx.fori_loop(0, 3, lambda _, carry: (carry[0], carry[0](carry[1])), (block, x))[1]


def cond(block, x):
    return nnx.cond(x.sum() > 0, lambda block, x: block(x), lambda block, x: x, block, x)


def cond_of_both(block, x):
    return nnx.cond(x.sum() > 0, lambda block, x: block(x), lambda block, x: block(2 * x), block, x)


@pytest.mark.parametrize("loop", [scan_loop, fori_loop, cond])
def test_a_memory_that_a_loop_carries_is_rewritten_and_else_refused(loop):
    data = batches(2)
    if loop is not fori_loop:  # Of which JAX has no gradient.
        model = train(Carried(loop), data)
        assert model.block.norm.count.get_value().any()
    for mode in ("transport", "part"):
        with pytest.raises(ValueError, match="carries from iteration to iteration"):
            train(Carried(loop), data, **STEPS[mode])


@every_step
def test_branches_may_call_the_same_layers(options):
    model = train(Carried(cond_of_both), batches(2), **options)
    assert model.block.norm.count[:, 0].tolist()[:2] != [0, 0]


# Several devices.


def whole(data, **options):
    if "double_forward_fraction" in options:  # Its first half is the first half of each device.
        data = jnp.concatenate(jnp.split(data, 2, axis=2), axis=1)
    model = train(Block(nnx.Rngs(0)), data.reshape(len(data), -1, 5), **options)
    return nnx.to_pure_dict(nnx.state(model))


def on_devices(step, data, **options):
    model = Block(nnx.Rngs(0), **options)
    optimizer = nnx.Optimizer(model, optax.sgd(0.3), wrt=nnx.Param)
    for x in data:
        metrics = step(model, optimizer, x)
    return model, optimizer, metrics


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("pmap", "off"),
        ("pmap", "rewrite"),
        ("pmap", "part"),
        ("pmap", "transport"),
        ("pmap_stacked", "transport"),
        ("shard_map", "transport"),
        ("jit", "transport"),
        ("jit_explicit", "transport"),
    ],
)
def test_devices_train_as_one_with_the_whole_batch(kind, mode):
    data = batches(3, size=16).reshape(3, 4, 4, 5)
    axis = None if kind.startswith("jit") else "data"
    step = mbn_jax.nnx.make_train_step(loss_fn, axis_name=axis, **STEPS[mode])
    axis_type = AxisType.Explicit if kind == "jit_explicit" else AxisType.Auto
    mesh = jax.make_mesh((4,), ("data",), (axis_type,), devices=jax.devices()[:4])
    if kind == "pmap":
        step = nnx.pmap(
            step,
            in_axes=(None, None, 0),
            out_axes=None,
            axis_name="data",
            devices=jax.devices()[:4],
        )
    elif kind == "pmap_stacked":
        step = nnx.pmap(step, axis_name="data", devices=jax.devices()[:4])
    elif kind == "shard_map":
        replicated, split = PartitionSpec(), PartitionSpec("data")
        step = nnx.jit(
            nnx.shard_map(
                step,
                mesh=mesh,
                in_specs=(replicated, replicated, split),
                out_specs=replicated,
                check_vma=False,
            )
        )
        data = data.reshape(3, 16, 5)
    else:
        step = nnx.jit(step)
        data = jax.device_put(
            data.reshape(3, 16, 5), NamedSharding(mesh, PartitionSpec(None, "data"))
        )
    if kind == "pmap_stacked":
        model = Block(nnx.Rngs(0), axis_name=axis)
        optimizer = nnx.Optimizer(model, optax.sgd(0.3), wrt=nnx.Param)
        for node in (model, optimizer):
            nnx.update(node, jax.tree.map(lambda x: jnp.stack([x] * 4), nnx.state(node)))
        for x in data:
            step(model, optimizer, x)
        nnx.update(model, jax.tree.map(lambda x: x[0], nnx.state(model)))
    else:
        model, _, metrics = on_devices(step, data, axis_name=axis)
        assert metrics["loss"].shape == ()
    close(nnx.to_pure_dict(nnx.state(model)), whole(data, **STEPS[mode]))


@pytest.mark.parametrize(
    ("layer_axis", "options", "message"),
    [
        (None, {"axis_name": "data"}, "keep statistics of their own on each device: norm"),
        ("data", {}, "sync over 'data', and make_train_step has axis_name=None"),
        ("other", {"axis_name": "data"}, "not bound"),
    ],
)
def test_step_and_layers_must_agree_about_devices(layer_axis, options, message):
    step = mbn_jax.nnx.make_train_step(loss_fn, **options)
    step = nnx.pmap(step, in_axes=(None, None, 0), out_axes=None, axis_name="data")
    data = batches(1, size=16).reshape(1, 8, 2, 5)
    with pytest.raises(ValueError, match=message):
        on_devices(step, data, axis_name=layer_axis)


def test_an_axis_that_is_not_bound_is_refused():
    step = nnx.jit(mbn_jax.nnx.make_train_step(loss_fn, axis_name="data"))
    with pytest.raises(ValueError, match="axis_name='data' of make_train_step is not bound"):
        on_devices(step, batches(1), axis_name="data")


@pytest.mark.parametrize(("run", "plain"), TRANSFORMS.values(), ids=TRANSFORMS)
def test_recalibration_reaches_into_transforms(run, plain):
    model, expected = Stack(run), plain()
    data = batches(2)
    recalibrate(model, data)
    recalibrate(expected, data)
    close(nnx.to_pure_dict(nnx.state(model.blocks)), stacked(expected))
    assert model.blocks.norm.count[:, 0, 0].tolist() == [32] * 3
