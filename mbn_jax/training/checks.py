"""The checks of a configuration, before anything compiles."""

import difflib
import os
from typing import Any

from ml_collections import ConfigDict

from mbn_jax.core.double_forward import SecondForward
from mbn_jax.errors import UserError
from mbn_jax.names import accepted, default_of, import_from, is_import_path, named, takes
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
from mbn_jax.training.optimizers import OWN_FIELDS

HOST_INTERVALS = (
    "log_every_steps",
    "eval_every_steps",
    "checkpoint_every_steps",
    "shift.every_steps",
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
        field.check(name, field_value(config, name))
    _check_norm(config)
    _check_second_forward(config)
    _check_dataset(config)
    for name in HOST_INTERVALS:
        if field_value(config, name) % config.steps_per_dispatch:
            raise UserError(
                f"{name} must be a multiple of steps_per_dispatch={config.steps_per_dispatch}, got "
                f"{field_value(config, name)}."
            )
    _check_named(config)
    _check_optimizer(config)


def _check_norm(config: ConfigDict) -> None:
    norm, growth, limits = config.norm, config.norm.memory_schedule, config.norm.batch_renorm
    if is_endless(config) and has_memory_schedule(config):
        raise UserError(
            "norm.memory_schedule grows a memory to norm.memory_size, got an endless memory "
            "(norm.memory_size=0); set one, or norm.memory_schedule.start_size=0."
        )
    if growth.start_size > norm.memory_size:
        raise UserError(
            f"norm.memory_schedule.start_size must be at most norm.memory_size={norm.memory_size}, "
            f"got {growth.start_size}."
        )
    if not 0 <= growth.begin < growth.end <= 1:
        raise UserError(
            "norm.memory_schedule.begin and end must be fractions of the run, 0 <= begin < end <= "
            f"1, got {growth.begin} and {growth.end}."
        )
    if 0 < norm.memory_capacity < norm.memory_size:
        raise UserError(
            f"norm.memory_capacity must be at least norm.memory_size={norm.memory_size} (0: as "
            f"much), got {norm.memory_capacity}."
        )
    if limits.begin > min(limits.r_end, limits.d_end):
        raise UserError(
            f"norm.batch_renorm.begin must be at most r_end={limits.r_end} and "
            f"d_end={limits.d_end}, got {limits.begin}."
        )


def _check_second_forward(config: ConfigDict) -> None:
    norm = config.norm
    # The step itself refuses a user's own norm that has no memory.
    may_be_memory = norm.name == "memorized" or is_import_path(norm.name)
    if config.double_forward == "transport" and not may_be_memory:
        raise UserError(
            "double_forward='transport' moves memories and needs norm.name of memorized, got "
            f"{norm.name!r}; others take 'rewrite'."
        )
    fraction = config.double_forward_fraction
    if fraction < 1 and (norm.virtual_batch_size or not may_be_memory):
        raise UserError(
            f"double_forward_fraction={fraction} needs norm.name of memorized without "
            f"norm.virtual_batch_size, got {norm.name!r} and {norm.virtual_batch_size}."
        )
    try:
        _second_forward(config)
    except ValueError as error:
        raise UserError(str(error)) from error


def _check_dataset(config: ConfigDict) -> None:
    options = config.dataset
    if options.classes_per_batch and config.batch_size % options.classes_per_batch:
        raise UserError(
            f"dataset.classes_per_batch must divide batch_size={config.batch_size}, got "
            f"{options.classes_per_batch}."
        )
    if options.random_resized_crop and not options.image_size:
        raise UserError("dataset.random_resized_crop needs dataset.image_size, to crop to; got 0.")
    # A slice applies to the last part of a sum, so 'train+test[90%:]' is no tenth of it.
    is_whole = options.train_split != "all" and set(options.train_split).isdisjoint("[+( ")
    if options.validation and not is_whole:
        raise UserError(
            f"dataset.validation divides a whole split, got dataset.train_split="
            f"{options.train_split!r}; set train_split and test_split to slices instead."
        )


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


def _check_optimizer(config: ConfigDict) -> None:
    """Raises UserError where the optimizer would not do what its fields say."""
    options = config.optimizer
    factory = named(options.name, NAMED["optimizer"], "optimizer.name")
    if options.weight_decay and "weight_decay" not in accepted(factory):
        raise UserError(
            f"optimizer.weight_decay={options.weight_decay} needs an optimizer with the argument "
            f"weight_decay, and {options.name!r} has none; set it to 0."
        )
    if options.name in OWN_FIELDS:
        return
    own = set().union(*OWN_FIELDS.values()) & accepted(factory) - set(options.kwargs)
    for name in sorted(own):
        default = default_of(factory, name)
        has_none = default is None or (isinstance(default, int | float) and not default)
        if options[name] and has_none:
            raise UserError(
                f"optimizer.{name}={options[name]} is for {', '.join(OWN_FIELDS)} alone; set "
                f"optimizer.kwargs.{name} for {options.name!r}, or optimizer.{name} to 0."
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
    total = total_steps(config, num_examples)
    if total < 1:
        raise UserError(
            f"num_epochs={config.num_epochs} is less than one step of batch_size="
            f"{config.batch_size} on {num_examples} examples; raise it."
        )
    warmup, epochs = config.schedule.warmup_epochs, config.schedule.step_epochs
    warmup_steps, *steps = (
        int(epoch * steps_per_epoch(config, num_examples)) for epoch in (warmup, *epochs)
    )
    if warmup_steps >= total:
        raise UserError(
            f"schedule.warmup_epochs must end at least a step before num_epochs="
            f"{config.num_epochs}, got {warmup}: {warmup_steps} steps of {total}."
        )
    if config.schedule.name == "step" and (
        not all(warmup_steps < step < total for step in steps) or steps != sorted(set(steps))
    ):
        raise UserError(
            f"schedule.step_epochs must rise from above warmup_epochs={warmup} to below "
            f"num_epochs={config.num_epochs}, at least a step apart, got {tuple(epochs)}."
        )
