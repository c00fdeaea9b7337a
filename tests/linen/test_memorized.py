"""Normalization layers: what every one must do, then what `MemorizedBatchNorm` must do."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import linen as nn
from nnx_as_linen import as_linen

import mbn_jax.nnx
from mbn_jax import MemorizedBatchNorm
from mbn_jax.core.double_forward import BATCH_MOMENTS, RECORDS
from mbn_jax.core.gradient import clipped_renorm, with_gradient
from mbn_jax.core.memory import memory_weights, pool
from mbn_jax.core.moments import Moments
from mbn_jax.core.moving_average import BACKWARD_SUMS, zero_sums
from mbn_jax.linen.batch_renorm import BatchRenorm
from mbn_jax.linen.moving_average import MovingAverageBatchNorm
from mbn_jax.training.norms import Affine

EPSILON = 1e-5
RULES = ["through", "renorm", "auto"]
# Outputs are of size 1 to 10: some ten roundoffs (6e-8) of float32.
ROUNDING = 5e-6
close = functools.partial(np.testing.assert_allclose, rtol=ROUNDING, atol=ROUNDING)
equal = np.testing.assert_array_equal


def normal(*shape, seed=0, mean=0.0, std=1.0, dtype=np.float32):
    x = np.random.default_rng(seed).normal(size=(2, *shape))
    x = x[0] + 1j * x[1] if np.issubdtype(dtype, np.complexfloating) else x[0]
    return jnp.asarray((np.asarray(mean) + std * x).astype(dtype))


def assert_trees(check, actual, expected):
    jax.tree.map(check, actual, expected, is_leaf=lambda leaf: leaf is None)


def train(layer, variables, x, **kwargs):
    """Returns the training output and the variables with the statistics after it."""
    y, updates = layer.apply(variables, x, mutable=["batch_stats"], **kwargs)
    return y, {**variables, **updates}


# The contract of every norm layer: a new norm is a new row.


class Norm(NamedTuple):
    make: Callable[..., nn.Module]
    # Normalizes by statistics of the batch: takes mask, axis, axis_name and the flag in the call.
    statistics: bool = True


memorized = functools.partial(MemorizedBatchNorm, memory_size=4)
endless = functools.partial(MemorizedBatchNorm, memory_size=None)
NORMS = {
    "memorized": Norm(memorized),
    "memorized_renorm": Norm(functools.partial(memorized, gradient="renorm")),
    "memorized_through": Norm(functools.partial(memorized, gradient="through")),
    "memorized_two_pass": Norm(functools.partial(memorized, use_fast_variance=False)),
    "memorized_one_slot": Norm(functools.partial(MemorizedBatchNorm, memory_size=1)),
    "memorized_room": Norm(functools.partial(memorized, memory_capacity=7, decay=1.0)),
    "batch": Norm(nn.BatchNorm),
    "batch_renorm": Norm(functools.partial(BatchRenorm, r_max=2.0, d_max=1.0)),
    "batch_renorm_schedule": Norm(
        functools.partial(
            BatchRenorm,
            r_max=optax.linear_schedule(1.0, 3.0, 4),
            d_max=optax.linear_schedule(0.0, 5.0, 2, 1),
            momentum=0.5,
        )
    ),
    "memorized_schedule": Norm(
        functools.partial(
            memorized,
            memory_size=optax.linear_schedule(1, 4, 3),
            decay=optax.linear_schedule(1.0, 0.5, 2),
            memory_capacity=4,
        )
    ),
    "endless": Norm(endless),
    "endless_through": Norm(functools.partial(endless, gradient="through", decay=1.0)),
    "moving_average": Norm(
        functools.partial(
            MovingAverageBatchNorm,
            center=True,  # Else the mean stays 0.
            forward_batches=3,
            backward_batches=2,
            warmup_steps=0,
            correction_steps=2,
        )
    ),
    "nnx_memorized": Norm(
        as_linen(functools.partial(mbn_jax.nnx.MemorizedBatchNorm, memory_size=4))
    ),
    "nnx_endless": Norm(
        as_linen(functools.partial(mbn_jax.nnx.MemorizedBatchNorm, memory_size=None))
    ),
    "nnx_batch_renorm": Norm(
        as_linen(functools.partial(mbn_jax.nnx.BatchRenorm, r_max=2.0, d_max=1.0))
    ),
    "affine": Norm(Affine, statistics=False),
}
every_norm = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
every_statistical_norm = pytest.mark.parametrize(
    "norm",
    [n for n in NORMS.values() if n.statistics],
    ids=[k for k in NORMS if NORMS[k].statistics],
)


def started(norm, x):
    """Returns the layer and its variables after a few steps on data of another distribution."""
    return started_on(norm, x.shape)


@functools.cache
def started_on(norm, shape):
    layer = norm.make(use_running_average=False)
    variables = layer.init(jax.random.key(0), normal(*shape))
    for seed in (90, 91):
        _, variables = train(layer, variables, 1.5 * normal(*shape, seed=seed) + 0.5)
    return layer, variables


@every_norm
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.slow
def test_output_has_the_shape_of_the_input_and_the_dtype_asked_for(norm, dtype, inference):
    x = normal(4, 5, 3)
    _, variables = started(norm, x)
    expected, _ = train(norm.make(use_running_average=inference), variables, x)
    layer = norm.make(use_running_average=inference, dtype=dtype)
    y, after = train(layer, variables, x.astype(dtype))
    assert y.shape == x.shape
    assert y.dtype == dtype
    # Half precision is for the result, not for the statistics.
    kept = [leaf.dtype for leaf in jax.tree.leaves(after)]
    assert {d for d in kept if jnp.issubdtype(d, jnp.inexact)} == {jnp.dtype("float32")}
    # The input and the output are each rounded to within 1 ulp of numbers below 4.
    np.testing.assert_allclose(
        np.float32(y), expected, atol=8 * float(jnp.finfo(dtype).eps), rtol=ROUNDING
    )


@every_norm
def test_init_writes_no_statistics_and_its_batch_size_binds_nothing(norm):
    x = normal(6, 5, 3, mean=7)
    key = jax.random.key(0)
    expected = norm.make(use_running_average=True).init(key, x)
    for example in (x, x[:1, :2]):
        assert_trees(equal, norm.make(use_running_average=False).init(key, example), expected)
    variables = norm.make(use_running_average=False).init(key, x[:1, :2])
    y, _ = train(norm.make(use_running_average=False), variables, x)
    assert y.shape == x.shape


@every_statistical_norm
def test_init_needs_no_named_axis(norm):
    layer = norm.make(use_running_average=False, axis_name="batch")
    variables = layer.init(jax.random.key(0), normal(4, 3))
    with pytest.raises(NameError, match="batch"):
        train(layer, variables, normal(4, 3))


@every_norm
def test_inference_leaves_the_statistics_alone(norm):
    x = normal(4, 5, 3)
    _, variables = started(norm, x)
    layer = norm.make(use_running_average=True)
    y, after = train(layer, variables, x)
    assert_trees(equal, after, variables)
    # And needs no mutable collection.
    equal(layer.apply(variables, x), y)


@every_norm
def test_training_changes_all_of_the_statistics_and_nothing_else(norm):
    x = normal(4, 5, 3)
    layer, variables = started(norm, x)
    _, updates = layer.apply(variables, x, mutable=True)
    assert_trees(equal, updates.get("params", variables["params"]), variables["params"])
    assert set(updates) - {"params", BATCH_MOMENTS} == (
        {"batch_stats"} if norm.statistics else set()
    )
    before, after = variables.get("batch_stats", {}), updates.get("batch_stats", {})
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, before)
    for name in ("mean", "var") if norm.statistics else ():
        assert not np.any(np.asarray(after[name] == before[name]).all(0))


@every_statistical_norm
def test_use_running_average_is_given_once_here_or_there(norm):
    x = normal(4, 3)
    _, variables = started(norm, x)
    for flag in (False, True):
        expected, _ = train(norm.make(use_running_average=flag), variables, x)
        y, _ = train(norm.make(), variables, x, use_running_average=flag)
        equal(y, expected)
    for layer, kwargs in (
        (norm.make(), {}),
        (norm.make(use_running_average=True), {"use_running_average": True}),
    ):
        with pytest.raises(ValueError, match="use_running_average"):
            train(layer, variables, x, **kwargs)


@every_norm
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.slow
def test_jit_equals_eager(norm, inference):
    x = normal(4, 5, 3)
    _, variables = started(norm, x)
    step = functools.partial(train, norm.make(use_running_average=inference))
    assert_trees(close, jax.jit(step)(variables, x), step(variables, x))


@every_statistical_norm
@pytest.mark.parametrize("poison", [np.nan, np.inf, -1e30])
@pytest.mark.slow
def test_masked_elements_change_nothing(norm, poison):
    x = normal(6, 5, 3)
    # Rows, positions and features.
    mask = jnp.ones(x.shape, bool).at[2].set(False).at[:, 3].set(False).at[1, 1, 1].set(False)
    layer, variables = started(norm, x)
    y, after = train(layer, variables, x, mask=mask)
    poisoned = jnp.where(mask, x, poison)
    y_poisoned, after_poisoned = train(layer, variables, poisoned, mask=mask)
    equal(np.where(mask, y_poisoned, 0), np.where(mask, y, 0))
    assert_trees(equal, after_poisoned, after)


@every_statistical_norm
def test_masked_rows_are_as_if_absent(norm):
    x = normal(6, 5, 3)
    keep = np.array([0, 1, 3, 5])
    mask = jnp.isin(jnp.arange(6), keep)[:, None, None]
    layer, variables = started(norm, x)
    y, after = train(layer, variables, x, mask=mask)
    expected, expected_after = train(layer, variables, x[keep])
    close(y[keep], expected)
    assert_trees(close, after, expected_after)


@every_statistical_norm
@pytest.mark.slow
def test_axis_is_one_or_several(norm):
    x = normal(6, 2, 3)
    last = norm.make(use_running_average=False)
    for axis, features in ((-2, (1,)), ((0, -1), (0, 2))):
        layer = norm.make(use_running_average=False, axis=axis)
        y, after = train(layer, layer.init(jax.random.key(0), x), x)
        shape = tuple(x.shape[i] for i in features)

        def features_last(values, features=features, shape=shape):
            ends = range(-len(features), 0)
            return np.moveaxis(values, features, ends).reshape(-1, np.prod(shape))

        flat = features_last(x)
        expected, expected_after = train(last, last.init(jax.random.key(0), flat), flat)
        close(features_last(y), expected)
        assert after["params"]["scale"].shape == shape
        assert_trees(lambda a, e: close(a.reshape(e.shape), e), after, expected_after)


# Lifted transforms. The collections are lifted over axis 0 of every variable.


class Block(nn.Module):
    make: Callable[..., nn.Module]
    options: Any = None

    @nn.compact
    def __call__(self, x):
        return self.make(use_running_average=False, **(self.options or {}))(x)


class Layers(nn.Module):
    """Three layers one after the other, each with its own statistics."""

    make: Callable[..., nn.Module]
    options: Any = None

    @nn.compact
    def __call__(self, x):
        lifted = nn.scan(
            lambda block, x, _: (jnp.tanh(block(x)), None),
            variable_axes={"params": 0, "batch_stats": 0, BATCH_MOMENTS: 0},
            split_rngs={"params": True},
            length=3,
        )
        return lifted(Block(self.make, self.options, name="block"), x, None)[0]


VmapBlock = nn.vmap(
    Block,
    variable_axes={"params": 0, "batch_stats": 0, BATCH_MOMENTS: 0},
    split_rngs={"params": True},
)


def at(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


@every_norm
@pytest.mark.slow
def test_lifted_vmap_is_each_member_by_itself(norm):
    x = normal(3, 6, 2)

    @functools.partial(jax.jit, static_argnums=0)
    def two_steps(block, x):
        _, after = train(block, block.init(jax.random.key(0), x), x)
        return train(block, after, 2 * x + 1)

    result = two_steps(VmapBlock(norm.make), x)
    for i in range(3):
        assert_trees(close, at(result, i), two_steps(Block(norm.make), x[i]))


@every_norm
@pytest.mark.slow
def test_lifted_scan_is_one_layer_after_the_other(norm):
    x = normal(6, 2)
    layer = Layers(norm.make)
    variables = layer.init(jax.random.key(0), x)
    y, after = train(layer, variables, 3 * x + 1)
    expected = 3 * x + 1
    for i in range(3):
        own, own_after = (
            {name: at(tree["block"], i) for name, tree in variables_.items()}
            for variables_ in (variables, after)
        )
        expected, expected_after = train(Block(norm.make), own, expected)
        expected = jnp.tanh(expected)
        assert_trees(close, own_after, expected_after)
    close(y, expected)


@every_norm
@pytest.mark.slow
def test_remat_changes_nothing(norm):
    x = normal(6, 2)

    def results(block):
        variables = block.init(jax.random.key(0), x)
        _, variables = train(block, variables, 2 * x + 1)
        # As the training step hands them to layers that average backward statistics.
        variables[BACKWARD_SUMS] = zero_sums(variables.get("batch_stats", {}))

        def loss(params, x):
            y, after = train(block, {**variables, "params": params}, x)
            return jnp.sum(y * normal(6, 2, seed=1)), after

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(variables["params"], x)

    remat, plain = nn.remat(Block)(norm.make), Block(norm.make)
    assert_trees(close, *(jax.jit(functools.partial(results, block))() for block in (remat, plain)))


# MemorizedBatchNorm against batch normalization and against the definitions.


def loss_of(layer, variables, x, weights, **kwargs):
    """A loss of the training output that no symmetry makes constant, and its gradients."""

    def loss(params, x):
        y, after = train(layer, {**variables, "params": params}, x, **kwargs)
        return jnp.mean(weights * y + jnp.sin(y)), (y, after)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(variables["params"], x)


PARAMS = {"scale": jnp.array([0.5, 2.0, -1.0]), "bias": jnp.array([1.0, -2.0, 0.0])}


def memory_of(*slots, capacity=None):
    """Returns `batch_stats` of (mean, variance) slots, newest first, with empty ones behind."""
    capacity = capacity or len(slots)
    empty = capacity - len(slots)
    mean, var = (np.stack([slot[i] for slot in slots]) for i in (0, 1))
    pad = [(0, empty)] + [(0, 0)] * (mean.ndim - 1)
    return {
        "mean": jnp.asarray(np.pad(mean, pad), jnp.float32),
        "var": jnp.asarray(np.pad(var, pad, constant_values=1), jnp.float32),
        "count": jnp.asarray(np.pad(np.full(mean.shape, 8), pad), jnp.float32),
        "rule": jnp.array([capacity, 0.97], jnp.float32),
    }


OLD = ([0.5, -1.0, 0.0], [2.0, 0.5, 1.0]), ([-0.5, 1.0, 1.0], [1.0, 3.0, 0.2])


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("gradient", RULES)
def test_one_slot_is_batch_normalization(gradient, fast):
    x = normal(8, 4, 3, mean=0.5)
    weights = normal(8, 4, 3, seed=1)
    options = {"use_running_average": False, "use_fast_variance": fast}
    expected_layer = nn.BatchNorm(**options)
    expected_variables = expected_layer.init(jax.random.key(0), x)
    layer = MemorizedBatchNorm(memory_size=1, gradient=gradient, **options)
    # What is in the memory must not matter.
    variables = {"params": PARAMS, "batch_stats": memory_of(OLD[0])}
    expected = loss_of(expected_layer, {**expected_variables, "params": PARAMS}, x, weights)
    actual = loss_of(layer, variables, x, weights)
    np.testing.assert_allclose(actual[0][1][0], expected[0][1][0], atol=1e-5, rtol=0)
    # flax's one-pass variance is the less exact side.
    assert_trees(
        functools.partial(np.testing.assert_allclose, atol=1e-6, rtol=1e-4), actual[1], expected[1]
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(
    ("memory_size", "decay", "gradient"),
    [(1, 0.9, "auto"), (3, 1.0, "through"), (3, 0.6, "renorm"), (8, 0.9, "auto")],
)
@pytest.mark.slow
def test_steps_are_those_of_the_reference(memory_size, decay, gradient, fast, masked):
    expected = reference.ReferenceMBN(memory_size, decay)
    layer = MemorizedBatchNorm(
        memory_size=memory_size, decay=decay, gradient=gradient, use_fast_variance=fast
    )
    variables = layer.init(jax.random.key(0), normal(1, 3), use_running_average=True)
    variables = {**variables, "params": PARAMS}
    step = jax.jit(functools.partial(train, layer, use_running_average=False))
    other = normal(2, 3, seed=99)
    for i in range(6):
        x = normal(8, 4, 3, seed=i, mean=normal(3, seed=50 + i), std=1 + 0.3 * i)
        mask = normal(8, 4, 3, seed=70 + i) > 0 if masked else None
        y, variables = step(variables, x, mask=mask)
        close(y, expected.train(x, mask, **PARAMS))
        y = layer.apply(variables, other, use_running_average=True)
        close(y, expected.infer(other, **PARAMS))


@pytest.mark.parametrize("fast", [False, True])
def test_data_far_from_zero_are_normalized_as_exactly_as_they_are_given(fast):
    ratio = 1000
    expected = reference.ReferenceMBN(2)
    layer = MemorizedBatchNorm(
        memory_size=2, decay=1.0, use_running_average=False, use_fast_variance=fast
    )
    x = normal(256, 3, mean=ratio)
    variables = layer.init(jax.random.key(0), x)
    for seed in range(5):
        x = normal(256, 3, seed=seed, mean=ratio)
        y, variables = train(layer, variables, x)
        y_expected = expected.train(x)
        # In one pass the first batch, of which the memory knows nothing, is taken around 0: its
        # variance is off by some ratio^2 roundoffs, 6 %, until it leaves.
        if not fast or seed >= 2:
            # The mean is good to some 10 * ratio roundoffs.
            np.testing.assert_allclose(y, y_expected, rtol=1e-4, atol=10 * ratio * 6e-8)


@pytest.mark.parametrize("axis", [1, (1, 2)])
@pytest.mark.slow
def test_complex_steps_are_those_of_the_reference(axis):
    expected = reference.ReferenceMBN(3, 0.8, axis)
    layer = MemorizedBatchNorm(memory_size=3, decay=0.8, axis=axis)
    x = normal(8, 3, 2, dtype=np.complex64)
    variables = layer.init(jax.random.key(0), x, use_running_average=True)
    for i in range(4):
        x = normal(8, 3, 2, seed=i, mean=i * 1j - 1, dtype=np.complex64)
        y, variables = train(layer, variables, x, use_running_average=False)
        assert y.dtype == jnp.complex64
        close(y, expected.train(x))
        close(layer.apply(variables, x[:2], use_running_average=True), expected.infer(x[:2]))
    assert variables["batch_stats"]["mean"].dtype == jnp.complex64
    assert variables["batch_stats"]["var"].dtype == jnp.float32


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.slow
def test_double_precision_steps_are_those_of_the_reference(dtype):
    expected = reference.ReferenceMBN(3, 0.8)
    with jax.enable_x64(True):
        layer = MemorizedBatchNorm(memory_size=3, decay=0.8, param_dtype=jnp.float64)
        x = normal(8, 3, dtype=dtype)
        variables = layer.init(jax.random.key(0), x, use_running_average=True)
        for i in range(4):
            x = normal(8, 3, seed=i, mean=i, dtype=dtype)
            y, variables = train(layer, variables, x, use_running_average=False)
            assert y.dtype == dtype
            # Some hundred roundoffs of 1e-16.
            np.testing.assert_allclose(y, expected.train(x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("gradient", RULES)
@pytest.mark.parametrize("masked", [False, True])
def test_inference_on_the_newest_batch_is_its_training_output(gradient, masked):
    x = normal(8, 3, mean=3)
    layer = MemorizedBatchNorm(memory_size=3, gradient=gradient)
    variables = {"params": PARAMS, "batch_stats": memory_of(*OLD, capacity=3)}
    mask = jnp.arange(8)[:, None] < 5 if masked else None
    y, after = train(layer, variables, x, use_running_average=False, mask=mask)
    y_inference = layer.apply(after, x, use_running_average=True)
    np.testing.assert_allclose(y_inference, y, rtol=0, atol=1e-6 * np.abs(y).max())


def test_a_schedule_is_the_rule_of_its_step_in_training_and_at_inference():
    sizes, decays = (1, 1, 2, 3, 4, 4), (1.0, 0.75, 0.5, 0.5, 0.5, 0.5)
    growing = MemorizedBatchNorm(
        memory_capacity=4,
        memory_size=optax.linear_schedule(0, 4, 4),  # 0 and 0.1 are 1, 1.1 is 2.
        decay=optax.linear_schedule(1.0, 0.5, 2),
    )
    data = [normal(6, 3, seed=seed, mean=seed) for seed in range(6)]
    variables = growing.init(jax.random.key(0), data[0], use_running_average=True)
    for x, size, decay in zip(data, sizes, decays, strict=True):
        fixed = MemorizedBatchNorm(memory_capacity=4, memory_size=size, decay=decay)
        stats = {k: v for k, v in variables["batch_stats"].items() if k != "steps"}
        expected, fixed_after = train(
            fixed, {**variables, "batch_stats": stats}, x, use_running_average=False
        )
        y, variables = train(growing, variables, x, use_running_average=False)
        close(y, expected)
        close(
            growing.apply(variables, x, use_running_average=True),
            fixed.apply(fixed_after, x, use_running_average=True),
        )
    assert int(variables["batch_stats"]["steps"]) == 6


@pytest.mark.parametrize("decay", [0.7, 1.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.slow
def test_a_memory_without_end_is_a_long_one(decay, masked):
    without_end = endless(decay=decay)
    memory = MemorizedBatchNorm(decay=decay, memory_size=8)
    data = [normal(5, 4, 3, seed=seed, mean=seed, std=1 + seed) for seed in range(6)]
    states = [layer.init(jax.random.key(0), data[0], True) for layer in (without_end, memory)]
    for seed, x in enumerate(data):
        mask = jnp.asarray(np.random.default_rng(seed).random(x.shape) < 0.6) if masked else None
        if masked and seed == 3:
            mask = mask.at[..., 1].set(False)  # A feature that is masked out pushes nothing.

        def loss(x, layer, state, mask=mask):
            y, state = train(layer, state, x, use_running_average=False, mask=mask)
            y = y if mask is None else jnp.where(mask, y, 0)
            return (y**3).sum(), (y, state)

        results = []
        for i, layer in enumerate((without_end, memory)):
            grad, (y, states[i]) = jax.grad(loss, has_aux=True)(x, layer, states[i])
            results.append((y, layer.apply(states[i], x, True), grad))
        # The same sums in another order; gradients of cubes.
        for one, other in zip(*results, strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)


def test_empty_memory_is_mean_0_and_variance_1():
    x = normal(4, 3, mean=5)
    layer = MemorizedBatchNorm(use_running_average=True)
    y = layer.apply(layer.init(jax.random.key(0), x), x)
    close(y, x / np.sqrt(1 + EPSILON))


class Twice(nn.Module):
    """One layer called on two batches."""

    norm: nn.Module

    def __call__(self, x1, x2):
        return self.norm(x1), self.norm(x2)


@pytest.mark.parametrize("fast", [False, True])
def test_a_layer_called_twice_pushes_and_records_once_a_call(fast):
    x1, x2 = normal(8, 3, mean=1), normal(4, 3, seed=1)
    layer = MemorizedBatchNorm(memory_size=3, use_running_average=False, use_fast_variance=fast)
    model = Twice(layer)
    variables = model.init(jax.random.key(0), x1, x2)
    assert set(variables) == {"params", "batch_stats"}
    assert not variables["batch_stats"]["norm"]["count"].any()
    (y1, y2), updates = model.apply(variables, x1, x2, mutable=["batch_stats", BATCH_MOMENTS])
    expected = reference.ReferenceMBN(3, 0.97)
    close(y1, expected.train(x1))
    close(y2, expected.train(x2))
    equal(updates["batch_stats"]["norm"]["count"], np.array([[4] * 3, [8] * 3, [0] * 3]))
    records = updates[BATCH_MOMENTS]["norm"][RECORDS]
    assert len(records) == 2
    for record, x in zip(records, (x1, x2), strict=True):
        # Of the batch alone, in the order of the calls.
        assert_trees(close, tuple(record.batch), reference.moments(x))
        assert record.part is None
    # Neither in inference nor unless asked for.
    assert BATCH_MOMENTS not in model.apply(variables, x1, x2, mutable=["batch_stats"])[1]
    inference = Twice(layer.clone(use_running_average=True))
    assert BATCH_MOMENTS not in inference.apply(variables, x1, x2, mutable=True)[1]


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("slots", [0, 2])
def test_a_batch_masked_out_whole_pushes_nothing_and_is_normalized_by_the_memory(slots, fast):
    x = normal(8, 3, mean=3)
    layer = MemorizedBatchNorm(memory_size=3, use_fast_variance=fast)
    variables = layer.init(jax.random.key(0), x, use_running_average=True)
    if slots:
        variables = {"params": PARAMS, "batch_stats": memory_of(*OLD[:slots], capacity=3)}
    mask = jnp.zeros((8, 1), bool)
    (_, (y, after)), gradients = loss_of(
        layer, variables, x, normal(8, 3, seed=1), use_running_average=False, mask=mask
    )
    assert_trees(equal, after["batch_stats"], variables["batch_stats"])
    close(y, layer.apply(variables, x, use_running_average=True))
    for gradient in jax.tree.leaves(gradients):
        assert np.isfinite(gradient).all()


def test_a_feature_masked_out_keeps_its_own_memory():
    x = normal(8, 3, mean=3)
    layer = MemorizedBatchNorm(memory_size=3, use_running_average=False)
    variables = {"params": PARAMS, "batch_stats": memory_of(*OLD, capacity=3)}
    _, after = train(layer, variables, x, mask=jnp.array([True, False, True]))
    _, whole = train(layer, variables, x)
    for name in ("mean", "var", "count"):
        value = after["batch_stats"][name]
        equal(value[:, 1], variables["batch_stats"][name][:, 1])
        equal(value[:, [0, 2]], whole["batch_stats"][name][:, [0, 2]])


# MemorizedBatchNorm: gradients.

WEIGHTS = memory_weights(jnp.ones((3, 3)), 3, 0.8)
WEIGHTS /= WEIGHTS.sum(0, keepdims=True)


def pool_with(m, v):
    """Pools a batch's moments with two old slots."""
    slots = (np.stack([old[i] for old in OLD]) for i in (0, 1))
    mean, var = (
        jnp.concatenate([new[None], jnp.asarray(old, jnp.float32)])
        for new, old in zip((m, v), slots, strict=True)
    )
    return pool(Moments(mean, var, jnp.ones((3, 3))), WEIGHTS)[:2]


