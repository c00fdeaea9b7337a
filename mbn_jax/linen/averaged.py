"""A memory without slots: the moving average that a geometric memory without end would be."""

import jax.numpy as jnp
from flax import linen as nn

from mbn_jax.core.memory import Average
from mbn_jax.core.moments import Array
from mbn_jax.linen.memorized import PooledBatchNorm, is_number


class AveragedBatchNorm(PooledBatchNorm):
    """Batch normalization by the pool of all batches so far, each `decay` times the next newer one.

    What `MemorizedBatchNorm` does with weights decay^i and no end to its memory, in three vectors
    instead of slots:

        w    <- decay w + 1        a = 1 / w
        var  <- (1 - a) var + a v_B + a (1 - a) |m_B - mean|^2
        mean <- mean + a (m_B - mean)

    The current batch is in the pool, in training and at inference alike, and the first steps weigh
    what there is, so it is not the moving average of `flax.linen.BatchNorm`. `batch_stats` holds
    `mean`, `var` and `weight` (w), each `[*features]`. In mode 'transport' of the training step it
    moves as a memory does. It tells whether the slots of a memory matter.

    Attributes, beside those of flax's layer and of `PooledBatchNorm`:
      decay: in (0, 1], or a traced value.

    Raises:
      ValueError: on construction, where an option is impossible.

    >>> import jax
    >>> layer = AveragedBatchNorm(decay=0.5, use_running_average=False)
    >>> variables = layer.init(jax.random.key(0), jnp.zeros((2, 1)))
    >>> for x in (jnp.array([[1.0], [3.0]]), jnp.array([[4.0], [6.0]])):
    ...     _, updates = layer.apply(variables, x, mutable=['batch_stats'])
    ...     variables = {**variables, **updates}
    >>> {name: round(float(value[0]), 3) for name, value in variables['batch_stats'].items()}
    {'mean': 4.0, 'var': 3.0, 'weight': 1.5}
    """

    decay: float | Array = 0.97

    def __post_init__(self):
        if callable(self.decay):
            raise ValueError("AveragedBatchNorm takes a number as decay, got a function.")
        if is_number(self.decay) and not 0 < self.decay <= 1:
            raise ValueError(f"decay must be in (0, 1], got {self.decay}.")
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Array,
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
    ) -> Array:
        """Normalizes `x`.

        Args:
          x: inputs, `[..., features]` or as `axis` says, floating point or complex.
          use_running_average: as the attribute; give one of the two.
          mask: boolean, broadcastable to `x`: the elements that count.

        Returns:
          Array of the shape of `x`.
        """
        use_running_average = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        x, _, feature_axes = self._input(x)
        shape = tuple(x.shape[i] for i in feature_axes)
        mean_dtype, var_dtype = self._statistics_dtypes(x.dtype)
        weight_dtype = jnp.promote_types(var_dtype, jnp.float32)
        average = [
            self.variable("batch_stats", "mean", jnp.zeros, shape, mean_dtype),
            self.variable("batch_stats", "var", jnp.ones, shape, var_dtype),
            self.variable("batch_stats", "weight", jnp.zeros, shape, weight_dtype),
        ]

        return self._normalize_by_pool(x, use_running_average, mask, average, Average(self.decay))
