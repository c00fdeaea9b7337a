"""Memorized Batch Normalization in float64 NumPy, one slot and one loop at a time.

Written from the definitions, not from the package: the tests compare the package to it.
"""

import numpy as np


def _wide(x):
    x = np.asarray(x)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def feature_axes(ndim, axis=-1):
    """The features' axes, none of them negative, in order."""
    axes = (axis,) if isinstance(axis, int) else axis
    return tuple(sorted(a % ndim for a in axes))


def per_feature(values, ndim, axis=-1):
    """Reshape feature statistics so that they line up with an input of `ndim` axes."""
    values, features = np.asarray(values), feature_axes(ndim, axis)
    shape = iter(values.shape)
    return values.reshape([next(shape) if i in features else 1 for i in range(ndim)])


def moments(x, axis=-1, mask=None):
    """Mean, biased variance and count of each feature, over the unmasked elements."""
    x = _wide(x)
    keep = np.broadcast_to(True if mask is None else mask, x.shape)
    features = feature_axes(x.ndim, axis)
    shape = tuple(x.shape[a] for a in features)
    x, keep = (
        np.moveaxis(values, features, range(-len(features), 0)).reshape(-1, int(np.prod(shape)))
        for values in (x, keep)
    )
    mean, var, count = np.zeros(x.shape[1], x.dtype), np.zeros(x.shape[1]), np.zeros(x.shape[1])
    for c in range(x.shape[1]):
        values = x[keep[:, c], c]
        count[c] = len(values)
        if len(values):
            mean[c] = values.sum() / len(values)
            var[c] = (np.abs(values - mean[c]) ** 2).sum() / len(values)
    return mean.reshape(shape), var.reshape(shape), count.reshape(shape)


def weights(filled, decay=1.0):
    """Weights of the `filled` newest slots: powers of `decay` that sum to one."""
    powers = [decay**age for age in range(filled)]
    return [power / sum(powers) for power in powers]


def total_variance(parts, means, variances):
    """The law of total variance: statistics of a mixture with the weights `parts`."""
    mean = sum(a * m for a, m in zip(parts, means, strict=True))
    var = sum(
        a * (v + np.abs(m - mean) ** 2) for a, m, v in zip(parts, means, variances, strict=True)
    )
    return mean, var


class ReferenceMBN:
    """A layer's memory: `slots` holds (mean, variance), newest first."""

    def __init__(self, memory_size=8, decay=1.0, axis=-1, epsilon=1e-5):
        self.memory_size, self.decay, self.axis, self.epsilon = memory_size, decay, axis, epsilon
        self.slots = []

    def pooled(self):
        if not self.slots:
            return 0.0, 1.0
        means, variances = zip(*self.slots, strict=True)
        return total_variance(weights(len(self.slots), self.decay), means, variances)

    def train(self, x, mask=None, scale=1.0, bias=0.0):
        """Push the batch's moments unless nothing is unmasked, then normalize by the pool."""
        mean, var, count = moments(x, self.axis, mask)
        if count.any():
            self.slots = [(mean, var), *self.slots][: self.memory_size]
        return self.infer(x, scale, bias)

    def infer(self, x, scale=1.0, bias=0.0):
        x = _wide(x)
        mean, var, scale, bias = (
            per_feature(value, x.ndim, self.axis) if np.ndim(value) else value
            for value in (*self.pooled(), scale, bias)
        )
        return (x - mean) / np.sqrt(var + self.epsilon) * scale + bias


# Unit roundoff of float32 is 6e-8; sums of tens of numbers of size 1 stay within some ten of them.
ROUNDING = 1e-6


def normal(shape, seed=0, mean=0.0, std=1.0, dtype=np.float32):
    x = np.random.default_rng(seed).normal(size=(2, *shape))
    x = x[0] + 1j * x[1] if np.issubdtype(dtype, np.complexfloating) else x[0]
    return (mean + std * x).astype(dtype)


def assert_moments(actual, expected, tolerance=ROUNDING):
    """The mean's error in standard deviations, the variance's relative to itself, exact counts."""
    mean, var, count = (np.asarray(value) for value in expected)
    std = np.sqrt(np.where(var > 0, var, 1))
    assert actual.mean.shape == actual.var.shape == actual.count.shape == mean.shape
    assert np.max(np.abs(np.asarray(actual.mean) - mean) / std) <= tolerance
    assert np.max(np.abs(np.asarray(actual.var) - var) / std**2) <= tolerance
    np.testing.assert_array_equal(actual.count, count)