def normalizing(m, v, **options):
    options = {"epsilon": EPSILON, **options}
    function = with_gradient if "gradient" in options else clipped_renorm
    return function(Moments(m, v, jnp.full(3, 8.0)), *pool_with(m, v), **options)


BATCH = jnp.array([1.0, -0.7, 0.3]), jnp.array([0.5, 2.0, 0.1])


def ioffe(x, m, v, mean, var, r_max=np.inf, d_max=np.inf):
    """Batch Renormalization's x_hat as published, r and d held constant."""
    batch_scale, scale = jnp.sqrt(v + EPSILON), jnp.sqrt(var + EPSILON)
    r, d = jnp.clip(batch_scale / scale, 1 / r_max, r_max), (m - mean) / scale
    r, d = jax.lax.stop_gradient((r, jnp.clip(d, -d_max, d_max)))
    return (x - m) / batch_scale * r + d


def test_through_differentiates_the_pool_as_it_stands():
    def of_feature(i, m, v):
        return [s[i] for s in normalizing(m, v, gradient="through")]

    mean, _ = pool_with(*BATCH)
    for i in range(3):
        (dmean_dm, dmean_dv), (dvar_dm, dvar_dv) = jax.jacrev(
            functools.partial(of_feature, i), argnums=(0, 1)
        )(*BATCH)
        own, a_0 = np.eye(3)[i], WEIGHTS[0]
        close(dmean_dm, own * a_0)
        close(dmean_dv, own * 0)
        close(dvar_dv, own * a_0)
        close(dvar_dm, own * 2 * a_0 * (BATCH[0] - mean))


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"r_max": 1.1, "d_max": np.inf},
        {"r_max": np.inf, "d_max": 0.2},
        {"r_max": 3, "d_max": 3},
    ],
)
def test_renorm_is_batch_renormalization_in_value_and_gradient(limits):
    mean, var = pool_with(*BATCH)
    x = normal(3, seed=1)

    def output(x, m, v):
        mean, var = normalizing(m, v, **(limits or {"gradient": "renorm"}))
        return (x - mean) / jnp.sqrt(var + EPSILON)

    expected = functools.partial(ioffe, mean=mean, var=var, **limits)
    close(output(x, *BATCH), expected(x, *BATCH))
    gradients, expected_gradients = (
        jax.jacrev(f, argnums=(0, 1, 2))(x, *BATCH) for f in (output, expected)
    )
    assert_trees(close, gradients, expected_gradients)
    unclipped = ioffe(x, *BATCH, mean, var)
    # The limits of this test bind, except the last.
    assert np.allclose(output(x, *BATCH), unclipped) == (
        not limits or limits == {"r_max": 3, "d_max": 3}
    )


