"""Networks: as large as published, blind to their norm, computing in the dtype asked for."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbn_jax import MemorizedBatchNorm
from mbn_jax.models import MODELS, build_model
from mbn_jax.models.convolution import centered, standardized
from mbn_jax.training.config import default_config
from mbn_jax.training.hparams import HParams
from mbn_jax.training.norms import LAYERS, NORMS, build_norm

pytestmark = pytest.mark.slow


def norm_of(config):
    return build_norm(config, HParams.from_config(config), 1, 100)


def variables_of(model, size, channels=3):
    images = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    init = functools.partial(model.init, train=False)
    return jax.eval_shape(init, jax.random.key(0), images)


# Parameters: He et al. 2016, table 6 (0.27 M, 0.46 M, 0.66 M, 0.85 M, 1.7 M); the ImageNet ones
# (11.69 M, 21.80 M, 25.56 M) and VGG-16 with norms and one classifier layer as torchvision counts.
@pytest.mark.parametrize(
    ("name", "size", "classes", "params"),
    [
        ("cifar_resnet20", 32, 10, 269_722),
        ("cifar_resnet32", 32, 10, 464_154),
        ("cifar_resnet44", 32, 10, 658_586),
        ("cifar_resnet56", 32, 10, 853_018),
        ("cifar_resnet110", 32, 10, 1_727_962),
        ("resnet18", 224, 1000, 11_689_512),
        ("resnet34", 224, 1000, 21_797_672),
        ("resnet50", 224, 1000, 25_557_032),
        # Without the biases of the convolutions, which the norms make idle.
        ("vgg16", 32, 10, 14_728_266 - 4_224),
    ],
)
def test_parameters_are_those_published(name, size, classes, params):
    config = default_config()
    config.model.name = name
    variables = variables_of(build_model(config, num_classes=classes, norm=nn.BatchNorm), size)
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == params


ONE_OF_EACH_KIND = ("convnet", "cifar_resnet8", "resnet18", "resnet50", "vgg16")


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        *itertools.product(ONE_OF_EACH_KIND, NORMS),
        *((name, "memorized") for name in MODELS if name not in ONE_OF_EACH_KIND),
    ],
)
def test_every_network_takes_every_norm(name, norm):
    config = default_config()
    config.model.name, config.norm.name, config.norm.sync = name, norm, "local"
    config.model.dtype = "bfloat16"
    config.model.zero_init_last_scale = True
    model = build_model(config, num_classes=7, norm=norm_of(config))
    variables = variables_of(model, 32)
    seen = []

    def spy(call, args, kwargs, context):
        if isinstance(context.module, LAYERS) and context.method_name == "__call__":
            seen.append(args[0].dtype)
        return call(*args, **kwargs)

    def forward(variables, images):
        with nn.intercept_methods(spy):
            return model.apply(variables, images, train=True, mutable=["batch_stats"])

    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    logits, updates = jax.eval_shape(forward, variables, images)
    assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)
    assert set(seen) == {jnp.dtype("bfloat16")}
    kept = [x.dtype for x in jax.tree.leaves((variables["params"], updates))]
    assert {d for d in kept if jnp.issubdtype(d, jnp.inexact)} == {jnp.dtype("float32")}
    # No network knows its norm: as many layers, whichever it is.
    config.norm.name = "none"
    plain = build_model(config, num_classes=7, norm=norm_of(config))
    count = len(jax.tree.leaves(variables_of(plain, 32)["params"]))
    assert count == len(jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize("name", ["convnet", "cifar_resnet8", "vgg16"])
def test_a_network_that_keeps_less_tells_its_costs(name):
    """Flax asks for the names of the functions to count operations in."""
    config = default_config()
    config.model.name, config.model.remat = name, True
    model = build_model(config, num_classes=3, norm=nn.BatchNorm)
    images = jnp.ones((1, 32, 32, 3))
    shown = model.tabulate(jax.random.key(0), images, train=False, compute_flops=True)
    assert "flops" in shown


@pytest.mark.parametrize("name", ["cifar_resnet8", "resnet18", "resnet50"])
def test_with_the_last_scale_at_zero_a_block_starts_as_its_shortcut(name):
    config = default_config()
    config.model.name = name
    config.model.zero_init_last_scale = True
    norm = functools.partial(MemorizedBatchNorm, memory_size=2)
    model = build_model(config, num_classes=3, norm=norm)
    images = jnp.ones((2, 32, 32, 3))
    variables = model.init(jax.random.key(0), images, train=False)
    _, intermediates = model.apply(variables, images, train=False, capture_intermediates=True)
    blocks = {k: v for k, v in intermediates["intermediates"].items() if "Block" in k}
    first = blocks[min(blocks)]
    last = max(k for k in first if k.startswith("MemorizedBatchNorm") and k[-1] in "12")
    scales = [
        layer["scale"]
        for block, layers in variables["params"].items()
        if "Block" in block
        for name_, layer in layers.items()
        if name_ == ("MemorizedBatchNorm_1" if "Basic" in block else "MemorizedBatchNorm_2")
    ]
    assert len(scales) == sum(model.stage_sizes)
    assert all((scale == 0).all() for scale in scales)
    assert (first[last]["__call__"][0] == 0).all()


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_kernels_are_changed_where_they_are_used_and_not_where_they_are_kept(name):
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))

    def init_and_apply(conv):
        config = default_config()
        config.model.name, config.model.conv = name, conv
        model = build_model(config, num_classes=3, norm=nn.BatchNorm)
        variables = model.init(jax.random.key(0), images, train=False)
        return variables, jax.jit(functools.partial(model.apply, train=False))

    variables, plain = init_and_apply("plain")
    unchanged = plain(variables, images)
    for conv, change in {"centered": centered, "standardized": standardized}.items():
        kept, apply = init_and_apply(conv)
        jax.tree.map(np.testing.assert_array_equal, kept, variables)
        logits = apply(variables, images)
        by_hand = jax.tree.map(lambda x, change=change: change(x) if x.ndim == 4 else x, variables)
        # The same arithmetic, up to how the compiler fuses it.
        np.testing.assert_allclose(logits, plain(by_hand, images), rtol=1e-4, atol=1e-4)
        assert not np.allclose(logits, unchanged, rtol=1e-2)


def test_kernels_are_centered_and_standardized_as_numpy_does_it():
    kernel = np.random.default_rng(0).normal(2, 3, size=(3, 3, 4, 5))
    mean, std = kernel.mean((0, 1, 2)), kernel.std((0, 1, 2))
    found = centered(jnp.float32(kernel)), standardized(jnp.float32(kernel))
    np.testing.assert_allclose(found[0], kernel - mean, atol=1e-5)
    np.testing.assert_allclose(found[1], (kernel - mean) / std / 6, atol=1e-6)
