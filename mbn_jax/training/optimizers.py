"""Optimizers and learning-rate schedules of optax, by configuration."""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from mbn_jax.training.hparams import HParams

OPTIMIZERS = ("sgd", "adam")
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


def build_optimizer(
    config: ConfigDict, hparams: HParams, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Returns the optimizer, preceded by gradient clipping and weight decay.

    Weight decay is added to the gradient for 'sgd', and decoupled from it for 'adam'.

    Args:
      config: run configuration; the numbers in `hparams` are not read from it.
      hparams: weight decay, which may be traced.
      schedule: learning rate by step.
    """
    options = config.optimizer
    mask = None if options.decay_norm_params else decayed_params
    transforms = []
    if config.gradient_clip_norm:
        transforms.append(optax.clip_by_global_norm(config.gradient_clip_norm))
    if options.name == "adam":
        transforms.append(optax.adamw(schedule, weight_decay=hparams.weight_decay, mask=mask))
        return optax.chain(*transforms)
    transforms.append(optax.add_decayed_weights(hparams.weight_decay, mask))
    sgd = optax.sgd(schedule, momentum=options.momentum or None, nesterov=options.nesterov)
    return optax.chain(*transforms, sgd)


def decayed_params(params: Any) -> Any:
    """Returns True for each parameter that weight decay applies to: all but scales and biases.

    >>> decayed_params({'conv': {'kernel': 1, 'bias': 2}, 'norm': {'scale': 3}})
    {'conv': {'bias': False, 'kernel': True}, 'norm': {'scale': False}}
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: getattr(path[-1], "key", None) not in ("scale", "bias"), params
    )