@pytest.mark.parametrize("gradient", ["through", "renorm"])
def test_without_a_clip_the_values_are_the_pools_to_the_bit(gradient):
    for scale in (1.0, 1e3, 1e-3):
        m, v = BATCH[0] * scale, BATCH[1] * scale
        assert_trees(equal, normalizing(m, v, gradient=gradient), pool_with(m, v))


def test_complex_d_is_clipped_in_size_and_keeps_its_angle():
    m, v = jnp.array([3 + 4j]), jnp.array([1.0])
    batch = Moments(m, v, jnp.array([8.0]))
    mean, _ = clipped_renorm(batch, 0 * m, v, epsilon=0.0, r_max=np.inf, d_max=1.0)
    # d = 3 + 4i of size 5 becomes 0.6 + 0.8i.
    close(m - mean, [0.6 + 0.8j])


def hand_derived(gradient, x, g, a_0):
    """Backward passes on paper: returns d loss/d x for the cotangent g of x_hat, float64."""
    x, g, a_0 = (np.asarray(value, np.float64) for value in (x, g, a_0))
    n = len(x)
    m, v = x.mean(0), x.var(0)
    mean, var = reference.total_variance(
        reference.weights(3, 0.8),
        [m, *(np.array(old[0]) for old in OLD)],
        [v, *(np.array(old[1]) for old in OLD)],
    )
    s, s_batch = np.sqrt(var + EPSILON), np.sqrt(v + EPSILON)
    if gradient == "through":
        to_mean, to_var = -g.sum(0) / s, -(g * (x - mean)).sum(0) / (2 * s**3)
        to_m, to_v = a_0 * to_mean + 2 * a_0 * (m - mean) * to_var, a_0 * to_var
        return g / s + to_m / n + to_v * 2 * (x - m) / n
    x_hat = (x - m) / s_batch
    return (g - g.mean(0) - x_hat * (g * x_hat).mean(0)) / s_batch * (s_batch / s)


