"""The configuration: its defaults, and the checks that it must pass before anything compiles."""

import difflib
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mbn_jax.core.double_forward import DOUBLE_FORWARD, SecondForward
from mbn_jax.core.gradient import GRADIENTS
from mbn_jax.errors import UserError
from mbn_jax.models import MODELS
from mbn_jax.parallel.devices import RUNTIMES
from mbn_jax.training.norms import NORMS, NORMS_WITH_MEMORY, SYNCS, synced_devices
from mbn_jax.training.optimizers import OPTIMIZERS, SCHEDULES

MAX_MEMORY_SIZE = 1 << 16

TRACED: dict[str, type[np.int32] | type[np.float32]] = {
    "seed": np.int32,
    "norm.memory_size": np.int32,
    "norm.decay": np.float32,
    "norm.memory_schedule.start_size": np.int32,
    "optimizer.learning_rate": np.float32,
    "optimizer.weight_decay": np.float32,
}
"""Fields that a compiled program takes as data, with their dtypes: one program for all values."""

HOST = (
    "log_every_steps",
    "eval_every_steps",
    "checkpoint_every_steps",
    "keep_checkpoints",
    "keep_best",
    "init_from",
    "on_divergence",
    "max_restores",
)
"""Fields that the host alone goes by: a compiled program knows nothing of them."""

ON_DIVERGENCE = ("stop", "restore", "continue")


def default_config() -> ConfigDict:
    """Returns every field with its default; a config file changes a few of them.

    >>> default_config().norm.name
    'memorized'
    """
    config = ConfigDict()
    config.seed = 0  # Of parameters, order, augmentation and dropout.
    config.batch_size = 128  # Global: summed over devices and hosts.
    config.num_epochs = 10.0

    config.init_from = ""  # Workdir of a run whose weights and statistics to start with.

    config.dataset = ConfigDict()
    config.dataset.name = "digits"  # Any TFDS image-classification set.
    config.dataset.data_dir = ""  # Empty: TFDS's own.
    config.dataset.train_split = "train"
    config.dataset.test_split = "test"
    config.dataset.validation = False  # Hold out a tenth of train_split, in place of test_split.
    config.dataset.image_size = 0  # Resize to this height and width; 0: as stored.
    config.dataset.random_resized_crop = False  # Augmentation on the host, to image_size.
    config.dataset.crop_padding = 0  # Augmentation: pad by this much and crop at random.
    config.dataset.flip = False  # Augmentation: mirror half of the images.
    config.dataset.classes_per_batch = 0  # Batches that see so few classes; 0: drawn from all.
    config.dataset.max_bytes_in_memory = 4 << 30  # A larger split is decoded as it is used,
    config.dataset.num_workers = 0  # by so many processes; 0: by threads.

    config.model = ConfigDict()
    config.model.name = "convnet"
    config.model.features = (16, 32, 32, 64)  # Of 'convnet'.
    config.model.zero_init_last_scale = False  # Of residual networks: blocks start as identity.
    config.model.remat = False  # Keep less for the backward pass, and compute it once more there.
    config.model.dtype = "float32"  # Of the computation; parameters and statistics are float32.

    config.norm = ConfigDict()
    config.norm.name = "memorized"
    config.norm.epsilon = 1e-5
    config.norm.use_fast_variance = True
    config.norm.sync = "sync"  # Statistics over all devices, over groups, or 'local'.
    config.norm.sync_group_size = 1  # Devices a group, for 'group'.
    config.norm.virtual_batch_size = 0  # Examples that are normalized together; 0: all.
    config.norm.momentum = 0.9  # Of the moving averages of 'batch' and 'batch_renorm'.
    config.norm.num_groups = 8  # Of 'group'.
    config.norm.memory_size = 64
    config.norm.memory_capacity = 0  # Slots to make room for; 0: norm.memory_size.
    config.norm.decay = 0.97
    config.norm.gradient = "auto"
    config.norm.r_max = 0.0  # Clipping of 'renorm'; 0: off.
    config.norm.d_max = 0.0
    config.norm.transport_scale = True  # Of 'transport': move by scale and offset, or offset alone.

    config.norm.memory_schedule = ConfigDict()
    config.norm.memory_schedule.start_size = 0  # A memory of so many batches; 0: no schedule;
    config.norm.memory_schedule.begin = 0.0  # from this share of the run it grows linearly,
    config.norm.memory_schedule.end = 1.0  # to norm.memory_size at this one.

    config.norm.batch_renorm = ConfigDict()
    config.norm.batch_renorm.r_max = 3.0  # Limits of the correction, in the end;
    config.norm.batch_renorm.d_max = 5.0
    config.norm.batch_renorm.begin = 0.03  # none until this share of the run,
    config.norm.batch_renorm.r_end = 0.25  # relaxed linearly until these.
    config.norm.batch_renorm.d_end = 0.15

    config.double_forward = "rewrite"
    config.double_forward_fraction = 1.0  # Of each device's examples, in the second forward.
    config.double_forward_every = 1  # A second forward in every so many steps.
    config.gradient_clip_norm = 0.0  # 0: off.

    config.optimizer = ConfigDict()
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = False
    config.optimizer.weight_decay = 0.0
    config.optimizer.decay_norm_params = False  # Decay scales and biases too.

    config.schedule = ConfigDict()
    config.schedule.name = "cosine"  # To 0 at the end; 'step'; 'constant'.
    config.schedule.warmup_epochs = 0.0
    config.schedule.step_epochs = (5.0, 7.5)  # Of 'step': where the rate falls,
    config.schedule.step_factor = 0.1  # and to which part of it.

    config.runtime = "pmap"
    config.steps_per_dispatch = 1  # More at small batches, where the host is slow.
    config.eval_batch_size = 512  # Rounded up to a multiple of the devices.
    config.recalibrate_batches = 0  # Evaluate by the statistics of so many too; 0: do not.
    config.log_every_steps = 100
    config.eval_every_steps = 0  # 0: once an epoch.
    config.checkpoint_every_steps = 0  # 0: once an epoch.
    config.keep_checkpoints = 3
    config.keep_best = False  # Keep the checkpoint of the lowest test error beside them.
    config.on_divergence = "stop"  # 'restore': go back to the last checkpoint, at half the rate,
    config.max_restores = 3  # so often at most; 'continue': report it and go on.

    config.shift = ConfigDict()  # Measure what an update does to the statistics:
    config.shift.every_steps = 0  # so often; 0: never.
    config.shift.examples = 0  # Training examples that stand for the population; 0: all.
    config.shift.layers = ""  # Norm layers by regular expression; empty: all.
    return config.lock()  # A misspelt field in a config file is an error.


