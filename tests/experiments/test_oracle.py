"""The norm of experiments/layers/oracle.py: its two ends are batch normalization."""

import functools
import pathlib
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbn_jax import VirtualBatches

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from experiments.layers.oracle import OracleBatchNorm


def results(layer):
    """Outputs, gradient and statistics of a training call."""
    x, weights = jax.random.normal(jax.random.key(0), (2, 8, 3, 3, 4)) + 1
    variables = layer.init(jax.random.key(1), x)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(x):
        y, updates = layer.apply(variables, x, mutable=["batch_stats"])
        return (y * weights).sum(), (y, updates["batch_stats"])

    (_, (y, stats)), gradient = loss(x)
    return y, gradient, stats


@pytest.mark.parametrize("size", [8, 2])
def test_equal_sizes_are_batch_normalization_over_groups(size):
    y, gradient, _ = results(OracleBatchNorm(False, size, size))
    expected = results(VirtualBatches(nn.BatchNorm, 8 // size, False))
    # flax's one-pass variance is the less exact side.
    np.testing.assert_allclose(y, expected[0], atol=1e-5)
    np.testing.assert_allclose(gradient, expected[1], atol=1e-4)


def test_forward_and_backward_statistics_are_apart():
    y, gradient, stats = results(OracleBatchNorm(False, 8, 2))
    whole, whole_gradient, expected = results(OracleBatchNorm(False, 8, 8))
    np.testing.assert_allclose(y, whole, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, stats, expected)
    assert np.abs(gradient - whole_gradient).max() > 0.1
    # Over its own group, a gradient of batch normalization has mean 0 and no part along x.
    np.testing.assert_allclose(gradient.reshape(4, -1, 4).mean(1), 0, atol=1e-6)
    constants = results(OracleBatchNorm(False, 8, None))[1]
    assert np.abs(constants.reshape(4, -1, 4).mean(1)).max() > 0.01


def test_without_centering_the_root_mean_square_is_one():
    y, _, _ = results(OracleBatchNorm(False, 0, 0, center=False))
    np.testing.assert_allclose(jnp.square(y).mean((0, 1, 2)), 1, rtol=1e-4)
    assert np.abs(y.mean((0, 1, 2))).max() > 0.1
