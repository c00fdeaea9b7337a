"""The checks of a configuration, before anything compiles."""

import difflib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from mbn_jax.core.double_forward import SecondForward
from mbn_jax.errors import UserError
from mbn_jax.names import accepted, import_from, is_import_path, named, takes
from mbn_jax.training.config import (
    FIELDS,
    NAMED,
    field_value,
    fields,
    steps_per_epoch,
    total_steps,
)
from mbn_jax.training.config_files import is_in_kwargs
from mbn_jax.training.norms import has_memory_schedule, is_endless, synced_devices


class RuleBetweenFields(NamedTuple):
    """What fields must be together.

    Attributes:
      holds: whether a configuration `c` keeps the rule.
      message: the sentence for one that does not, a format string of `c`.
    """

    holds: Callable[[ConfigDict], Any]
    message: str


HOST_INTERVALS = (
    "log_every_steps",
    "eval_every_steps",
    "checkpoint_every_steps",
    "shift.every_steps",
)


def _multiple_of_dispatch(name: str) -> RuleBetweenFields:
    return RuleBetweenFields(
        lambda c: field_value(c, name) % c.steps_per_dispatch == 0,
        f"{name} must be a multiple of steps_per_dispatch={{c.steps_per_dispatch}}, got "
        f"{{c.{name}}}.",
    )


def _may_be_memory(config: ConfigDict) -> bool:
    # The step itself refuses a user's own norm that has no memory.
    return config.norm.name == "memorized" or is_import_path(config.norm.name)


RULES_BETWEEN_FIELDS = (
    RuleBetweenFields(
        lambda c: is_endless(c) or c.norm.memory_schedule.start_size <= c.norm.memory_size,
        "norm.memory_schedule.start_size must be at most norm.memory_size={c.norm.memory_size}, "
        "got {c.norm.memory_schedule.start_size}.",
    ),
    RuleBetweenFields(
        lambda c: not (is_endless(c) and has_memory_schedule(c)),
        "norm.memory_schedule grows a memory to norm.memory_size, got a memory without end "
        "(norm.memory_size=0); set one, or norm.memory_schedule.start_size=0.",
    ),
    RuleBetweenFields(
        lambda c: 0 <= c.norm.memory_schedule.begin < c.norm.memory_schedule.end <= 1,
        "norm.memory_schedule.begin and end must be fractions of the run, 0 <= begin < end <= 1, "
        "got {c.norm.memory_schedule.begin} and {c.norm.memory_schedule.end}.",
    ),
    RuleBetweenFields(
        lambda c: not 0 < c.norm.memory_capacity < c.norm.memory_size,
        "norm.memory_capacity must be at least norm.memory_size={c.norm.memory_size} (0: as "
        "much), got {c.norm.memory_capacity}.",
    ),
    RuleBetweenFields(
        lambda c: (
            c.norm.batch_renorm.begin <= min(c.norm.batch_renorm.r_end, c.norm.batch_renorm.d_end)
        ),
        "norm.batch_renorm.begin must be at most r_end={c.norm.batch_renorm.r_end} and "
        "d_end={c.norm.batch_renorm.d_end}, got {c.norm.batch_renorm.begin}.",
    ),
    RuleBetweenFields(
        lambda c: c.double_forward != "transport" or _may_be_memory(c),
        "double_forward='transport' moves memories and needs norm.name of memorized, got "
        "{c.norm.name!r}; others take 'rewrite'.",
    ),
    RuleBetweenFields(
        lambda c: (
            c.double_forward_fraction == 1 or (_may_be_memory(c) and not c.norm.virtual_batch_size)
        ),
        "double_forward_fraction={c.double_forward_fraction} needs norm.name of memorized without "
        "norm.virtual_batch_size, got {c.norm.name!r} and {c.norm.virtual_batch_size}.",
    ),
    RuleBetweenFields(
        lambda c: (
            not c.dataset.classes_per_batch or c.batch_size % c.dataset.classes_per_batch == 0
        ),
        "dataset.classes_per_batch must divide batch_size={c.batch_size}, got "
        "{c.dataset.classes_per_batch}.",
    ),
    RuleBetweenFields(
        lambda c: not c.dataset.random_resized_crop or c.dataset.image_size,
        "dataset.random_resized_crop needs dataset.image_size, to crop to; got 0.",
    ),
    RuleBetweenFields(
        # A slice applies to the last part of a sum, so 'train+test[90%:]' is no tenth of it.
        lambda c: (
            not c.dataset.validation
            or (c.dataset.train_split != "all" and set(c.dataset.train_split).isdisjoint("[+( "))
        ),
        "dataset.validation divides a whole split, got dataset.train_split="
        "{c.dataset.train_split!r}; set train_split and test_split to slices instead.",
    ),
    *map(_multiple_of_dispatch, HOST_INTERVALS),
)


def _second_forward(config: ConfigDict) -> SecondForward:
    return SecondForward(config.double_forward, config.double_forward_fraction)


