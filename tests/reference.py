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
