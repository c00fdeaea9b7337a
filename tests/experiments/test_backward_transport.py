"""The second backward pass of experiments/scripts/backward_transport.py, and what moves by it."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbn_jax.core.moving_average import BACKWARD_SUMS
from mbn_jax.training.config_files import parse_config, with_fields
from mbn_jax.training.hparams import HParams
from mbn_jax.training.steps import build_train_step, init_state
from mbn_jax.training.task import Task

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "experiments" / "scripts"))

import backward_transport as study  # noqa: E402

FIELDS = {
    "model.features": (4, 4),
    "batch_size": 8,
    "double_forward": "off",
    "norm.name": "moving_average",
    "norm.virtual_batch_size": 2,
    "norm.kwargs.warmup_steps": 1,
}
GROUPS, BATCHES, CHANNELS = 2, 3, 1


@pytest.fixture(scope="module")
def stepped(data_dir):
    """What layers keep after three steps, and a second pass of the third under the same weights."""
    config = parse_config(
        str(ROOT / "configs" / "digits.py"), [f"--config.dataset.data_dir={data_dir}"]
    )
    config = with_fields(config, FIELDS, "the test")
    task = Task.build(config, num_devices=1)
    hparams = HParams.from_config(config).as_arrays()
    rng = np.random.default_rng(0)
    batches = [
        {
            "image": jnp.asarray(rng.normal(size=(8, 8, 8, 1)), jnp.float32),
            "label": jnp.asarray(rng.integers(10, size=8), jnp.int32),
        }
        for _ in range(3)
    ]

    def one_step(state, batch):
        after, _ = build_train_step(task, hparams)(state, batch)
        return after, study.second_pass(task, hparams, state.params, state, batch)

    on_one_device = jax.jit(jax.vmap(one_step, axis_name=study.AXIS_NAME))
    state = jax.tree.map(lambda x: x[None], init_state(task, hparams))
    for batch in batches:
        state, again = on_one_device(state, jax.tree.map(lambda x: x[None], batch))
    return jax.tree.map(lambda x: x[0], (state.batch_stats, *again))


def test_the_second_pass_finds_the_sums_of_the_step_where_nothing_was_updated(stepped):
    kept, written, sums = stepped
    recorded = [
        value
        for path, value in jax.tree_util.tree_leaves_with_path(kept)
        if path[-1].key == BACKWARD_SUMS
    ]
    assert max(float(jnp.abs(x).max()) for x in recorded) > 1e-3
    for found, expected in zip(jax.tree.leaves(sums), recorded, strict=True):
        # Sums of some 500 float32 products, ordered otherwise by the compiler.
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    shifts = jax.tree.map(jnp.subtract, sums, study.recorded_sums(kept, sums))
    for mode in (study.OWN, study.SHARED, study.BOTH):
        moved = study.moved(kept, written, shifts, mode, 1e-5)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
            moved,
            kept,
        )


def layer(forward, sums):
    """What a layer keeps, in two groups, each slot holding the same numbers."""
    shape = (GROUPS, BATCHES, 3, CHANNELS)
    backward = jnp.broadcast_to(jnp.array([1.0, 2.0, 1.0])[:, None], shape)
    return {
        "forward": jnp.broadcast_to(jnp.array([*forward, 1.0])[:, None], shape),
        "backward": backward.at[:, -1].set(0),  # No batch there yet.
        BACKWARD_SUMS: jnp.asarray(sums, jnp.float32)[:, :, None],
    }


@pytest.mark.parametrize(
    ("mode", "shifts"),
    [
        (study.OWN, [[0.5, -0.5], [0.1, 0.1]]),
        (study.SHARED, [[0.3, -0.2], [0.3, -0.2]]),
        (study.BOTH, [[0.3, -0.2], [0.3, -0.2]]),
        (study.NEXT, [[0.3, -0.2], [0.3, -0.2]]),
    ],
)
def test_every_sum_moves_by_the_shift_of_its_mode(mode, shifts):
    before = [[1.0, 2.0, 1.0], [3.0, 4.0, 1.0]]
    after = [[1.5, 1.5, 1.0], [3.1, 4.1, 1.0]]
    kept, again = {"norm": layer((0.0, 4.0), before)}, {"norm": layer((0.5, 5.0), before)}
    sums = {"norm": {BACKWARD_SUMS: jnp.asarray(after)[:, :, None]}}
    shifts_of_sums = jax.tree.map(jnp.subtract, sums, study.recorded_sums(kept, sums))
    moved = study.moved(kept, again, shifts_of_sums, mode, 0.0)["norm"]
    for group, (one, two) in enumerate(shifts):
        slots = moved["backward"][group, :, :, 0]
        expected = [[1 + one, 2 + two, 1]] * (BATCHES - 1) + [[0, 0, 0]]
        np.testing.assert_allclose(slots, expected, rtol=1e-6)
        newest = [before[group][0] + one, before[group][1] + two, 1]
        np.testing.assert_allclose(moved[BACKWARD_SUMS][group, :, 0], newest, rtol=1e-6)
    # Every slot holds the moments of the batch that moved, so it becomes that batch's new ones.
    forward = (0.5, 5.0, 1.0) if mode == study.BOTH else (0.0, 4.0, 1.0)
    np.testing.assert_allclose(
        moved["forward"][..., 0],
        jnp.broadcast_to(jnp.array(forward), (GROUPS, BATCHES, 3)),
        rtol=1e-6,
    )


def test_the_settings_are_members_of_the_sweep():
    assert set(study.SETTINGS) <= set(study.tuned_settings())
