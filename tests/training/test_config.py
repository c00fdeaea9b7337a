"""The table of fields, the rules, and which configurations share compiled programs."""

import numpy as np
import pytest

from mbn_jax.errors import UserError
from mbn_jax.training.checks import validate
from mbn_jax.training.config import FIELDS, default_config, fields, program_key
from mbn_jax.training.config_files import with_fields
from mbn_jax.training.hparams import HPARAM_FIELDS, HParams


def changed(**fields_by_name):
    names = {name.replace("__", "."): value for name, value in fields_by_name.items()}
    return with_fields(default_config(), names, "the test")


def test_the_defaults_keep_all_rules():
    validate(default_config())
    assert set(fields(default_config())) == set(FIELDS)


def test_hparams_hold_the_fields_that_they_name():
    values = dict(zip(HPARAM_FIELDS, (3, 5, 4, 0.5, 0.25, 0.125), strict=True))
    hparams = HParams.from_config(with_fields(default_config(), values, "the test"))
    assert tuple(hparams) == tuple(values.values())
    integers, floats = hparams.as_arrays()[:3], hparams.as_arrays()[3:]
    assert {x.dtype for x in integers} == {np.dtype("int32")}
    assert {x.dtype for x in floats} == {np.dtype("float32")}


def test_runs_share_programs_unless_a_static_fact_differs():
    shared = changed(norm__memory_capacity=64)
    for values in (
        {"seed": 1, "norm__memory_size": 8, "norm__decay": 0.5},
        {"optimizer__learning_rate": 1.0, "optimizer__weight_decay": 0.1},
        {"log_every_steps": 7, "keep_checkpoints": 1},
    ):
        config = changed(**{"norm__memory_capacity": 64, **values})
        assert program_key(config) == program_key(shared)
    schedules = [
        changed(norm__memory_capacity=64, norm__memory_schedule__start_size=size) for size in (2, 3)
    ]
    endless = [
        changed(norm__memory_capacity=capacity, norm__memory_size=0, norm__decay=decay)
        for capacity, decay in ((64, 0.97), (8, 0.5))
    ]
    others = [changed(batch_size=64), changed(norm__epsilon=1e-3), changed(norm__memory_size=8)]
    for same in (schedules, endless):
        assert len({program_key(config) for config in same}) == 1
    keys = {program_key(config) for config in (shared, schedules[0], endless[0], *others)}
    assert len(keys) == 6


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"norm__memory_size": -1}, "norm.memory_size must be at most 65536 and 0 or more, got -1"),
        (
            {"norm__memory_size": 0, "norm__memory_schedule__start_size": 2},
            "got an endless memory",
        ),
        ({"seed": 2**31}, r"seed must be 0 or more and below 2\^31, got 2147483648"),
        (
            {"norm__name": "averaged"},
            "norm.name must be one of memorized, batch, .* got 'averaged'",
        ),
        ({"norm__memory_schedule__end": 1.5}, "0 <= begin < end <= 1, got 0.0 and 1.5"),
        ({"optimizer__weight_decay": float("inf")}, "weight_decay must be 0 or more, got inf"),
    ],
)
def test_impossible_values_are_named(values, message):
    with pytest.raises(UserError, match=message):
        validate(changed(**values))