def input_gradient(layer, x, g, batch_stats=None):
    """d sum(g * y)/d x of a training call."""
    batch_stats = batch_stats or memory_of(*OLD, capacity=3)
    return jax.grad(lambda x: jnp.sum(g * train(layer, {"batch_stats": batch_stats}, x)[0].real))(x)


plain = functools.partial(
    MemorizedBatchNorm,
    memory_size=3,
    decay=0.8,
    use_running_average=False,
    use_scale=False,
    use_bias=False,
)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("gradient", ["through", "renorm"])
def test_input_gradients_are_those_derived_by_hand(gradient, fast):
    x, g = normal(8, 3, mean=1), normal(8, 3, seed=1)
    actual = input_gradient(plain(gradient=gradient, use_fast_variance=fast), x, g)
    close(actual, hand_derived(gradient, x, g, WEIGHTS[0]))


@pytest.mark.parametrize(("rows", "rule"), [(1, "through"), (2, "through"), (3, "renorm")])
@pytest.mark.slow
def test_auto_is_through_up_to_two_values_and_renorm_beyond(rows, rule):
    x, g = normal(rows, 3), normal(rows, 3, seed=1)
    close(input_gradient(plain(gradient="auto"), x, g), hand_derived(rule, x, g, WEIGHTS[0]))
    # Positions count as rows do.
    actual = input_gradient(plain(gradient="auto"), x[:, None].swapaxes(0, 1), g[None])
    close(actual[0], hand_derived(rule, x, g, WEIGHTS[0]))


