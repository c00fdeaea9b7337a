"""Virtual (ghost) batches: small normalization batches inside a larger one."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn

from mbn_jax.core.batch_stats import pool_batch_stats
from mbn_jax.core.double_forward import (
    BATCH_MOMENTS,
    FIRST_BATCH_MOMENTS,
    current_forwards,
)
from mbn_jax.core.moments import Array
from mbn_jax.core.moving_average import BACKWARD_SUMS
from mbn_jax.linen.layer import is_inference


class VirtualBatches(nn.Module):
    """Normalizes groups of a batch by themselves, each with its own statistics and memory.

    In training the batch is cut into `num_groups` runs of consecutive examples. The layer's
    `batch_stats` have a leading axis of groups, whatever batch `init` saw; its parameters are
    shared, and are found where they would be without groups. At inference the groups are pooled by
    the law of total variance (see `pool_batch_stats`), so inference uses the statistics of all of
    them.

    It studies small normalization batches without the noise of small batches in the gradient, at
    the speed of the large one. With an `axis_name` in the layer, each group is spread over devices.

    Attributes:
      norm: makes a layer that keeps `batch_stats`, as `flax.linen.BatchNorm`; called with
        `use_running_average`.
      num_groups: number of groups that a device's batch is cut into; must divide it in training.
      use_running_average: as of the layer, here or in the call.

    Raises:
      ValueError: where the groups do not divide a batch.

    References:
      Hoffer, Hubara, Soudry, "Train longer, generalize better" (arXiv 1705.08741), section 4.

    >>> import jax
    >>> norm = VirtualBatches(nn.BatchNorm, num_groups=2, use_running_average=False)
    >>> x = jnp.array([[1.0], [3.0], [10.0], [30.0]])
    >>> variables = norm.init(jax.random.key(0), x[:1])
    >>> y, _ = norm.apply(variables, x, mutable=['batch_stats'])
    >>> y[:, 0].round(2).tolist()
    [-1.0, 1.0, -1.0, 1.0]
    """

    norm: Callable[..., nn.Module]
    num_groups: int
    use_running_average: bool | None = None

    def __post_init__(self):
        if self.num_groups < 1:
            raise ValueError(f"num_groups must be 1 or more, got {self.num_groups}.")
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
          x: inputs, `[batch, ...]`, as the layer takes them.
          use_running_average: as the attribute; give one of the two.
          mask: boolean, broadcastable to `x`: the elements that count.

        Returns:
          Array of the shape of `x`.
        """
        use_running_average = is_inference(self, use_running_average)
        layer = self.norm(use_running_average=use_running_average)
        nn.share_scope(self, layer)
        # Tells functions over `batch_stats` which axis the groups are.
        self.variable("batch_stats", "groups", jnp.arange, self.num_groups)
        masks = () if mask is None else (jnp.broadcast_to(mask, x.shape),)

        def normalize(layer: nn.Module, x: Array, *mask: Array) -> Array:
            return layer(x, mask=mask[0]) if mask else layer(x)

        if use_running_average and not self.is_initializing():
            pooled = nn.map_variables(normalize, "batch_stats", pool_batch_stats)
            return pooled(layer, x, *masks)
        if current_forwards().batch_size:
            raise ValueError(
                "double_forward_fraction would leave some groups of VirtualBatches without "
                "examples; use 1 with them."
            )

        def groups(x: Array) -> Array:
            if self.is_initializing():  # Its batch may be of any size.
                return jnp.broadcast_to(x, (self.num_groups, *x.shape))
            if x.shape[0] % self.num_groups:
                raise ValueError(
                    f"VirtualBatches expected a batch that is divisible by num_groups="
                    f"{self.num_groups}, got {x.shape[0]} examples."
                )
            return x.reshape(self.num_groups, -1, *x.shape[1:])

        in_groups = nn.vmap(
            normalize,
            variable_axes={
                "params": None,
                "batch_stats": 0,
                BACKWARD_SUMS: 0,
                BATCH_MOMENTS: 0,
                FIRST_BATCH_MOMENTS: 0,
            },
            split_rngs={"params": False},
            axis_size=self.num_groups,
        )
        y = in_groups(layer, *map(groups, (x, *masks)))
        return y[0] if self.is_initializing() else y.reshape(x.shape)
