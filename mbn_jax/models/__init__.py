"""Networks, by name."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from mbn_jax.errors import UserError
from mbn_jax.models.convnet import ConvNet
from mbn_jax.models.convolution import CONVOLUTIONS
from mbn_jax.models.resnet import RESNETS
from mbn_jax.models.vgg import VGG16
from mbn_jax.names import accepted, named, only_accepted, takes, with_kwargs

MODELS: dict[str, Callable[..., nn.Module]] = {
    "convnet": ConvNet,
    "vgg16": VGG16,
    **RESNETS,
}

OWN_FIELDS = {"convnet": ("features",), **dict.fromkeys(RESNETS, ("zero_init_last_scale",))}
"""Fields of `config.model` that go to some of these networks; others take `model.kwargs`."""


def build_model(
    config: ConfigDict, *, num_classes: int | None, norm: Callable[..., nn.Module]
) -> nn.Module:
    """Builds the network that `config.model` names.

    It gets `norm`, `model.kwargs`, and of `num_classes`, `dtype`, `remat` and `conv` what it takes.

    Args:
      config: run configuration.
      num_classes: outputs of the classifier; None: the data set has no classes.
      norm: factory of normalization layers, called with `use_running_average`.

    Returns:
      A module, usually called as `module(images, train=...)`.

    Raises:
      UserError: where it does not take what the config asks of it.
    """
    options = config.model
    factory = named(options.name, MODELS, "model.name")
    shared = {"dtype": jnp.dtype(options.dtype), "remat": options.remat}
    if options.conv != "plain":
        shared["conv"] = CONVOLUTIONS[options.conv]
    if num_classes is not None:
        shared["num_classes"] = num_classes
    taken = accepted(factory)
    defaults = {"dtype": "float32", "remat": False, "conv": "plain"}
    for name, default in defaults.items():
        if options[name] != default and name not in taken:
            raise UserError(
                f"model.{name}={options[name]} needs a network with the argument {name}, and "
                f"{options.name!r} has none; leave model.{name} out."
            )
    if not takes(factory, "norm"):
        raise UserError(
            f"The network {options.name!r} must take norm=, a factory of normalization layers that "
            "it calls with use_running_average; it has no such argument."
        )
    own = {name: options[name] for name in OWN_FIELDS.get(options.name, ())}
    given = {"norm": norm} | only_accepted(factory, shared) | own
    return factory(**with_kwargs(given, options, "model"))
