"""The measured shift and error against what they are by definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbn_jax.parallel.devices import replicate
from mbn_jax.training.config import default_config
from mbn_jax.training.loop import train
from mbn_jax.training.passes import batch_stacks
from mbn_jax.training.program import Programs
from mbn_jax.training.reporting import read_metrics
from mbn_jax.training.shift import measure_shift
from mbn_jax.training.steps import train_steps

pytestmark = pytest.mark.slow


@pytest.fixture
def config(data_dir):
    config = default_config()
    config.dataset.data_dir = data_dir
    config.dataset.train_split = "train[:160]"
    config.dataset.test_split = "test[:40]"
    config.batch_size = 16
    config.num_epochs = 2.0
    config.model.features = (4, 6)
    config.schedule.name = "constant"
    config.norm.decay = 1.0
    return config


def moments(x):
    x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    return x.mean(0), x.var(0)


def after_steps(config, devices, steps):
    """Returns the program, the state after some steps, and the stack with the next batch."""
    program = Programs(devices).get(config)
    stack, _ = next(batch_stacks(program, config, 0))
    state = replicate(program.init_state(config), devices)
    hparams = program.hparams(config)
    data = program.data(program.task.train)
    for _ in range(steps):
        state, _ = program.compiled(train_steps, num_steps=1)(state, hparams, data, stack)
    return program, state, hparams, data, stack


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("norm", ["memorized", "batch"])
def test_shift_of_the_first_layer_by_hand(config, count, norm):
    config.norm.name = norm
    devices = jax.devices()[:count]
    program, state, hparams, data, stack = after_steps(config, devices, 3)
    measured = measure_shift(program, config, state, stack)
    task = program.task
    images = task.standardized(jnp.asarray(task.train.in_memory["image"]))
    batch = images[task.order(config.seed).steps(3, 4)[0]]

    def first_inputs(kernel):
        return jax.lax.conv_general_dilated(
            batch, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    # Copied: the next step is given their buffers.
    before = jax.device_get(state)
    state, _ = program.compiled(train_steps, num_steps=1)(state, hparams, data, stack)
    m, v = moments(first_inputs(before.params["Conv_0"]["kernel"][0]))
    m_after, v_after = moments(first_inputs(state.params["Conv_0"]["kernel"][0]))
    layer = "MemorizedBatchNorm_0" if norm == "memorized" else "BatchNorm_0"
    stats = jax.tree.map(lambda x: np.float64(x[0]), before.batch_stats[layer])
    unit = stats["var"]
    if norm == "memorized":  # Decay 1, three batches of equal size.
        unit = stats["var"][:3].mean(0) + stats["mean"][:3].var(0)
    v, v_after, unit = v + 1e-5, v_after + 1e-5, unit + 1e-5
    moved = (m_after - m) ** 2
    std = np.sqrt(((np.sqrt(v_after) - np.sqrt(v)) ** 2 / unit).mean())
    kl = (0.5 * (np.log(v / v_after) + (v_after + moved) / v - 1)).mean()
    # Float32 differences of means, on one device or eight.
    assert measured[f"shift_mean/{layer}"] == pytest.approx(np.sqrt((moved / unit).mean()), 1e-3)
    assert measured[f"shift_std/{layer}"] == pytest.approx(std, 1e-3)
    assert measured[f"shift_kl/{layer}"] == pytest.approx(kl, 1e-2)
    layers = [measured[f"shift_mean/{layer[:-1]}{i}"] for i in range(2)]
    assert measured["shift_mean"] == pytest.approx(np.mean(layers))


@pytest.mark.parametrize("mode", ["rewrite", "transport"])
def test_shift_of_a_deep_layer_is_that_of_the_second_forward(config, mode):
    config.double_forward = mode
    config.optimizer.learning_rate = 0.5
    devices = jax.devices()[:1]
    program, state, hparams, data, stack = after_steps(config, devices, 3)
    measured = measure_shift(program, config, state, stack)
    before = jax.device_get(state)
    state, _ = program.compiled(train_steps, num_steps=1)(state, hparams, data, stack)
    # Its statistics after the update are those that the step itself pushed.
    layer = "MemorizedBatchNorm_1"
    old, new = (jax.tree.map(lambda x: x[0], s.batch_stats[layer]) for s in (before, state))
    config.double_forward = "off"  # What the first forward pushes.
    first, _ = (
        Programs(devices)
        .get(config)
        .compiled(train_steps, num_steps=1)(before, hparams, data, stack)
    )
    first = jax.tree.map(lambda x: x[0], first.batch_stats[layer])
    var = old["var"][:3].mean(0) + old["mean"][:3].var(0) + 1e-5
    moved = np.sqrt((np.square(new["mean"][0] - first["mean"][0]) / var).mean())
    # Float32 differences of means.
    assert measured[f"shift_mean/{layer}"] == pytest.approx(moved, rel=1e-3)


@pytest.mark.parametrize("count", [1, 8])
def test_a_memory_of_the_whole_population_is_without_error(config, count):
    config.optimizer.learning_rate = 1e-30  # The parameters stay.
    config.norm.memory_size = 10  # Ten batches of 16 are all 160 images.
    program, state, *_ = after_steps(config, jax.devices()[:count], 10)
    measured = measure_shift(program, config, state, None)
    # Float32 statistics; the first layer alone does not depend on other layers' statistics.
    assert measured["error_mean/MemorizedBatchNorm_0"] < 1e-5
    assert measured["error_log_variance/MemorizedBatchNorm_0"] < 1e-5
    assert not [name for name in measured if name.startswith("shift")]
    config.norm.memory_size = 3
    program, state, *_ = after_steps(config, jax.devices()[:count], 10)
    partial = measure_shift(program, config, state, None)
    images = program.task.standardized(jnp.asarray(program.task.train.in_memory["image"]))
    kernel = state.params["Conv_0"]["kernel"][0]
    inputs = jax.lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    mean, var = moments(inputs)
    seen = program.task.order(config.seed).steps(7, 10).reshape(-1)
    pooled_mean, pooled_var = moments(np.asarray(inputs)[seen])
    error = np.sqrt(((pooled_mean - mean) ** 2 / (var + 1e-5)).mean())
    log_error = np.sqrt((np.log((pooled_var + 1e-5) / (var + 1e-5)) ** 2).mean())
    assert partial["error_mean/MemorizedBatchNorm_0"] == pytest.approx(error, rel=1e-4)
    assert partial["error_log_variance/MemorizedBatchNorm_0"] == pytest.approx(log_error, rel=1e-4)


def test_measuring_changes_nothing_but_the_records(config, tmp_path):
    config.dataset.crop_padding = 1
    config.norm.sync = "local"
    train(config, tmp_path / "plain")
    config.shift.every_steps = 4
    config.shift.layers = "_1$"
    config.shift.examples = 50
    train(config, tmp_path / "measured")

    def records(name):
        return [
            {k: v for k, v in r.items() if k.startswith("test_")}
            for r in read_metrics(tmp_path / name)
            if "test_error" in r
        ]

    assert records("plain") == records("measured")
    found = [r for r in read_metrics(tmp_path / "measured") if "error_mean" in r]
    assert [r["step"] for r in found] == [4, 8, 12, 16, 20]
    # At the end there is no next update to measure.
    assert ["shift_kl" in r for r in found] == [True] * 4 + [False]
    layers = {name.split("/")[1] for r in found for name in r if "/" in name}
    assert layers == {"MemorizedBatchNorm_1"}


def test_without_statistics_there_is_only_the_shift(config, tmp_path):
    config.norm.name = "none"
    config.shift.every_steps = 10
    train(config, tmp_path)
    first = next(r for r in read_metrics(tmp_path) if r["step"] == 10)
    assert first["shift_mean"] > 0
    assert not [name for name in first if name.startswith("error_")]
