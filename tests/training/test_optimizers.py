"""Schedules and optimizers by configuration."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mbn_jax.training.config import default_config
from mbn_jax.training.hparams import HParams
from mbn_jax.training.optimizers import build_optimizer, build_schedule


@pytest.fixture
def config():
    config = default_config()
    config.optimizer.learning_rate = 0.4
    config.optimizer.momentum = 0.0
    return config


def rates(config, total_steps=100):
    hparams = HParams.from_config(config)
    schedule = build_schedule(config, hparams, steps_per_epoch=10, total_steps=total_steps)
    return np.array([float(schedule(step)) for step in range(total_steps + 1)])


def test_cosine_goes_from_the_rate_to_0(config):
    expected = 0.4 * (1 + np.cos(np.pi * np.arange(101) / 100)) / 2
    np.testing.assert_allclose(rates(config), expected, atol=1e-7)  # Float32 rates below 1.


def test_warm_up_rises_to_the_rate_without_a_step_at_0(config):
    config.schedule.warmup_epochs = 1.0
    config.schedule.name = "constant"
    expected = np.append(0.4 * np.arange(1, 11) / 11, np.full(91, 0.4))
    np.testing.assert_allclose(rates(config), expected, rtol=1e-6)


@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_steps_fall_where_told(config, warmup):
    config.schedule.name = "step"
    config.schedule.warmup_epochs = warmup
    config.schedule.step_epochs = (5.0, 7.5)
    found = rates(config)[[49, 52, 74, 77, 100]]
    np.testing.assert_allclose(found, [0.4, 0.04, 0.04, 0.004, 0.004], rtol=1e-5)


def updates(config, gradient=1.0):
    params = {"conv": {"kernel": jnp.full(2, 2.0)}, "norm": {"scale": jnp.full(2, 2.0)}}
    tx = build_optimizer(config, HParams.from_config(config), optax.constant_schedule(0.1))
    grads = {"conv": {"kernel": jnp.full(2, gradient)}, "norm": {"scale": jnp.full(2, gradient)}}
    new, _ = tx.update(grads, tx.init(params), params)
    return float(new["conv"]["kernel"][0]), float(new["norm"]["scale"][0])


def test_weight_decay_spares_norm_parameters_unless_asked(config):
    config.optimizer.weight_decay = 0.5
    assert updates(config) == pytest.approx((-0.1 * (1 + 0.5 * 2), -0.1))
    config.optimizer.decay_norm_params = True
    assert updates(config) == pytest.approx((-0.2, -0.2))


def test_clipping_bounds_the_norm_of_the_whole_gradient(config):
    config.gradient_clip_norm = 1.0
    # Four entries of 3: norm 6, clipped to entries of 1/2.
    assert updates(config, gradient=3.0) == pytest.approx((-0.05, -0.05))


def test_adam_decouples_weight_decay(config):
    config.optimizer.name = "adam"
    config.optimizer.weight_decay = 0.5
    # Adam's first step is the rate in size, whatever the gradient; 1e-8 of it is Adam's epsilon.
    assert updates(config) == pytest.approx((-0.1 - 0.1 * 0.5 * 2, -0.1), rel=1e-5)
