"""Moving Average Batch Normalization (MABN) for `flax.linen`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.nn import initializers

from mbn_jax.core.moments import Array, AxisName
from mbn_jax.core.moving_average import BACKWARD_SUMS, MovingAverages, average_both_passes
from mbn_jax.linen.layer import is_inference, options_of, scale_and_bias


class MovingAverageBatchNorm(nn.Module):
    """Batch normalization by averages over recent batches, in the forward and the backward pass.

    With q the mean square of the inputs, averaged over the last `forward_batches` batches, and Q
    its moving average for inference,

        y = r n scale + bias        n = x / sqrt(q + epsilon)
        r = clip(sqrt((q + epsilon) / (Q + epsilon)), 1 / r_max, r_max)

    and the gradient, for h = r dy scale, takes the average of E[h n] over the last
    `backward_batches` batches:

        dx = (h - n E[h n]) / sqrt(q + epsilon)

    No mean is subtracted: use it after convolutions with centered kernels
    (`config.model.conv='centered'`). `center=True` subtracts the mean, averaged too, and takes the
    average of E[h] from the gradient, as batch normalization does.

    Train it with `make_train_step`, which carries the backward statistics of a batch to the next
    step. Of `double_forward` it takes 'off' and 'rewrite'. `batch_stats` holds `mean` (0 unless
    `center`) and `var` (Q) for inference, the `MovingAverages`, and `steps`.

    Attributes, beside those of flax's layer:
      momentum: of Q.
      forward_batches: batches in the averages of the forward pass, the newest among them.
      backward_batches: batches in those of the backward pass; 1: the newest alone.
      center: whether to subtract the mean.
      warmup_steps: training calls that normalize by their own batch.
      correction_steps: training calls before r is used.
      r_max: limit of the correction r.

    Raises:
      ValueError: on construction, where an option is impossible; where the layer is differentiated
        outside of `make_train_step`.

    References:
      Yan et al., "Towards Stabilizing Batch Statistics in Backward Propagation of Batch
      Normalization" (MABN), ICLR 2020, arXiv 2001.06838. Follows the layer, and has the defaults,
      of the PyTorch code at github.com/megvii-model/MABN; not checked against the paper's text.

    >>> import jax
    >>> layer = MovingAverageBatchNorm(use_running_average=False)
    >>> x = jnp.array([[1.0], [7.0]])
    >>> variables = layer.init(jax.random.key(0), x)
    >>> y, _ = layer.apply(variables, x, mutable=['batch_stats'])
    >>> [round(float(value), 3) for value in y[:, 0]]  # The mean square is 25.
    [0.2, 1.4]
    """

    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
    momentum: float = 0.98
    _: dataclasses.KW_ONLY
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Any = initializers.zeros
    scale_init: Any = initializers.ones
    axis_name: AxisName | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    forward_batches: int = 16
    backward_batches: int = 16
    center: bool = False
    warmup_steps: int = 100
    correction_steps: int = 1000
    r_max: float = 5.0

    def __post_init__(self):
        for name in ("forward_batches", "backward_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}.")
        if self.r_max < 1:
            raise ValueError(f"r_max must be 1 or more, got {self.r_max}.")
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
          x: inputs, `[..., features]` or as `axis` says, real floating point.
          use_running_average: as the attribute; give one of the two.
          mask: boolean, broadcastable to `x`: the elements that count.

        Returns:
          Array of the shape of `x`.
        """
        inference = is_inference(self, use_running_average)
        options = options_of(self)
        x = options.as_input(x)
        if jnp.iscomplexobj(x):
            raise ValueError(f"{options.layer} expected real inputs, got {x.dtype}.")
        shape = options.feature_shape(x)
        _, dtype, _ = options.statistics_dtypes(x.dtype)

        def zeros(name: str, *leading: int) -> nn.Variable:
            return self.variable("batch_stats", name, jnp.zeros, (*leading, *shape), dtype)

        mean = zeros("mean")
        var = self.variable("batch_stats", "var", jnp.ones, shape, dtype)
        steps = self.variable("batch_stats", "steps", jnp.zeros, (), jnp.int32)
        averages = {
            "forward": zeros("forward", self.forward_batches, 3),
            "backward": zeros("backward", self.backward_batches, 3),
            BACKWARD_SUMS: zeros(BACKWARD_SUMS, 3),
        }
        parameters = scale_and_bias(self, shape)
        if inference:
            return options.normalize(x, mean.value, var.value, **parameters)
        result = average_both_passes(
            x,
            mask,
            MovingAverages(**{k: v.value for k, v in averages.items()}, steps=steps.value),
            var.value,
            self.get_variable(BACKWARD_SUMS, BACKWARD_SUMS),
            options,
            self,
        )
        if not self.is_initializing():
            # A batch that is not finite shows in its own outputs only.
            is_finite = jnp.isfinite(result.var) & jnp.isfinite(result.mean)
            for average, new in ((mean, result.mean), (var, result.var)):
                moved = average.value + (1 - self.momentum) * (new - average.value)
                average.value = jnp.where(is_finite, moved, average.value)
            for name, variable in averages.items():
                variable.value = lax.stop_gradient(getattr(result.kept, name))
            steps.value = result.kept.steps
        return options.scaled(x, result.z, **parameters)
