"""The pure functions of `mbn_jax.core.moments` against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from reference import ROUNDING, assert_moments, normal

from mbn_jax.core.moments import Moments, abs_sq, batch_moments, pool_groups

ESTIMATORS = {
    "two_pass": {"use_fast_variance": False},
    "one_pass": {},
    "one_pass_centred": {"center": "mean"},
}


@pytest.fixture(params=ESTIMATORS)
def estimator(request):
    """Options of `batch_moments`; the center is a guess that is half a unit off."""

    def options(features):
        chosen = dict(ESTIMATORS[request.param])
        if "center" in chosen:
            chosen["center"] = jnp.full(features, 0.5, jnp.float32)
        return chosen

    return options


# Batch moments: axes and masks.


@pytest.mark.parametrize(
    ("shape", "features"),
    [((8, 3), (1,)), ((4, 5, 3), (2,)), ((4, 3, 5), (1,)), ((4, 3, 5, 2), (1, 3)), ((7,), ())],
)
def test_moments_over_any_axes(shape, features, estimator):
    x = normal(shape)
    axes = tuple(i for i in range(len(shape)) if i not in features)
    actual = batch_moments(x, axes, **estimator([shape[i] for i in features]))
    assert_moments(actual, reference.moments(x, features))


MASKS = {
    "rows": np.array([True, False, True, True, False, True]).reshape(6, 1, 1),
    "positions": normal((6, 4, 1), seed=1) > 0,
    "elements": normal((6, 4, 3), seed=2) > 0,
    "one_feature_unseen": np.array([True, False, True]),
    "all_kept": np.array(True),
    "nothing_kept": np.zeros((6, 4, 3), bool),
}


@pytest.mark.parametrize("poison", [0.0, np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.slow
def test_masked_elements_count_nowhere(mask, poison, estimator):
    x = normal((6, 4, 3), seed=3)
    kept = np.broadcast_to(mask, x.shape)
    poisoned = jnp.asarray(np.where(kept, x, np.float32(poison)))
    options = estimator([3])

    def both(x):
        moments = batch_moments(x, (0, 1), mask=mask, **options)
        return (moments.mean * 2 + moments.var).sum(), moments

    gradient, moments = jax.grad(both, has_aux=True)(poisoned)
    expected = mean, _, count = reference.moments(x, mask=mask)
    assert_moments(moments, expected)
    # d mean/dx = 1/n and d var/dx = 2 (x - mean)/n where an element counts, else 0.
    derivative = np.where(kept, (2 + 2 * (x - mean)) / np.maximum(count, 1), 0)
    np.testing.assert_allclose(gradient, derivative, atol=ROUNDING)


def test_nothing_to_count_gives_zeros(estimator):
    moments = batch_moments(normal((4, 3)), (0,), mask=np.zeros((4, 3), bool), **estimator([3]))
    for value in moments:
        np.testing.assert_array_equal(value, np.zeros(3))


# Batch moments: over devices. `vmap` and eight devices must both be the batch in one piece.

MAPS = {"vmap": jax.vmap, "pmap": jax.pmap}


@pytest.mark.parametrize("map_name", MAPS)
@pytest.mark.parametrize("masked", [False, True])
def test_moments_over_a_named_axis_are_those_of_the_whole_batch(map_name, masked, estimator):
    x = normal((8, 4, 3), mean=normal((8, 1, 3), seed=1))
    # Device 0 keeps nothing, device 1 everything, the others something.
    mask = normal((8, 4, 3), seed=2) > 0
    mask[0], mask[1] = False, True
    mask = mask if masked else None
    options = {"axis_name": "batch", **estimator([3])}
    if masked:
        function, args = lambda x, mask: batch_moments(x, (0,), mask=mask, **options), (x, mask)
    else:
        function, args = lambda x: batch_moments(x, (0,), **options), (x,)
    mapped = MAPS[map_name](function, axis_name="batch")(*args)
    for device in range(8):
        assert_moments(
            jax.tree.map(lambda v, i=device: v[i], mapped), reference.moments(x, -1, mask)
        )


@pytest.mark.parametrize("masked", [False, True])
def test_axis_index_groups_are_pooled_one_by_one(masked, estimator):
    groups = [[0, 3], [1, 2], [4, 7], [5, 6]]
    x = normal((8, 16, 3), mean=normal((8, 1, 3), seed=1))
    mask = normal((8, 16, 1), seed=2) > (0 if masked else -np.inf)
    mapped = jax.pmap(
        lambda x, mask: batch_moments(
            x,
            (0,),
            mask=mask if masked else None,
            axis_name="batch",
            axis_index_groups=groups,
            **estimator([3]),
        ),
        "batch",
    )(x, mask)
    for group in groups:
        expected = reference.moments(x[group], mask=mask[group])
        for device in group:
            assert_moments(jax.tree.map(lambda v, i=device: v[i], mapped), expected)


def test_complex_moments_over_a_named_axis():
    x = normal((8, 4, 3), dtype=np.complex64)
    mask = normal((8, 4, 3), seed=2) > 0
    for m in (None, mask):
        mapped = jax.vmap(
            lambda x, m: batch_moments(x, (0,), mask=m, axis_name="batch"),
            in_axes=(0, None if m is None else 0),
            axis_name="batch",
        )(x, m)
        assert_moments(jax.tree.map(lambda v: v[3], mapped), reference.moments(x, -1, m))


# Batch moments: numerics.


@pytest.mark.parametrize("ratio", [100, 1000])
def test_one_pass_is_as_exact_as_two_around_a_good_center(ratio):
    x = normal((4096, 4), mean=ratio)
    mean, var, _ = reference.moments(x)

    def error(**options):
        return np.abs(batch_moments(x, (0,), **options).var / var - 1).max()

    # |mean - center| <= 3 std loses some ten roundoffs. The two-pass mean, a sum of thousands of
    # large numbers, is off by some 40 * ratio roundoffs, and its variance by the square of that.
    bound = 2e-6
    assert error(use_fast_variance=False) <= bound + (40 * ratio * 6e-8) ** 2
    for guess in (mean, mean + 3, mean - 3, x[0]):
        assert error(center=jnp.asarray(guess, jnp.float32)) <= bound
    # Around 0, ratio^2 roundoffs are at stake: some of the four features lose a hundredth of that.
    assert error() >= 0.01 * ratio**2 * 6e-8 > 2 * bound


def test_variance_is_never_negative():
    x = jnp.full((64, 100), jnp.linspace(1, 2000, 100))
    assert batch_moments(x, (0,)).var.min() >= 0


@pytest.mark.parametrize("mask", [None, normal((64, 3), seed=2) > 0])
def test_complex(mask, estimator):
    x = normal((64, 3), mean=1 - 2j, dtype=np.complex64)
    actual = batch_moments(x, (0,), mask=mask, **estimator([3]))
    assert actual.mean.dtype == jnp.complex64
    assert actual.var.dtype == jnp.float32
    assert_moments(actual, reference.moments(x, mask=mask))
    np.testing.assert_allclose(abs_sq(x), np.abs(x) ** 2, rtol=ROUNDING)


HALVES = [jnp.bfloat16, jnp.float16]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("mask", [None, normal((8192, 3), seed=2) > 0], ids=["all", "masked"])
def test_halves_are_reduced_in_float32(dtype, mask, estimator):
    # 4096 times 30 is beyond float16's range, a count of 4096 and more beyond bfloat16's digits.
    x = jnp.asarray(normal((8192, 3), mean=30), dtype)
    options = estimator([3])
    if options.get("use_fast_variance", True):
        options["center"] = jnp.full([3], 30, jnp.float32)
    moments = batch_moments(x, (0,), mask=mask, **options)
    assert {value.dtype for value in moments} == {jnp.dtype("float32")}
    # Mean 30: representing it costs 30 roundoffs of a standard deviation.
    assert_moments(moments, reference.moments(np.float64(x), mask=mask), 3e-6)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("mask", [None, normal((8192, 3), seed=2) > 0], ids=["all", "masked"])
@pytest.mark.parametrize("fast", [False, True])
def test_halves_kept_on_request(dtype, mask, fast):
    x = jnp.asarray(normal((8192, 3), mean=30), dtype)
    moments = batch_moments(
        x,
        (0,),
        mask=mask,
        center=jnp.full([3], 30, dtype),
        use_fast_variance=fast,
        force_float32_reductions=False,
    )
    assert moments.mean.dtype == moments.var.dtype == dtype
    # A mean of 30 is rounded to 30 roundoffs, and the deviations from it are off by as much.
    tolerance = 60 * float(jnp.finfo(dtype).eps)
    assert_moments(moments, reference.moments(np.float64(x), mask=mask), tolerance)


@pytest.mark.parametrize("mask", [None, np.ones((8, 64, 3), bool)], ids=["all", "masked"])
def test_float16_moments_over_devices_stay_in_range(mask):
    # One device's mean square is 10,000; the sum of eight is beyond float16's range.
    x = jnp.asarray(np.broadcast_to(np.tile([100, -100], 32)[:, None], (8, 64, 3)), jnp.float16)
    moments = jax.vmap(
        lambda x, mask: batch_moments(
            x, (0,), mask=mask, axis_name="batch", force_float32_reductions=False
        ),
        in_axes=(0, None if mask is None else 0),
        axis_name="batch",
    )(x, mask)
    np.testing.assert_array_equal(moments.mean, np.zeros((8, 3)))
    np.testing.assert_array_equal(moments.var, np.full((8, 3), 1e4))


def test_dtype_is_the_least_precision():
    x = jnp.zeros((2, 1), jnp.bfloat16)
    options = {"force_float32_reductions": False}
    assert batch_moments(x, (0,), dtype=jnp.float16, **options).mean.dtype == jnp.float16
    assert batch_moments(x, (0,), dtype=jnp.float16).mean.dtype == jnp.float32
    assert batch_moments(x, (0,), **options).mean.dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_double_precision_is_kept(dtype, estimator):
    x = normal((64, 3), dtype=dtype)
    with jax.enable_x64(True):
        moments = batch_moments(jnp.asarray(x), (0,), **estimator([3]))
        assert moments.mean.dtype == dtype
        assert moments.var.dtype == np.float64
        # Some ten roundoffs of 1e-16.
        assert_moments(moments, reference.moments(x), 1e-14)


# Groups.


def test_groups_pool_to_their_union_and_not_to_a_mean_of_variances():
    parts = np.split(normal((64, 3), mean=np.linspace(-2, 2, 64)[:, None]), [4, 30, 48])
    groups = jax.tree.map(lambda *v: jnp.stack(v), *(batch_moments(p, (0,)) for p in parts))
    # An empty group weighs nothing, whatever it holds.
    groups = jax.tree.map(
        lambda v, e: jnp.concatenate([v, jnp.full((1, 3), e)]), groups, Moments(9.0, 9.0, 0.0)
    )
    expected = reference.moments(np.concatenate(parts))
    assert_moments(pool_groups(groups), expected)
    mean_of_variances = np.average(groups.var, axis=0, weights=groups.count[:, 0])
    # The part means spread over -2..2, so more than half of the variance is between the parts.
    assert np.max(mean_of_variances / expected[1]) < 0.75


def test_groups_of_memories_are_pooled_slot_by_slot():
    x = normal((4, 5, 16, 3), mean=normal((4, 5, 1, 3), seed=1))  # Groups, slots, rows, features.
    groups = jax.vmap(jax.vmap(lambda x: batch_moments(x, (0,), use_fast_variance=False)))(x)
    pooled = pool_groups(groups)
    for slot in range(5):
        assert_moments(jax.tree.map(lambda v, i=slot: v[i], pooled), reference.moments(x[:, slot]))


def test_groups_keep_the_dtypes_of_the_memory_and_stay_defined_when_all_are_empty():
    groups = Moments(
        jnp.ones((2, 3), jnp.bfloat16), jnp.ones((2, 3), jnp.bfloat16), jnp.zeros((2, 3))
    )
    pooled = pool_groups(groups)
    assert [value.dtype for value in pooled] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    for value in pooled:
        np.testing.assert_array_equal(value, np.zeros(3))