def validate(config: ConfigDict) -> None:
    """Checks all that can be checked without the data and the devices.

    Args:
      config: run configuration, from `mbn_jax.training.config.default_config` with changes.

    Raises:
      UserError: naming the first field that is impossible, its value and what it may be.
    """
    given = {name for name in fields(config) if not is_in_kwargs(name)}
    differing = sorted(given ^ set(FIELDS))
    if differing:
        raise UserError(
            f"The config must have the fields of mbn_jax.training.config.default_config(), and "
            f"differs in {', '.join(differing)}; make it from that function."
        )
    for name, field in FIELDS.items():
        field.rule.check(name, field_value(config, name))
    for rule in RULES_BETWEEN_FIELDS:
        if not rule.holds(config):
            raise UserError(rule.message.format(c=config))
    try:
        _second_forward(config)
    except ValueError as error:
        raise UserError(str(error)) from error
    _check_named(config)
    _check_weight_decay(config)


def import_from_config(config: ConfigDict) -> None:
    """Lets import paths of a config name modules in its `import_dir` and the current folder."""
    if any(is_import_path(config[group].name) for group in NAMED):
        import_from(*filter(None, [config.import_dir]), os.getcwd())


def _check_named(config: ConfigDict) -> None:
    """Imports what the config names, and checks its kwargs; raises UserError."""
    import_from_config(config)
    for group, short in NAMED.items():
        field, name = f"{group}.name", config[group].name
        found = None
        if group != "dataset" or is_import_path(name):  # Else TFDS looks for it.
            found = named(name, short, field)
        if found is not None and not callable(found):
            raise UserError(
                f"{field}={name!r} must be a class or function, got {type(found).__name__}."
            )
        for key, value in config[group].kwargs.items():
            _check_kwarg(f"{group}.kwargs.{key}", value)
        unknown = [key for key in config[group].kwargs if found and not takes(found, key)]
        if found and unknown:
            close = difflib.get_close_matches(unknown[0], sorted(accepted(found)), n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise UserError(f"{field}={name!r} has no argument {unknown[0]!r}.{hint}")


def _check_weight_decay(config: ConfigDict) -> None:
    """Raises UserError where weight decay is asked of an optimizer that has none."""
    options = config.optimizer
    factory = named(options.name, NAMED["optimizer"], "optimizer.name")
    if options.weight_decay and "weight_decay" not in accepted(factory):
        raise UserError(
            f"optimizer.weight_decay={options.weight_decay} needs an optimizer with the argument "
            f"weight_decay, and {options.name!r} has none; set it to 0."
        )


def _check_kwarg(field: str, value: Any) -> None:
    if isinstance(value, list | tuple):
        for item in value:
            _check_kwarg(field, item)
    elif not isinstance(value, str | bool | int | float | None):
        raise UserError(
            f"{field} must be a number, a text, a boolean, None or a list of these, so that "
            f"config.json can hold it, got {type(value).__name__}."
        )


def validate_devices(config: ConfigDict, num_devices: int) -> None:
    """Checks the config against the number of devices of all hosts; raises UserError."""
    if config.batch_size % num_devices:
        raise UserError(
            f"batch_size must be divisible by the {num_devices} devices, got {config.batch_size}; "
            "change it, or let JAX see fewer devices (CUDA_VISIBLE_DEVICES=0, for example)."
        )
    local_batch_size = config.batch_size // num_devices
    try:
        _second_forward(config).num_examples(local_batch_size)
    except ValueError as error:
        raise UserError(str(error)) from error
    if config.norm.sync == "group" and num_devices % config.norm.sync_group_size:
        raise UserError(
            f"norm.sync_group_size must divide the {num_devices} devices, got "
            f"{config.norm.sync_group_size}."
        )
    virtual = config.norm.virtual_batch_size
    synced = synced_devices(config, num_devices)
    if virtual and (virtual % synced or local_batch_size * synced % virtual):
        raise UserError(
            f"norm.virtual_batch_size must be a multiple of the {synced} devices that share "
            f"statistics, and divide their {local_batch_size * synced} examples of a batch, got "
            f"{virtual}."
        )


def validate_examples(config: ConfigDict, num_examples: int) -> None:
    """Checks the config against the size of the training split; raises UserError."""
    if config.batch_size > num_examples:
        raise UserError(
            f"batch_size must be at most the {num_examples} examples of split "
            f"{config.dataset.train_split!r} of {config.dataset.name!r}, got {config.batch_size}."
        )
    if total_steps(config, num_examples) < 1:
        raise UserError(
            f"num_epochs={config.num_epochs} is less than one step of batch_size="
            f"{config.batch_size} on {num_examples} examples; raise it."
        )
    warmup = config.schedule.warmup_epochs
    if warmup >= config.num_epochs:
        raise UserError(
            f"schedule.warmup_epochs must be below num_epochs={config.num_epochs}, got {warmup}."
        )
    epochs = config.schedule.step_epochs
    steps = [int(epoch * steps_per_epoch(config, num_examples)) for epoch in epochs]
    if config.schedule.name == "step" and (
        not all(warmup < epoch < config.num_epochs for epoch in epochs)
        or steps != sorted(set(steps))
    ):
        raise UserError(
            f"schedule.step_epochs must rise from above warmup_epochs={warmup} to below "
            f"num_epochs={config.num_epochs}, at least a step apart, got {tuple(epochs)}."
        )
