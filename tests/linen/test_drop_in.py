"""`MemorizedBatchNorm` where `BatchNorm` stood: options, precision policies, JAX's strict modes."""

import functools
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export
from stepping import Net, batches, loss_fn, memorized

from mbn_jax import BatchRenorm, MemorizedBatchNorm, TrainState, VirtualBatches, make_train_step

MODES = ("off", "rewrite", "transport")
NORMS = {
    "memorized": memorized,
    "two_pass": functools.partial(memorized, use_fast_variance=False),
    "through": functools.partial(memorized, gradient="through"),
    "endless": functools.partial(MemorizedBatchNorm, memory_size=None),
    "schedule": functools.partial(
        MemorizedBatchNorm, memory_capacity=4, memory_size=optax.linear_schedule(1, 4, 4)
    ),
    "batch_renorm": BatchRenorm,
    "virtual": functools.partial(VirtualBatches, memorized, 2),
}
every_norm = pytest.mark.parametrize("norm", NORMS)


@pytest.mark.parametrize("norm", [MemorizedBatchNorm, BatchRenorm])
def test_flax_momentum_by_position_sets_no_other_option(norm):
    if norm is BatchRenorm:
        assert norm(True, -1, 0.9).momentum == 0.9
        with pytest.raises(TypeError, match="positional"):
            norm(True, -1, 0.9, 1e-5)
    else:
        with pytest.raises(TypeError, match="positional"):
            norm(True, -1, 0.9)


@every_norm
@pytest.mark.parametrize("double_forward", MODES)
def test_strict_promotion_of_dtypes(norm, double_forward):
    if norm == "batch_renorm" and double_forward == "transport":
        double_forward = "rewrite"  # It has no memory to move.
    x, model, tx = batches(1)[0], Net(NORMS[norm]), optax.sgd(0.1)

    def init_and_step(x):
        variables = model.init(jax.random.key(0), x, train=False)
        state = TrainState.create(variables, tx, jax.random.key(1))
        step = make_train_step(model.apply, tx, loss_fn, double_forward=double_forward)
        return step(state, x)[0].replace(key=None)

    expected = jax.jit(init_and_step).lower(x).as_text()
    with jax.numpy_dtype_promotion("strict"):  # The same program: no dtype was promoted.
        assert jax.jit(init_and_step).lower(x).as_text() == expected


@every_norm
@pytest.mark.slow
def test_bfloat16_results_under_strict_promotion(norm):
    layer = NORMS[norm](use_running_average=False)
    x = batches(1)[0].astype(jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        variables = layer.init(jax.random.key(0), x)
        y, _ = layer.apply(variables, x, mutable=["batch_stats"])
    assert jnp.isfinite(y.astype(jnp.float32)).all()


def test_a_policy_that_casts_variables_must_leave_the_memory_alone():
    model, tx, x = Net(), optax.sgd(0.1), batches(1)[0]
    variables = model.init(jax.random.key(0), x, train=False)

    def cast(variables, *args, **options):
        variables = jax.tree.map(lambda v: v.astype(jnp.bfloat16), variables)
        return model.apply(variables, *args, **options)

    state = TrainState.create(variables, tx, jax.random.key(1))
    with pytest.raises(ValueError, match=r"float32, got bfloat16; .*leave batch_stats out"):
        make_train_step(cast, tx, loss_fn)(state, x)
    half = jax.tree.map(lambda v: v.astype(jnp.bfloat16), variables)
    assert jnp.isfinite(model.apply(half, x, train=False)).all()  # For deployment.


@pytest.mark.parametrize("double_forward", MODES)
def test_a_training_step_is_exported_with_a_symbolic_batch(double_forward):
    model, tx, data = Net(), optax.sgd(0.1), batches(1)
    variables = model.init(jax.random.key(0), data[0], train=False)
    state = TrainState.create(variables, tx, jax.random.PRNGKey(1))
    step = jax.jit(make_train_step(model.apply, tx, loss_fn, double_forward=double_forward))
    (size,) = export.symbolic_shape("batch")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    exported = export.export(step)(shapes, jax.ShapeDtypeStruct((size, 5), jnp.float32))
    after, _ = exported.call(state, data[0])
    # In another program.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, after.batch_stats, step(state, data[0])[0].batch_stats)


def test_the_network_is_tabulated():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = memorized(use_running_average=False)
            return norm(norm(x))

    table = Twice().tabulate(
        jax.random.key(0),
        batches(1)[0],
        show_repeated=True,
        compute_flops=True,
        compute_vjp_flops=True,
        console_kwargs={"width": 250, "no_color": True},
    )
    assert table.count("MemorizedBatchNorm_0") >= 2


@pytest.mark.slow
def test_the_step_runs_with_optimized_bytecode():
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import optax; from stepping import Net, batches, run\n"
        "for mode in ('off', 'rewrite', 'transport'):\n"
        "    print(run(Net(), optax.sgd(0.1), batches(2), mode).step)"
    )
    tests = os.path.dirname(os.path.dirname(__file__))
    result = subprocess.run(
        [sys.executable, "-O", "-c", program, tests], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["2", "2", "2"]
