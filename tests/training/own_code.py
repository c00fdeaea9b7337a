"""A network, data, losses, a norm and an optimizer of a user, as a module beside a config file."""

import functools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax

from mbn_jax import MemorizedBatchNorm


class Net(nn.Module):
    """Maps signals `[batch, 6, 2]` to as many numbers."""

    norm: object
    width: int = 4
    widths: tuple = ()

    @nn.compact
    def __call__(self, x, train):
        for width in (self.width, *self.widths):
            x = nn.relu(self.norm(use_running_average=not train)(nn.Dense(width)(x)))
        return nn.Dense(1)(x)[..., 0]


class WithoutTrain(nn.Module):
    norm: object

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(self.norm(use_running_average=True)(x))[..., 0]


class IgnoresNorm(nn.Module):
    norm: object

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(1)(nn.BatchNorm(use_running_average=not train)(x))[..., 0]


class WithoutNorm(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(1)(x)[..., 0]


class Fails(Net):
    @nn.compact
    def __call__(self, x, train):
        return x + {}["no such key"]


SIZES = {"train": 64, "test": 22}


class Signals:
    """Random signals and their sums, with a weight for each of their points."""

    def __init__(self, split, data_dir, scale=1.0):
        rng = np.random.default_rng(sorted(SIZES).index(split))
        x = rng.normal(size=(SIZES[split], 6, 2))
        self._x, self._y = scale * x, x.sum(-1)
        self._weight = rng.integers(0, 3, (SIZES[split], 6))

    def __len__(self):
        return len(self._x)

    def __getitem__(self, index):
        return {"x": self._x[index], "y": self._y[index], "weight": self._weight[index]}


def uneven(split, data_dir):
    """A source whose third example has another shape."""
    source = [Signals(split, data_dir)[i] for i in range(4)]
    source[2] = {**source[2], "x": np.zeros((5, 2))}
    return source


def the_same(split, data_dir):
    """A source that forgets about the split."""
    return Signals("train", data_dir)


def no_source(split, data_dir):
    return 3


def arrays(split, data_dir):
    """A source of arrays in place of dicts."""
    return [np.zeros(2)] * 4


def texts(split, data_dir):
    return [{"x": np.zeros(2), "text": "a text"}] * 4


class Unreadable(Signals):
    """A source whose fourth example cannot be read."""

    def __getitem__(self, index):
        if index == 3:
            raise OSError("no such\nrecord")
        return super().__getitem__(index)


class Squares:
    """Weighted squared errors, and the share of the points that are above a limit."""

    def __init__(self, limit=1.0):
        self.limit = limit

    def __call__(self, apply, batch):
        y, updates = apply(batch["x"], train=True)
        loss, (above, count) = self._measured(y, batch)
        return loss.mean(), ({"above": above.sum() / jnp.maximum(count.sum(), 1)}, updates)

    def eval_metrics(self, apply, batch):
        loss, ratio = self._measured(apply(batch["x"], train=False), batch)
        return {"loss": loss, "above": ratio}

    def _measured(self, y, batch):
        weight = batch["weight"]
        loss = (weight * (y - batch["y"]) ** 2).mean(-1)
        return loss, ((weight * (jnp.abs(y) > self.limit)).sum(-1), weight.sum(-1))


class MeanOnly(Squares):
    def eval_metrics(self, apply, batch):
        return {"loss": super().eval_metrics(apply, batch)["loss"].mean()}


class NoUpdates(Squares):
    def __call__(self, apply, batch):
        return super().__call__(apply, batch)[0]


def plain_loss(apply, batch):
    return 0.0


class MyNorm(MemorizedBatchNorm):
    """A norm of the user's that is a memory."""


class SlowNorm(nn.Module):
    """A norm of the user's with moving averages, and none of this package's layers."""

    use_running_average: bool

    @nn.compact
    def __call__(self, x):
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
        var = self.variable("batch_stats", "var", jnp.ones, x.shape[-1:])
        if not self.use_running_average:
            axes = tuple(range(x.ndim - 1))
            mean.value = 0.99 * mean.value + 0.01 * x.mean(axes)
            var.value = 0.99 * var.value + 0.01 * x.var(axes)
        axes = tuple(range(x.ndim - 1))
        return (x - jnp.expand_dims(mean.value, axes)) / jnp.expand_dims(var.value + 1e-3, axes)


def slow_norm(use_running_average):
    return SlowNorm(use_running_average)


def momentum_sgd(learning_rate, momentum=0.5):
    return optax.sgd(learning_rate, momentum)


rmsprop = functools.partial(optax.rmsprop, decay=0.9)
NOT_CALLABLE = 3
