"""Public networks of other styles, as their authors wrote them: with `norm=` swapped, they train.

In the fewest lines that keep the structure of Flax implementations: DenseNet (Huang et al., arXiv
1608.06993), EfficientNet (Tan and Le, arXiv 1905.11946) and a ResNet v2 (He et al., arXiv
1603.05027, as in Flax's and Haiku's examples).
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mbn_jax import MemorizedBatchNorm, TrainState, make_train_step

pytestmark = pytest.mark.slow

CLASSES = 3


class DenseNet(nn.Module):
    """Every layer sees the outputs of all earlier ones of its block."""

    norm: object = nn.BatchNorm
    growth: int = 4
    blocks: tuple = (1, 1)

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(self.norm, use_running_average=not train)
        conv = functools.partial(nn.Conv, use_bias=False)
        x = conv(2 * self.growth, (3, 3))(x)
        for number, layers in enumerate(self.blocks):
            if number:  # Transition: half the channels, half the size.
                x = conv(x.shape[-1] // 2, (1, 1))(nn.relu(norm()(x)))
                x = nn.avg_pool(x, (2, 2), (2, 2))
            for _ in range(layers):
                y = conv(4 * self.growth, (1, 1))(nn.relu(norm()(x)))
                y = conv(self.growth, (3, 3))(nn.relu(norm()(y)))
                x = jnp.concatenate([x, nn.Dropout(0.1, deterministic=not train)(y)], -1)
        return nn.Dense(CLASSES)(nn.relu(norm()(x)).mean((1, 2)))


class MBConv(nn.Module):
    """Expand, depthwise convolution, squeeze and excite, project; residual where shapes allow."""

    features: int
    strides: int
    norm: object

    @nn.compact
    def __call__(self, x):
        inputs, width = x, 4 * x.shape[-1]
        x = nn.swish(self.norm(name="expand_bn")(nn.Conv(width, (1, 1), use_bias=False)(x)))
        x = nn.Conv(
            width, (3, 3), self.strides, use_bias=False, feature_group_count=width, name="depthwise"
        )(x)
        x = nn.swish(self.norm(name="depthwise_bn")(x))
        squeezed = nn.swish(nn.Conv(width // 4, (1, 1))(x.mean((1, 2), keepdims=True)))
        x = x * nn.sigmoid(nn.Conv(width, (1, 1))(squeezed))
        x = self.norm(name="project_bn")(nn.Conv(self.features, (1, 1), use_bias=False)(x))
        return x + inputs if x.shape == inputs.shape else x


class EfficientNet(nn.Module):
    norm: object = nn.BatchNorm
    stages: tuple = ((4, 1), (6, 2))

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(self.norm, use_running_average=not train)
        x = nn.swish(norm(name="stem_bn")(nn.Conv(4, (3, 3), 2, use_bias=False)(x)))
        for features, strides in self.stages:
            x = MBConv(features, strides, norm)(x)
        x = nn.swish(norm(name="head_bn")(nn.Conv(12, (1, 1), use_bias=False)(x)))
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class PreActivationResNet(nn.Module):
    """The norm comes before the convolution, and the first one before the shortcut."""

    norm: object = nn.BatchNorm
    widths: tuple = (4, 8)

    def setup(self):
        self.stem = nn.Conv(self.widths[0], (3, 3), use_bias=False)
        self.blocks = [
            (
                self.norm(),
                nn.Conv(width, (1, 1), strides, use_bias=False),
                nn.Conv(width, (3, 3), strides, use_bias=False),
                self.norm(scale_init=nn.initializers.zeros),
                nn.Conv(width, (3, 3), use_bias=False),
            )
            for strides, width in enumerate(self.widths, start=1)
        ]
        self.last, self.classifier = self.norm(), nn.Dense(CLASSES)

    def __call__(self, x, train):
        x = self.stem(x)
        for norm_0, shortcut, conv_0, norm_1, conv_1 in self.blocks:
            y = nn.relu(norm_0(x, use_running_average=not train))
            residual = shortcut(y)
            y = nn.relu(norm_1(conv_0(y), use_running_average=not train))
            x = residual + conv_1(y)
        x = nn.relu(self.last(x, use_running_average=not train))
        return self.classifier(x.mean((1, 2)))


NETWORKS = (DenseNet, EfficientNet, PreActivationResNet)
MODES = {
    "off": {"double_forward": "off"},
    "rewrite": {"double_forward": "rewrite"},
    "transport": {"double_forward": "transport"},
    "a part": {"double_forward": "transport", "double_forward_fraction": 0.5},
}
memorized = functools.partial(MemorizedBatchNorm, memory_size=4)
rng = np.random.default_rng(0)
IMAGES = jnp.asarray(rng.normal(size=(4, 8, 8, 3)), jnp.float32)
LABELS = jnp.asarray(rng.integers(0, CLASSES, 4))


def loss_fn(apply, batch):
    images, labels = batch
    logits, updates = apply(images, train=True)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), ({}, updates)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_public_network_trains_in_every_mode(network):
    model, tx = network(norm=memorized), optax.sgd(0.1, 0.9)
    variables = jax.jit(functools.partial(model.init, train=False))(jax.random.key(0), IMAGES)
    # The swap leaves the parameters of the network as they were.
    init = functools.partial(network().init, train=False)
    before = jax.eval_shape(init, jax.random.key(0), IMAGES)
    renamed = [x.shape for x in jax.tree.leaves(variables["params"])]
    assert sorted(renamed) == sorted(x.shape for x in jax.tree.leaves(before["params"]))
    losses = {}
    for mode, options in MODES.items():
        state = TrainState.create(variables, tx, jax.random.key(1))
        step = jax.jit(make_train_step(model.apply, tx, loss_fn, **options))
        losses[mode] = []
        for _ in range(4):
            state, metrics = step(state, (IMAGES, LABELS))
            losses[mode].append(float(metrics["loss"]))
        assert np.isfinite(losses[mode]).all()
        assert losses[mode][-1] < losses[mode][0]
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.batch_stats))
    # The first step of all modes is the same; what they leave behind for the next is not.
    assert len({loss[0] for loss in losses.values()}) <= 2  # In another program, another rounding.
    assert len({loss[-1] for loss in losses.values()}) == len(MODES)