@pytest.mark.parametrize(
    ("devices", "groups", "rule"),
    [
        (2, None, "through"),
        (4, None, "renorm"),
        (4, [[0, 1], [2, 3]], "through"),
        (8, [[0, 1, 2, 3], [4, 5, 6, 7]], "renorm"),
    ],
)
def test_auto_counts_the_devices_that_share_statistics(devices, groups, rule):
    x, g = normal(devices, 1, 3), normal(devices, 1, 3, seed=1)
    layer = plain(gradient="auto", axis_name="batch", axis_index_groups=groups)
    actual = jax.pmap(functools.partial(input_gradient, layer), axis_name="batch")(x, g)
    for group in groups or [list(range(devices))]:
        expected = hand_derived(rule, x[np.array(group), 0], g[np.array(group), 0], WEIGHTS[0])
        close(actual[np.array(group), 0], expected)


@pytest.mark.parametrize("gradient", ["through", "renorm"])
@pytest.mark.slow
def test_the_memory_is_a_constant(gradient):
    x1, x2 = normal(6, 3, mean=1), normal(6, 3, seed=1)
    norm = plain(gradient=gradient)
    stats = memory_of(*OLD, capacity=3)

    @jax.jit
    def outputs(x1, x2, stats):
        (y1, y2), after = train(Twice(norm), {"batch_stats": {"norm": stats}}, x1, x2=x2)
        return y1, y2, after

    # A call depends on the other's input only through the memory.
    (own1, cross1, memory1), (cross2, own2, memory2), after = jax.jit(
        jax.jacrev(outputs, argnums=(0, 1, 2))
    )(x1, x2, stats)
    for leaf in jax.tree.leaves((cross1, cross2, memory1, memory2, after)):
        equal(leaf, np.zeros(leaf.shape))
    assert own1.any()
    assert own2.any()
    # The value does depend on it.
    assert not np.allclose(outputs(x1, x2, stats)[1], outputs(x1 + 1, x2, stats)[1])


