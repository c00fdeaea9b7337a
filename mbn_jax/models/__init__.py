"""Networks, by name."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from mbn_jax.models.convnet import ConvNet
from mbn_jax.models.resnet import RESNETS
from mbn_jax.models.vgg import VGG16

MODELS: dict[str, Callable[..., nn.Module]] = {
    "convnet": ConvNet,
    "vgg16": VGG16,
    **RESNETS,
}


def build_model(
    config: ConfigDict, *, num_classes: int, norm: Callable[..., nn.Module]
) -> nn.Module:
    """Builds the network that `config.model` names.

    Args:
      config: run configuration.
      num_classes: outputs of the classifier.
      norm: factory of normalization layers, called with `use_running_average`.

    Returns:
      A module to call as `module(images, train=...)`.
    """
    name = config.model.name
    model = functools.partial(
        MODELS[name], dtype=jnp.dtype(config.model.dtype), remat=config.model.remat
    )
    if name == "convnet":
        model = functools.partial(model, features=tuple(config.model.features))
    elif name in RESNETS:
        model = functools.partial(model, zero_init_last_scale=config.model.zero_init_last_scale)
    return model(num_classes=num_classes, norm=norm)