def validate(config: ConfigDict) -> None:
    """Checks all that can be checked without the data and the devices.

    Args:
      config: from `default_config`, with changes.

    Raises:
      UserError: naming the first field that is impossible, what it is and what it may be.
    """
    differing = sorted(set(fields(config)) ^ set(fields(default_config())))
    if differing:
        raise UserError(
            f"The config must have the fields of mbn_jax.training.config.default_config(), and "
            f"differs in {', '.join(differing)}; make it from that function."
        )
    _choice(config, "model.name", MODELS)
    _choice(config, "model.dtype", ("float32", "bfloat16"))
    _choice(config, "norm.name", NORMS)
    _choice(config, "norm.sync", SYNCS)
    _choice(config, "norm.gradient", GRADIENTS)
    _choice(config, "double_forward", DOUBLE_FORWARD)
    _choice(config, "optimizer.name", OPTIMIZERS)
    _choice(config, "schedule.name", SCHEDULES)
    _choice(config, "runtime", RUNTIMES)
    _choice(config, "on_divergence", ON_DIVERGENCE)
    for field in (
        "batch_size",
        "norm.memory_size",
        "norm.sync_group_size",
        "norm.num_groups",
        "steps_per_dispatch",
        "eval_batch_size",
        "log_every_steps",
        "keep_checkpoints",
        "max_restores",
    ):
        _number(config, field, "1 or more", lambda value: value >= 1)
    for field in (
        "seed",
        "norm.memory_capacity",
        "norm.memory_schedule.start_size",
        "norm.virtual_batch_size",
        "recalibrate_batches",
        "dataset.classes_per_batch",
        "shift.every_steps",
        "shift.examples",
        "dataset.image_size",
        "dataset.crop_padding",
        "dataset.max_bytes_in_memory",
        "dataset.num_workers",
        "norm.r_max",
        "norm.d_max",
        "gradient_clip_norm",
        "optimizer.weight_decay",
        "schedule.warmup_epochs",
        "eval_every_steps",
        "checkpoint_every_steps",
    ):
        _number(config, field, "0 or more", lambda value: value >= 0)
    for field in ("num_epochs", "norm.epsilon", "optimizer.learning_rate", "schedule.step_factor"):
        _number(config, field, "more than 0", lambda value: value > 0)
    for field in ("norm.momentum", "optimizer.momentum"):
        _number(config, field, "in [0, 1)", lambda value: 0 <= value < 1)
    _number(config, "norm.decay", "in (0, 1]", lambda value: 0 < value <= 1)
    _number(config, "seed", "below 2^31", lambda value: value < 2**31)

    renorm = config.norm.batch_renorm
    _number(config, "norm.batch_renorm.r_max", "1 or more", lambda value: value >= 1)
    for field in ("d_max", "begin", "r_end", "d_end"):
        _number(config, f"norm.batch_renorm.{field}", "0 or more", lambda value: value >= 0)
    if renorm.begin > min(renorm.r_end, renorm.d_end):
        raise UserError(
            f"norm.batch_renorm.begin must be at most r_end={renorm.r_end} and d_end="
            f"{renorm.d_end}, got {renorm.begin}."
        )
    growth = config.norm.memory_schedule
    if growth.start_size > config.norm.memory_size:
        raise UserError(
            "norm.memory_schedule.start_size must be at most norm.memory_size="
            f"{config.norm.memory_size}, got {growth.start_size}."
        )
    if not 0 <= growth.begin < growth.end <= 1:
        raise UserError(
            "norm.memory_schedule.begin and end must be shares of the run, 0 <= begin < end <= 1, "
            f"got {growth.begin} and {growth.end}."
        )
    features = config.model.features
    if not features or any(not isinstance(f, int) or f < 1 for f in features):
        raise UserError(f"model.features must be whole numbers of 1 or more, got {features}.")
    if config.norm.memory_size > MAX_MEMORY_SIZE:
        raise UserError(
            f"norm.memory_size must be at most {MAX_MEMORY_SIZE}, got {config.norm.memory_size}."
        )
    norm = config.norm
    if config.double_forward == "transport" and norm.name not in NORMS_WITH_MEMORY:
        raise UserError(
            f"double_forward='transport' moves memories and needs norm.name of "
            f"{', '.join(NORMS_WITH_MEMORY)}, got {norm.name!r}; others take 'rewrite'."
        )
    try:
        SecondForward(config.double_forward, config.double_forward_fraction)
    except ValueError as error:
        raise UserError(str(error)) from error
    if not norm.transport_scale and config.double_forward != "transport":
        raise UserError(
            "norm.transport_scale=False is a kind of double_forward='transport', got "
            f"{config.double_forward!r}."
        )
    if config.double_forward_fraction < 1 and (
        norm.name not in NORMS_WITH_MEMORY or norm.virtual_batch_size
    ):
        raise UserError(
            f"double_forward_fraction={config.double_forward_fraction} needs norm.name of "
            f"{', '.join(NORMS_WITH_MEMORY)} without norm.virtual_batch_size, got {norm.name!r} "
            f"and {norm.virtual_batch_size}."
        )
    if (norm.r_max or norm.d_max) and norm.gradient != "renorm":
        raise UserError(
            f"norm.r_max and norm.d_max need norm.gradient='renorm', got {norm.gradient!r}."
        )
    if norm.r_max and norm.r_max < 1:
        raise UserError(f"norm.r_max must be 1 or more (0: off), got {norm.r_max}.")
    if 0 < norm.memory_capacity < norm.memory_size:
        raise UserError(
            f"norm.memory_capacity must be at least norm.memory_size={norm.memory_size} (0: as "
            f"much), got {norm.memory_capacity}."
        )
    stride = config.steps_per_dispatch
    for field in (
        "log_every_steps",
        "eval_every_steps",
        "checkpoint_every_steps",
        "shift.every_steps",
    ):
        if _lookup(config, field) % stride:
            raise UserError(
                f"{field} must be a multiple of steps_per_dispatch={stride}, got "
                f"{_lookup(config, field)}."
            )
    classes = config.dataset.classes_per_batch
    if classes and config.batch_size % classes:
        raise UserError(
            f"dataset.classes_per_batch must divide batch_size={config.batch_size}, got {classes}."
        )
    if config.dataset.random_resized_crop and not config.dataset.image_size:
        raise UserError("dataset.random_resized_crop needs dataset.image_size, to crop to; got 0.")
    if config.dataset.validation and "[" in config.dataset.train_split:
        raise UserError(
            "dataset.validation divides a whole split, got dataset.train_split="
            f"{config.dataset.train_split!r}; set train_split and test_split to slices instead."
        )
    try:
        re.compile(config.shift.layers)
    except re.error as error:
        raise UserError(
            f"shift.layers must be a regular expression, got {config.shift.layers!r}: {error}."
        ) from error


