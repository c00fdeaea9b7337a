"""Networks, by name."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from mbn_jax.models.convnet import ConvNet

MODELS = {"convnet": ConvNet}


def build_model(
    config: ConfigDict, *, num_classes: int, norm: Callable[..., nn.Module]
) -> nn.Module:
    """Builds the network that `config.model` names.

    Args:
      config: of the run.
      num_classes: outputs of the classifier.
      norm: makes a normalization layer; the network calls it with `use_running_average`.

    Returns:
      A module called as `module(images, train=...)`.
    """
    model = functools.partial(MODELS[config.model.name], features=tuple(config.model.features))
    return model(num_classes=num_classes, norm=norm, dtype=jnp.dtype(config.model.dtype))
