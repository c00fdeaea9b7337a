"""Optimizers and learning-rate schedules of optax, by configuration."""

import jax
import optax
from ml_collections import ConfigDict

OPTIMIZERS = ("sgd", "adam")
SCHEDULES = ("cosine", "step", "constant")


def build_schedule(config: ConfigDict, *, steps_per_epoch: int, total_steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step: a linear warm-up, then the schedule.

    Args:
      config: of the run; the learning rate may be traced.
      steps_per_epoch: converts the epochs of the config.
      total_steps: of the run; 'cosine' reaches 0 there.
    """
    rate = config.optimizer.learning_rate
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
    # From the first share of the rate, not from 0: a step at rate 0 is a step lost.
    start = optax.linear_schedule(rate / (warmup + 1), rate, warmup)
    return optax.join_schedules([start, main], [warmup])


def decayed_params(params) -> object:
    """Returns True for the parameters that weight decay is for: all but scales and biases.

    >>> decayed_params({'conv': {'kernel': 1, 'bias': 2}, 'norm': {'scale': 3}})
    {'conv': {'bias': False, 'kernel': True}, 'norm': {'scale': False}}
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: getattr(path[-1], "key", None) not in ("scale", "bias"), params
    )


def build_optimizer(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns the optimizer of `config`, after clipping and weight decay.

    Weight decay is added to the gradient for 'sgd', and decoupled from it for 'adam'; it may be
    traced.
    """
    options = config.optimizer
    mask = None if options.decay_norm_params else decayed_params
    transforms = []
    if config.gradient_clip_norm:
        transforms.append(optax.clip_by_global_norm(config.gradient_clip_norm))
    if options.name == "adam":
        transforms.append(optax.adamw(schedule, weight_decay=options.weight_decay, mask=mask))
        return optax.chain(*transforms)
    transforms.append(optax.add_decayed_weights(options.weight_decay, mask))
    sgd = optax.sgd(schedule, momentum=options.momentum or None, nesterov=options.nesterov)
    return optax.chain(*transforms, sgd)
