"""The memory's pure functions against float64 NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from reference import ROUNDING, assert_moments, normal

from mbn_jax.core.memory import Endless, Slots, memory_weights, pool, pool_of_two, push
from mbn_jax.core.moments import Moments, batch_moments


@pytest.mark.parametrize("decay", [1.0, 0.9, 0.3])
@pytest.mark.parametrize(
    ("filled", "memory_size"), [(0, 5), (1, 5), (3, 5), (5, 5), (5, 2), (5, 1)]
)
def test_weights_are_geometric_over_the_slots_in_use(decay, filled, memory_size):
    count = jnp.where(jnp.arange(5) < filled, 8.0, 0.0)
    expected = np.zeros(5)
    used = min(filled, memory_size)
    if used:
        expected[:used] = reference.weights(used, decay)
    for cast in (lambda x: x, jnp.asarray):
        actual = memory_weights(count, cast(memory_size), cast(decay))
        actual /= jnp.maximum(actual.sum(), 1)
        np.testing.assert_allclose(actual, expected, rtol=ROUNDING)


def test_weights_are_per_feature():
    count = jnp.array([[8.0, 8.0, 0.0], [8.0, 0.0, 0.0]])
    np.testing.assert_array_equal(memory_weights(count, 2, 0.5), [[1, 1, 0], [0.5, 0, 0]])


def filled_memory(batches, **options):
    """The memory after `batches`, the last one newest."""
    shape = (len(batches), batches[0].shape[-1])
    slots = Moments(jnp.zeros(shape), jnp.ones(shape), jnp.zeros(shape))
    for batch in batches:
        slots = push(slots, batch_moments(batch, (0,), use_fast_variance=False, **options))
    return slots


@pytest.mark.parametrize("k", [1, 2, 7, 64])
def test_pool_is_the_statistics_of_the_batches_concatenated(k):
    batches = [
        normal((16, 3), seed=i, mean=normal((3,), seed=99 + i), std=1 + i % 3) for i in range(k)
    ]
    slots = filled_memory(batches)
    mean, var, _ = pool(slots, memory_weights(slots.count, k, 1.0))
    pooled = Moments(mean, var, slots.count.sum(0))
    assert_moments(pooled, reference.moments(np.concatenate(batches)))


def test_pool_is_exact_far_from_zero():
    # Representing and summing a mean costs some 2 * ratio roundoffs of a standard deviation, and
    # the variance twice that times the slots' spread (1/8). E[m^2] - E[m]^2 would lose 6 %.
    ratio = 1000
    batches = [normal((64, 3), seed=i, mean=ratio) for i in range(8)]
    slots = filled_memory(batches)
    mean, var, _ = pool(slots, memory_weights(slots.count, 8, 1.0))
    expected = reference.moments(np.concatenate(batches))
    assert np.max(np.abs(mean - expected[0]) / np.sqrt(expected[1])) <= 2 * ratio * 6e-8
    assert np.max(np.abs(var / expected[1] - 1)) <= 2 / 8 * 2 * ratio * 6e-8


@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_slots_that_agree_pool_to_what_they_agree_on(decay):
    means = jnp.tile(jnp.array([1000.1, -0.3, 7e-8]), (7, 1))
    slots = Moments(means, jnp.full((7, 3), 2.5), jnp.full((7, 3), 8.0))
    mean, var, _ = pool(slots, memory_weights(slots.count, 7, decay))
    # To the bit: an offset that is common to all slots costs no digits.
    np.testing.assert_array_equal(mean, means[0])
    np.testing.assert_allclose(var, [2.5] * 3, rtol=ROUNDING)


def test_geometric_pool_and_complex_means():
    means, variances = normal((4, 3), dtype=np.complex64), np.abs(normal((4, 3), seed=1))
    slots = Moments(*map(jnp.asarray, (means, variances, np.full((4, 3), 8, np.float32))))
    mean, var, _ = pool(slots, memory_weights(slots.count, 4, 0.6))
    expected = reference.total_variance(reference.weights(4, 0.6), means, np.float64(variances))
    assert var.dtype == jnp.float32
    np.testing.assert_allclose(mean, expected[0], atol=ROUNDING)
    np.testing.assert_allclose(var, expected[1], rtol=ROUNDING)


def test_empty_memory_pools_to_the_identity():
    garbage = Moments(jnp.full((2, 3), 7.0), jnp.full((2, 3), 9.0), jnp.zeros((2, 3)))
    mean, var, _ = pool(garbage, memory_weights(garbage.count, 2, 0.9))
    np.testing.assert_array_equal(mean, np.zeros(3))
    np.testing.assert_array_equal(var, np.ones(3))


def test_push_is_first_in_first_out_in_the_memorys_dtypes():
    slots = Moments(
        jnp.zeros((3, 2), jnp.float16), jnp.ones((3, 2), jnp.float16), jnp.zeros((3, 2))
    )
    for i in range(1, 5):
        moments = Moments(jnp.full(2, i), jnp.full(2, 10.0 * i), jnp.full(2, 100.0 * i))
        slots = push(slots, moments)
    np.testing.assert_array_equal(slots.mean[:, 0], [4, 3, 2])
    np.testing.assert_array_equal(slots.var[:, 1], [40, 30, 20])
    np.testing.assert_array_equal(slots.count[:, 0], [400, 300, 200])
    assert [value.dtype for value in slots] == [jnp.float16, jnp.float16, jnp.float32]


def test_push_skips_features_without_an_element():
    slots = Moments(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.ones((2, 2)), jnp.full((2, 2), 8.0))
    moments = Moments(jnp.array([7.0, jnp.nan]), jnp.array([2.0, jnp.nan]), jnp.array([4.0, 0.0]))
    pushed = push(slots, moments)
    np.testing.assert_array_equal(pushed.mean, [[7, 2], [1, 4]])
    np.testing.assert_array_equal(pushed.var, [[2, 1], [1, 1]])
    np.testing.assert_array_equal(pushed.count, [[4, 8], [8, 8]])


# Pools beside a new batch.


def random_slots(k, filled):
    count = np.where(np.arange(k)[:, None] < filled, 8, 0) * np.ones((1, 3))
    return Moments(
        *map(jnp.float32, (normal((k, 3), mean=3), np.abs(normal((k, 3), seed=1)), count))
    )


def assert_pools(actual, expected):
    np.testing.assert_allclose(actual[0], expected[0], rtol=ROUNDING, atol=ROUNDING)
    np.testing.assert_allclose(actual[1], expected[1], rtol=ROUNDING)


@pytest.mark.parametrize("decay", [1.0, 0.7])
@pytest.mark.parametrize(
    ("filled", "memory_size"), [(0, 5), (2, 5), (5, 5), (5, 3), (5, 1), (5, 2.5), (5, 7)]
)
def test_what_remains_and_the_new_batch_are_the_pool_of_the_pushed_memory(
    filled, memory_size, decay
):
    slots = random_slots(5, filled)
    batch = Moments(jnp.full(3, 2.5), jnp.full(3, 0.7), jnp.full(3, 8.0))
    for cast in (lambda x: x, jnp.asarray):
        rule = Slots(cast(memory_size), cast(decay))
        new = pool_of_two(rule.without_oldest(slots), batch._replace(count=jnp.ones(3)))
        assert_pools(new, rule.pooled(rule.pushed(slots, batch)))
        # And with what leaves in place of the batch, that of the memory as it is.
        assert_pools(
            pool_of_two(rule.without_oldest(slots), rule.oldest(slots)), rule.pooled(slots)
        )


def test_an_endless_is_a_memory_without_end():
    slots = random_slots(64, 0)
    endless = jax.tree.map(lambda x: x[0], slots)
    for seed in range(20):
        batch = Moments(*map(jnp.float32, (normal((3,), seed), np.full(3, 0.5 + seed), np.ones(3))))
        slots, endless = Slots(64, 0.9).pushed(slots, batch), Endless(0.9).pushed(endless, batch)
        assert_pools(Endless(0.9).pooled(endless), Slots(64, 0.9).pooled(slots))
    expected = sum(0.9**i for i in range(20))
    np.testing.assert_allclose(endless.count, np.full(3, expected), rtol=ROUNDING)


@pytest.mark.parametrize("rule", [Slots(3, 0.5), Endless(0.5)], ids=["slots", "endless"])
def test_an_unusable_batch_leaves_the_pool(rule):
    kept = random_slots(3, 3)
    if isinstance(rule, Endless):
        kept = jax.tree.map(lambda x: x[0], kept)
    batch = Moments(jnp.full(3, jnp.nan), jnp.full(3, jnp.inf), jnp.full(3, 8.0))
    for old, new in zip(kept, rule.pushed(kept, batch), strict=True):
        np.testing.assert_array_equal(old, new)


def test_what_counts_nothing_does_not_matter():
    some = Moments(jnp.float32(2), jnp.float32(3), jnp.float32(1))
    for mean, var in itertools.product([0.0, 1e30, jnp.inf, jnp.nan], [1.0, jnp.nan]):
        none = Moments(jnp.float32(mean), jnp.float32(var), jnp.float32(0))
        assert [float(x) for x in pool_of_two(some, none)] == [2, 3, 1]
        assert [float(x) for x in pool_of_two(none, some)] == [2, 3, 1]
