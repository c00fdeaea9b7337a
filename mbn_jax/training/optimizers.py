"""Optimizers and learning-rate schedules of optax, by configuration."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from mbn_jax.names import named, only_accepted, with_kwargs
from mbn_jax.training.hparams import HParams

SCHEDULES = ("cosine", "step", "constant")


def build_schedule(
    config: ConfigDict, hparams: HParams, *, steps_per_epoch: int, total_steps: int
) -> optax.Schedule:
    """Returns the learning rate as a function of the step: a linear warm-up, then the schedule.

    Args:
      config: run configuration; the numbers in `hparams` are not read from it.
      hparams: learning rate, which may be traced.
      steps_per_epoch: steps of an epoch, in which the config counts.
      total_steps: total training steps; 'cosine' reaches 0 there.
    """
    rate = hparams.learning_rate
    warmup = int(config.schedule.warmup_epochs * steps_per_epoch)
    if config.schedule.name == "cosine":
        main = optax.cosine_decay_schedule(rate, total_steps - warmup)
    elif config.schedule.name == "step":
        epochs = config.schedule.step_epochs
        boundaries = {
            int(e * steps_per_epoch) - warmup: config.schedule.step_factor for e in epochs
        }
        main = optax.piecewise_constant_schedule(rate, boundaries)
    else:
        main = optax.constant_schedule(rate)
    if not warmup:
        return main
    # From the first fraction of the rate, not from 0: a step at rate 0 would be lost.
    start = optax.linear_schedule(rate / (warmup + 1), rate, warmup)
    return optax.join_schedules([start, main], [warmup])


def sgd(
    schedule: optax.Schedule,
    *,
    momentum: float,
    nesterov: bool,
    weight_decay: Any,
    mask: Any,
    gradient_clip_norm: float,
) -> optax.GradientTransformation:
    """Returns SGD; weight decay is added to the gradient, after clipping."""
    transforms = _clipping(gradient_clip_norm)
    transforms.append(optax.add_decayed_weights(weight_decay, mask))
    transforms.append(optax.sgd(schedule, momentum=momentum or None, nesterov=nesterov))
    return optax.chain(*transforms)


def adam(
    schedule: optax.Schedule, *, weight_decay: Any, mask: Any, gradient_clip_norm: float
) -> optax.GradientTransformation:
    """Returns Adam; weight decay is decoupled from the gradient."""
    update = optax.adamw(schedule, weight_decay=weight_decay, mask=mask)
    return optax.chain(*_clipping(gradient_clip_norm), update)


def _clipping(norm: float) -> list[optax.GradientTransformation]:
    return [optax.clip_by_global_norm(norm)] if norm else []


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {"sgd": sgd, "adam": adam}

OWN_FIELDS = {"sgd": ("momentum", "nesterov")}
"""Fields of `config.optimizer` that go to some of these; others take `optimizer.kwargs`."""


def build_optimizer(
    config: ConfigDict, hparams: HParams, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Builds the optimizer that `config.optimizer` names.

    It gets the schedule, `optimizer.kwargs`, and of `weight_decay`, `mask` (the parameters that
    decay) and `gradient_clip_norm` what it takes. One that does not clip has clipping put in front.

    Args:
      config: run configuration; the numbers in `hparams` are not read from it.
      hparams: weight decay, which may be traced.
      schedule: learning rate by step.
    """
    options = config.optimizer
    factory = named(options.name, OPTIMIZERS, "optimizer.name")
    shared = {
        "weight_decay": hparams.weight_decay,
        "mask": None if options.decay_norm_params else decayed_params,
        "gradient_clip_norm": config.gradient_clip_norm,
    }
    given = only_accepted(factory, shared)
    own = {name: options[name] for name in OWN_FIELDS.get(options.name, ())}
    tx = factory(schedule, **with_kwargs(given | own, options, "optimizer"))
    if "gradient_clip_norm" in given:
        return tx
    clipping = _clipping(config.gradient_clip_norm)
    return optax.chain(*clipping, tx) if clipping else tx


def decayed_params(params: Any) -> Any:
    """Returns True for each parameter that weight decay applies to: all but scales and biases.

    >>> decayed_params({'conv': {'kernel': 1, 'bias': 2}, 'norm': {'scale': 3}})
    {'conv': {'bias': False, 'kernel': True}, 'norm': {'scale': False}}
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: getattr(path[-1], "key", None) not in ("scale", "bias"), params
    )