# MemorizedBatchNorm: one program for several memories.


class Remat(nn.Module):
    """A block under `nn.remat`."""

    make: Callable[..., nn.Module]
    options: Any = None

    @nn.compact
    def __call__(self, x):
        return nn.remat(Block)(self.make, self.options, name="block")(x)


@pytest.mark.parametrize("container", [Block, Remat, VmapBlock, Layers])
@pytest.mark.slow
def test_traced_memory_size_and_decay_share_one_program(container):
    make = functools.partial(MemorizedBatchNorm, memory_capacity=3)
    x = normal(4, 3, 6, 2)

    def run(memory_size, decay):
        """Four steps and the gradient of the last."""
        model = container(make, {"memory_size": memory_size, "decay": decay})
        variables = model.init(jax.random.key(0), x[0])
        for batch in x[:-1]:
            _, variables = train(model, variables, batch)
        return loss_of(model, variables, x[-1], normal(3, 6, 2, seed=1))

    settings = [(2, 0.9), (3, 0.9), (3, 0.5), (1, 1.0)]
    traced = jax.jit(run)
    results = [traced(*setting) for setting in settings]
    assert traced._cache_size() == 1
    for setting, result in list(zip(settings, results, strict=True))[:2]:
        assert_trees(close, result, jax.jit(functools.partial(run, *setting))())
    # The settings differ in what they compute.
    outputs = [result[0][1][0] for result in results]
    assert not any(np.allclose(a, b) for a, b in itertools.pairwise(outputs))


