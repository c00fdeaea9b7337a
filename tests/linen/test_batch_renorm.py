"""Batch Renormalization against its definition in float64 NumPy, and against flax's BatchNorm."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mbn_jax.core.batch_stats import pool_batch_stats
from mbn_jax.linen.batch_renorm import BatchRenorm

EPSILON = 1e-5
# Outputs of size 1 to 10: some ten roundoffs (6e-8) of float32.
close = functools.partial(np.testing.assert_allclose, rtol=5e-6, atol=5e-6)


def batches(count, mean=1.0):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(mean, 2.0, (6, 5, 3)).astype(np.float32)) for _ in range(count)]


def train(layer, variables, x):
    y, updates = layer.apply(variables, x, mutable=["batch_stats"])
    return y, {**variables, **updates}


def by_definition(x, mu, sigma, r_max, d_max, momentum):
    """One training step of the paper's Algorithm 1."""
    x = np.float64(x)
    mu_b, sigma_b = x.mean((0, 1)), np.sqrt(x.var((0, 1)) + EPSILON)
    sigma_now = np.sqrt(sigma**2 + EPSILON)
    r = np.clip(sigma_b / sigma_now, 1 / r_max, r_max)
    d = np.clip((mu_b - mu) / sigma_now, -d_max, d_max)
    mu = mu + (1 - momentum) * (mu_b - mu)
    sigma = sigma + (1 - momentum) * (x.std((0, 1)) - sigma)
    return (x - mu_b) / sigma_b * r + d, mu, sigma


@pytest.mark.parametrize(("r_max", "d_max"), [(1.0, 0.0), (1.2, 0.3), (1e9, 1e9)])
@pytest.mark.parametrize("fast", [True, False])
def test_steps_are_those_of_the_paper(r_max, d_max, fast):
    layer = BatchRenorm(
        use_running_average=False,
        r_max=r_max,
        d_max=d_max,
        momentum=0.8,
        use_fast_variance=fast,
    )
    mu, sigma = np.zeros(3), np.ones(3)
    variables = layer.init(jax.random.key(0), batches(1)[0])
    for step, x in enumerate(batches(5)):
        y, variables = train(layer, variables, x)
        expected, mu, sigma = by_definition(x, mu, sigma, r_max, d_max, 0.8)
        close(y, expected)
        close(variables["batch_stats"]["mean"], mu)
        close(variables["batch_stats"]["var"], sigma**2)
        assert int(variables["batch_stats"]["steps"]) == step + 1


def test_a_batch_that_is_not_finite_leaves_the_averages():
    layer = BatchRenorm(use_running_average=False, r_max=3.0, d_max=5.0)
    x = batches(1)[0]
    _, before = train(layer, layer.init(jax.random.key(0), x), x)
    _, after = train(layer, before, x.at[0, 0, 1].set(jnp.nan))
    for name in ("mean", "var"):
        old, new = (np.asarray(v["batch_stats"][name]) for v in (before, after))
        assert np.isfinite(new).all()
        assert old[1] == new[1]
        assert old[0] != new[0]


def test_without_room_it_is_batch_normalization():
    x = batches(1)[0]
    layers = (
        BatchRenorm(use_running_average=False, r_max=1.0, d_max=0.0),
        nn.BatchNorm(use_running_average=False),
    )

    def loss(layer, variables, x):
        y, _ = train(layer, variables, x)
        return jnp.sum(jnp.sin(y)), y

    found, expected = (
        jax.value_and_grad(functools.partial(loss, layer), argnums=1, has_aux=True)(
            layer.init(jax.random.key(0), x), x
        )
        for layer in layers
    )
    close(found[0][1], expected[0][1])
    # flax's one-pass variance is the less exact side.
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-5)


def test_where_no_limit_binds_training_normalizes_as_inference_does():
    layer = BatchRenorm(r_max=1e9, d_max=1e9)
    first, x = batches(2)
    variables = layer.init(jax.random.key(0), first, use_running_average=False)
    y, _ = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    close(y, layer.apply(variables, x, use_running_average=True))


def test_the_schedule_is_of_the_steps_that_were_seen():
    layer = BatchRenorm(
        use_running_average=False,
        r_max=optax.linear_schedule(1.0, 3.0, 1, 1),
        d_max=optax.linear_schedule(0.0, 5.0, 1, 1),
    )
    mu, sigma = np.zeros(3), np.ones(3)
    variables = layer.init(jax.random.key(0), batches(1)[0])
    for x, r_max, d_max in zip(batches(3), (1.0, 1.0, 3.0), (0.0, 0.0, 5.0), strict=True):
        y, variables = train(layer, variables, x)
        expected, mu, sigma = by_definition(x, mu, sigma, r_max, d_max, 0.99)
        close(y, expected)


def test_devices_pool_their_averages_and_keep_the_count_of_steps():
    layer = BatchRenorm(use_running_average=False, momentum=0.0)
    x = batches(2)
    variables = layer.init(jax.random.key(0), x[0])
    each = [train(layer, variables, one)[1]["batch_stats"] for one in x]
    pooled = pool_batch_stats(jax.tree.map(lambda *leaves: jnp.stack(leaves), *each))
    together = np.float64(jnp.concatenate(x))
    close(pooled["mean"], together.mean((0, 1)))
    close(pooled["var"], together.var((0, 1)))
    assert pooled["steps"].dtype == jnp.int32
    assert int(pooled["steps"]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r_max": 0.5}, "r_max must be 1 or more, got 0.5"),
        ({"d_max": -1.0}, "d_max must be 0 or more, got -1.0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"axis_index_groups": ((0, 1),)}, "give axis_name too"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BatchRenorm(**options)