def validate_devices(config: ConfigDict, num_devices: int) -> None:
    """Checks the config against the number of devices of all hosts; raises UserError."""
    if config.batch_size % num_devices:
        raise UserError(
            f"batch_size must be divisible by the {num_devices} devices, got {config.batch_size}; "
            "change it, or let JAX see fewer devices (CUDA_VISIBLE_DEVICES=0, for example)."
        )
    try:
        SecondForward(config.double_forward, config.double_forward_fraction).num_examples(
            config.batch_size // num_devices
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    if config.norm.sync == "group" and num_devices % config.norm.sync_group_size:
        raise UserError(
            f"norm.sync_group_size must divide the {num_devices} devices, got "
            f"{config.norm.sync_group_size}."
        )
    virtual = config.norm.virtual_batch_size
    synced = synced_devices(config, num_devices)
    if virtual and (virtual % synced or config.batch_size // num_devices * synced % virtual):
        raise UserError(
            f"norm.virtual_batch_size must be a multiple of the {synced} devices that share "
            f"statistics, and divide their {config.batch_size // num_devices * synced} examples of "
            f"a batch, got {virtual}."
        )


def dataset_splits(config: ConfigDict) -> tuple[str, str]:
    """Returns the TFDS splits that are trained and evaluated on.

    >>> config = default_config()
    >>> config.dataset.validation = True
    >>> dataset_splits(config)
    ('train[:90%]', 'train[90%:]')
    """
    train, test = config.dataset.train_split, config.dataset.test_split
    return (f"{train}[:90%]", f"{train}[90%:]") if config.dataset.validation else (train, test)


def memory_capacity(config: ConfigDict) -> int:
    """Returns the slots that memories have room for."""
    return config.norm.memory_capacity or config.norm.memory_size


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


def steps_per_epoch(config: ConfigDict, num_examples: int) -> int:
    """Returns the steps in which every example is seen about once; a rest waits for the next."""
    return num_examples // config.batch_size


def total_steps(config: ConfigDict, num_examples: int) -> int:
    """Returns the steps of the whole run."""
    return int(config.num_epochs * steps_per_epoch(config, num_examples))


def fields(config: ConfigDict) -> dict[str, Any]:
    """Returns the values of all fields by dotted name, as JSON keeps them.

    >>> fields(default_config())['norm.memory_size']
    64
    """
    return flattened(json.loads(config.to_json()))


def flattened(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the leaves of a nested dict by dotted name.

    >>> flattened({'norm': {'decay': 0.5}, 'seed': 0})
    {'norm.decay': 0.5, 'seed': 0}
    """
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            leaves |= {f"{name}.{key}": leaf for key, leaf in flattened(value).items()}
        else:
            leaves[name] = value
    return leaves


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Returns in words which `fields` differ, or '' where none do.

    A field that did not exist before had its default.

    >>> now = fields(default_config())
    >>> changes({**now, 'seed': 3}, now)
    'seed was 3 and is 0'
    """
    before = {**fields(default_config()), **before}
    names = sorted(k for k in {**before, **now} if before.get(k) != now.get(k))
    return ", ".join(f"{k} was {before.get(k)!r} and is {now.get(k)!r}" for k in names)


def traced_values(config: ConfigDict) -> dict[str, np.generic]:
    """Returns the values of the fields that a compiled program takes as data, by dotted name."""
    return {field: dtype(_lookup(config, field)) for field, dtype in TRACED.items()}


def with_values(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    """Returns a copy with some fields, by dotted name, set to values that may be traced."""
    config = config.copy_and_resolve_references().unlock()
    with config.ignore_type():
        for field, value in values.items():
            *groups, name = field.split(".")
            group = config
            for key in groups:
                group = group[key]
            group[name] = value
    return config


def program_key(config: ConfigDict) -> str:
    """Returns a text that is equal for configs which one compiled program serves.

    >>> config = default_config()
    >>> key = program_key(config)
    >>> config.norm.decay = 0.5
    >>> program_key(config) == key
    True
    """
    static = {k: v for k, v in fields(config).items() if k not in TRACED and k not in HOST}
    static["norm.memory_capacity"] = memory_capacity(config)
    static["norm.memory_schedule"] = config.norm.memory_schedule.start_size > 0
    return json.dumps(static, sort_keys=True)


def _lookup(config: ConfigDict, field: str):
    value = config
    for key in field.split("."):
        value = value[key]
    return value


def _choice(config: ConfigDict, field: str, choices) -> None:
    value = _lookup(config, field)
    if value in choices:
        return
    close = difflib.get_close_matches(str(value), choices, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise UserError(f"{field} must be one of {', '.join(choices)}, got {value!r}.{hint}")


def _number(config: ConfigDict, field: str, expected: str, is_valid: Callable) -> None:
    value = _lookup(config, field)
    if not isinstance(value, int | float) or not math.isfinite(value) or not is_valid(value):
        raise UserError(f"{field} must be {expected}, got {value}.")
