"""A norm with a perfect memory: what any memory could reach at most. For experiments only.

    mbn-sweep experiments/ceiling.py --workdir=runs/ceiling

It takes forward and backward statistics apart. In training, each example is normalized by the
statistics of its group of `forward_size` examples, and the gradient is that of batch normalization
over its group of `backward_size` examples (the 'renorm' rule, docs/method.md). With 32 and 2, the
forward pass sees what a perfect memory of 16 batches of two would hold, without age and without
noise, and the backward pass what a batch of two can know.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from mbn_jax.core.gradient import with_gradient
from mbn_jax.core.moments import Moments, around_zero, batch_moments


class OracleBatchNorm(nn.Module):
    """Batch normalization by forward and backward statistics of different groups of examples.

    Equal sizes are batch normalization over groups of that size. For one device; the features are
    the last axis.

    Attributes:
      use_running_average: normalize by moving averages, as at inference.
      forward_size: examples whose statistics normalize, consecutive ones; 0: the batch.
      backward_size: examples whose statistics the gradient goes through; 0: the batch; None: no
        gradient goes through statistics.
      center: False: divide by the root mean square, and subtract nothing.
      momentum: of the moving averages, which follow the whole batch.
      epsilon: added to variances.
    """

    use_running_average: bool
    forward_size: int = 0
    backward_size: int | None = 0
    center: bool = True
    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes `[batch, ..., features]`."""
        shape = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        var = self.variable("batch_stats", "var", jnp.ones, shape)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        wide = (*[1] * (x.ndim - 1), *shape)
        if self.use_running_average or self.is_initializing():
            kept = Moments(mean.value.reshape(wide), var.value.reshape(wide), jnp.ones(wide))
            used = self._about_origin(kept)
        else:
            batch = lax.stop_gradient(self._moments(x, 0))
            mean.value += (1 - self.momentum) * (batch.mean[0].reshape(shape) - mean.value)
            var.value += (1 - self.momentum) * (batch.var[0].reshape(shape) - var.value)
            used = self._with_gradient(x)
        z = (x - used.mean) * lax.rsqrt(used.var + self.epsilon)
        return z * scale.reshape(wide) + bias.reshape(wide)

    def _with_gradient(self, x: jax.Array) -> Moments:
        """Returns the forward statistics of each example, the backward ones behind them."""
        used = lax.stop_gradient(self._about_origin(self._moments(x, self.forward_size)))
        if self.backward_size is None:
            return used
        batch = self._about_origin(self._moments(x, self.backward_size))
        rule = {"gradient": "renorm", "epsilon": self.epsilon}
        mean, var = with_gradient(batch, used.mean, used.var, **rule)
        return Moments(mean, var, used.count)

    def _moments(self, x: jax.Array, size: int) -> Moments:
        """Returns the moments of each example's group, `[batch, 1, ..., features]`."""
        groups = x.reshape(-1, size or x.shape[0], *x.shape[1:])
        axes = tuple(range(1, groups.ndim - 1))
        found = batch_moments(groups, axes, use_fast_variance=False)

        def by_example(value: jax.Array) -> jax.Array:
            value = jnp.repeat(value, groups.shape[1], axis=0)
            return value.reshape(x.shape[0], *[1] * (x.ndim - 2), x.shape[-1])

        return jax.tree.map(by_example, found)

    def _about_origin(self, moments: Moments) -> Moments:
        """Returns mean 0 and the mean square where the layer does not center."""
        return moments if self.center else around_zero(moments)