def test_room_to_spare_changes_nothing_and_lets_the_memory_grow():
    x = normal(6, 8, 3)
    small, roomy, grown = (
        MemorizedBatchNorm(memory_size=k, memory_capacity=room, use_running_average=False)
        for k, room in ((2, None), (2, 5), (4, 5))
    )
    variables, roomy_variables = (layer.init(jax.random.key(0), x[0]) for layer in (small, roomy))
    expected = reference.ReferenceMBN(4, 0.97)
    for batch in x[:4]:
        y, variables = train(small, variables, batch)
        roomy_y, roomy_variables = train(roomy, roomy_variables, batch)
        close(roomy_y, y)
        expected.train(batch)
    # The longer memory finds what the shorter one only kept.
    y, _ = train(grown, roomy_variables, x[4])
    close(y, expected.train(x[4]))


# MemorizedBatchNorm: eight devices.


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("gradient", ["through", "renorm"])
@pytest.mark.slow
def test_eight_devices_are_one_with_the_whole_batch(gradient, fast, masked):
    x = normal(8, 4, 3, mean=normal(8, 1, 3, seed=1))
    weights = normal(8, 4, 3, seed=2)
    # Device 0 keeps nothing, device 1 everything, the others something.
    mask = (normal(8, 4, 3, seed=3) > 0).at[0].set(False).at[1].set(True)
    mask = mask if masked else jnp.ones_like(mask)
    weights = weights * mask
    variables = {"params": PARAMS, "batch_stats": memory_of(*OLD, capacity=3)}

    def results(x, weights, mask, axis_name=None):
        layer = MemorizedBatchNorm(
            memory_size=3, gradient=gradient, use_fast_variance=fast, axis_name=axis_name
        )

        def loss(params, x):
            y, after = train(
                layer,
                {**variables, "params": params},
                x,
                use_running_average=False,
                mask=mask if masked else None,
            )
            return jnp.mean(weights * jnp.sin(y)), (y, after["batch_stats"])

        (_, (y, stats)), (to_params, to_x) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
            variables["params"], x
        )
        if axis_name:
            to_params = jax.lax.pmean(to_params, axis_name)
            # The loss of all is the mean of the devices' losses.
            to_x = to_x / jax.lax.axis_size(axis_name)
        return (y, to_x), (to_params, stats)

    whole = jax.jit(results)(*(value.reshape(32, 3) for value in (x, weights, mask)))
    per_example, replicated = jax.pmap(
        functools.partial(results, axis_name="batch"), axis_name="batch"
    )(x, weights, mask)
    # Sums in another order, with cancellation in the gradients: some ten roundoffs of their terms.
    assert_trees(lambda a, e: close(a.reshape(32, 3), e), per_example, whole[0])
    for device in range(8):
        assert_trees(close, at(replicated, device), whole[1])


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.slow
def test_groups_of_devices_are_batches_of_their_own(fast):
    groups = [[0, 3, 5, 6], [1, 2, 4, 7]]
    x = normal(3, 8, 4, 3, mean=normal(3, 8, 1, 3, seed=1))
    options = {"memory_size": 2, "use_running_average": False, "use_fast_variance": fast}
    layer = MemorizedBatchNorm(axis_name="batch", axis_index_groups=groups, **options)
    variables = layer.init(jax.random.key(0), x[0, 0])
    variables = jax.tree.map(lambda leaf: jnp.stack([leaf] * 8), variables)
    expected = [reference.ReferenceMBN(2, 0.97) for _ in groups]
    step = jax.pmap(functools.partial(train, layer), axis_name="batch")
    for batch in x:
        y, variables = step(variables, batch)
        for group, of_group in zip(groups, expected, strict=True):
            close(y[np.array(group)], of_group.train(batch[np.array(group)]))


