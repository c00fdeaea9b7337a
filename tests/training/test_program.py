"""What a program compiles ahead, and how."""

import functools

import jax
import pytest
from runs import assert_same_bits

from mbn_jax.training.config import default_config
from mbn_jax.training.hparams import HParams
from mbn_jax.training.passes import compile_start, train_pass
from mbn_jax.training.program import QUICKLY, Programs
from mbn_jax.training.start import find_start
from mbn_jax.training.steps import init_state

pytestmark = pytest.mark.slow


@pytest.fixture
def config(data_dir):
    config = default_config()
    config.dataset.data_dir = data_dir
    config.dataset.train_split = "train[:640]"
    config.batch_size = 16
    config.num_epochs = 1.0
    config.model.features = (8, 8)
    return config


@pytest.mark.parametrize("model", ["convnet", "cifar_resnet8"])
def test_a_state_that_is_compiled_quickly_has_the_same_bits(config, model):
    config.model.name = model
    function = functools.partial(init_state, Programs().task(config))
    lowered = jax.jit(function).lower(HParams.from_config(config).as_arrays())

    def state(**options):
        # As a user's process compiles, which has not the flags of the tests.
        compiled = lowered.compile({"xla_cpu_use_fusion_emitters": True, **options})
        state = compiled(HParams.from_config(config).as_arrays())
        return jax.device_get(state.replace(key=jax.random.key_data(state.key)))

    assert_same_bits(state(**QUICKLY), state(xla_backend_optimization_level=3))


@pytest.mark.parametrize("fields", [{}, {"dataset.max_bytes_in_memory": 0}])
@pytest.mark.parametrize("steps_per_dispatch", [1, 4])
def test_what_is_compiled_ahead_is_what_trains(config, fields, steps_per_dispatch, tmp_path):
    config.update_from_flattened_dict(fields)
    config.steps_per_dispatch = steps_per_dispatch
    programs = Programs()
    program = programs.get(config)
    compile_start(program, config)
    assert programs.step_compilations == 1
    state = find_start(program, config, tmp_path).state
    steps = [dispatch.step for dispatch in train_pass(program, config, state, 8)]
    assert steps[-1] == 8
    assert programs.step_compilations == 1