# MemorizedBatchNorm: what is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_size": 0}, r"memory_size must be .* 1 or more .*got 0"),
        ({"memory_size": 1.5}, r"memory_size must be a whole number .*got 1\.5"),
        ({"memory_capacity": 0}, r"memory_capacity must be 1 or more, got 0"),
        ({"memory_size": 8, "memory_capacity": 4}, r"at most memory_capacity=4, got 8"),
        ({"decay": 0.0}, r"decay must be in \(0, 1\], got 0"),
        ({"decay": 1.1}, r"decay must be in \(0, 1\], got 1\.1"),
        ({"decay": float("nan")}, r"decay must be in \(0, 1\], got nan"),
        ({"memory_size": None, "decay": np.float32(3)}, r"decay must be in \(0, 1\], got 3"),
        ({"gradient": "exact"}, r"gradient must be one of .*'renorm'.*got 'exact'"),
        ({"memory_size": None, "memory_capacity": 4}, "needs a memory_size that is not None"),
        ({"axis_index_groups": ((0, 1),)}, "axis_index_groups divides a named axis"),
    ],
)
def test_impossible_options_are_refused_on_construction(options, message):
    with pytest.raises(ValueError, match=message):
        MemorizedBatchNorm(**options)


def test_traced_memory_size_needs_a_capacity():
    with pytest.raises(ValueError, match="traced or a function needs memory_capacity"):
        jax.jit(lambda k: MemorizedBatchNorm(memory_size=k).init(jax.random.key(0), k))(2)


@pytest.mark.parametrize("use_running_average", [False, True])
@pytest.mark.parametrize(
    ("options", "shape", "dtype", "message"),
    [
        ({"memory_size": 5}, (4, 3), "float32", r"shape \(5, 3\).*got \(4, 3\).*memory_size"),
        ({"memory_capacity": 6}, (4, 3), "float32", r"shape \(6, 3\).*got \(4, 3\)"),
        ({}, (4, 2), "float32", r"shape \(4, 2\) \(slots, \*features\), got \(4, 3\)"),
        ({}, (4, 3), "int32", r"expected floating-point inputs, got int32"),
        ({}, (4, 3), "bool", r"expected floating-point inputs, got bool"),
        ({}, (4, 3), "complex64", r"got complex inputs, but its memory .*real"),
        ({"axis": 2}, (4, 3), "float32", r"axis within the rank.*axis=2.*rank 2"),
        ({"axis": (-1, -3)}, (4, 3), "float32", r"axis within the rank.*rank 2"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(options, shape, dtype, message, use_running_average):
    variables = memorized().init(jax.random.key(0), normal(4, 3), use_running_average=True)
    layer = memorized(use_running_average=use_running_average, **options)
    with pytest.raises(ValueError, match=message):
        train(layer, variables, jnp.ones(shape, dtype))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("fast", [True, False])
def test_a_batch_that_is_not_finite_leaves_the_memory_as_it_was(bad, fast):
    layer = MemorizedBatchNorm(
        memory_size=2, use_running_average=False, use_fast_variance=fast, memory_capacity=4
    )
    x = normal(3, 8, 5)
    variables = layer.init(jax.random.key(0), x[0])
    _, before = train(layer, variables, x[0])
    _, bad_seen = train(layer, before, x[1].at[0, 0].set(bad))
    before, after = (v["batch_stats"]["mean"] for v in (before, bad_seen))
    equal(after[:, 0], before[:, 0])  # The feature with the bad value.
    equal(after[1, 1:], before[0, 1:])  # The others went one slot on.
    y, _ = train(layer, bad_seen, x[2])
    assert np.isfinite(y).all()


def test_what_is_in_an_unused_slot_does_not_matter():
    layer = MemorizedBatchNorm(memory_size=1, memory_capacity=3, use_running_average=False)
    x = normal(2, 8, 5)
    variables = layer.init(jax.random.key(0), x[0])
    _, variables = train(layer, variables, x[0])
    stats = variables["batch_stats"]
    poisoned = stats | {
        "mean": stats["mean"].at[1:].set(jnp.nan),
        "count": stats["count"].at[1:].set(8.0),
    }
    expected, _ = train(layer, variables, x[1])
    y, _ = train(layer, variables | {"batch_stats": poisoned}, x[1])
    equal(y, expected)
