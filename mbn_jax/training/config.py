"""The run configuration: its fields, with their defaults, checks and meanings."""

import functools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict, FieldReference

from mbn_jax.core.double_forward import DOUBLE_FORWARD
from mbn_jax.core.gradient import GRADIENTS
from mbn_jax.datasets.find import DATASETS
from mbn_jax.models import MODELS
from mbn_jax.models.convolution import CONVOLUTIONS
from mbn_jax.names import import_path
from mbn_jax.training.config_files import with_free_kwargs
from mbn_jax.training.field_checks import (
    ANY,
    BELOW_ONE,
    MEMORY_SIZE,
    PATTERN,
    POSITIVE,
    SEED,
    UP_TO_ONE,
    WIDTHS,
    Check,
    at_least,
    choice,
    name_of,
)
from mbn_jax.training.hparams import HPARAM_FIELDS
from mbn_jax.training.losses import LOSSES
from mbn_jax.training.norms import NORMS, SYNCS, memory_capacity
from mbn_jax.training.optimizers import OPTIMIZERS, SCHEDULES


class Field(NamedTuple):
    """One field of the configuration.

    Attributes:
      default: default value; its type is that of the field.
      check: what the value may be (`mbn_jax.training.checks` has the checks between fields).
      meaning: what the field means.
      host_only: whether no compiled program depends on it.
    """

    default: Any
    check: Check
    meaning: str
    host_only: bool = False


FIELDS = {
    "seed": Field(0, SEED, "seed of parameters, order, augmentation and dropout"),
    "batch_size": Field(128, at_least(1), "global batch size: over all devices and hosts"),
    "num_epochs": Field(10.0, POSITIVE, "epochs to train for"),
    "init_from": Field("", ANY, "workdir of a run whose weights to start with", host_only=True),
    "import_dir": Field("", ANY, "folder of the modules that names import", host_only=True),
    # Data.
    "dataset.name": Field("digits", ANY, "TFDS name of an image-classification data set"),
    "dataset.standardize": Field(True, ANY, "scale 'image' by the mean and deviation of channels"),
    "dataset.data_dir": Field("", ANY, "folder of TFDS data sets; empty: that of TFDS"),
    "dataset.train_split": Field("train", ANY, "TFDS split to train on"),
    "dataset.test_split": Field("test", ANY, "TFDS split to evaluate on"),
    "dataset.validation": Field(False, ANY, "evaluate on a held-out tenth of train_split"),
    "dataset.image_size": Field(0, at_least(0), "resize to this height and width; 0: as stored"),
    "dataset.random_resized_crop": Field(False, ANY, "augmentation on the host, to image_size"),
    "dataset.crop_padding": Field(0, at_least(0), "augmentation: pad, and crop at random"),
    "dataset.flip": Field(False, ANY, "augmentation: mirror half of the images"),
    "dataset.classes_per_batch": Field(0, at_least(0), "most classes in one batch; 0: all"),
    "dataset.max_bytes_in_memory": Field(4 << 30, at_least(0), "larger splits are decoded as used"),
    "dataset.num_workers": Field(0, at_least(0), "processes that decode images; 0: threads"),
    # Network.
    "model.name": Field("convnet", name_of(MODELS), "network"),
    "model.features": Field((16, 32, 32, 64), WIDTHS, "channels of each layer of 'convnet'"),
    "model.zero_init_last_scale": Field(False, ANY, "residual blocks start as the identity"),
    "model.remat": Field(False, ANY, "keep less for the backward pass, recompute it there"),
    "model.conv": Field("plain", choice(CONVOLUTIONS), "kernels: as they are, or of mean 0"),
    "model.dtype": Field("float32", choice(("float32", "bfloat16")), "dtype of the computation"),
    # Normalization.
    "norm.name": Field("memorized", name_of(NORMS), "normalization layer"),
    "norm.epsilon": Field(1e-5, POSITIVE, "added to variances"),
    "norm.use_fast_variance": Field(True, ANY, "compute moments in one pass"),
    "norm.sync": Field("sync", choice(SYNCS), "devices that share statistics: all, groups, none"),
    "norm.sync_group_size": Field(1, at_least(1), "devices in a group of norm.sync='group'"),
    "norm.virtual_batch_size": Field(0, at_least(0), "examples normalized together; 0: all"),
    "norm.momentum": Field(0.9, BELOW_ONE, "of moving averages ('batch' and its kin)"),
    "norm.num_groups": Field(8, at_least(1), "groups of channels of 'group'"),
    "norm.memory_size": Field(64, MEMORY_SIZE, "batches in the memory; 0: an endless memory"),
    "norm.memory_capacity": Field(0, at_least(0), "slots of the memory; 0: norm.memory_size"),
    "norm.decay": Field(0.97, UP_TO_ONE, "weight of a batch relative to the next newer one"),
    "norm.gradient": Field("auto", choice(GRADIENTS), "gradient through the memory's statistics"),
    "norm.memory_schedule.start_size": Field(0, at_least(0), "memory size at begin; 0: no growth"),
    "norm.memory_schedule.begin": Field(0.0, ANY, "share of the run where linear growth begins"),
    "norm.memory_schedule.end": Field(1.0, ANY, "share of the run where growth ends"),
    "norm.batch_renorm.r_max": Field(3.0, at_least(1), "final limit of the correction's scale"),
    "norm.batch_renorm.d_max": Field(5.0, at_least(0), "final limit of the correction's offset"),
    "norm.batch_renorm.begin": Field(0.03, at_least(0), "share of the run where limits first rise"),
    "norm.batch_renorm.r_end": Field(0.25, at_least(0), "share of the run where r_max is reached"),
    "norm.batch_renorm.d_end": Field(0.15, at_least(0), "share of the run where d_max is reached"),
    # Training step.
    "double_forward": Field("rewrite", choice(DOUBLE_FORWARD), "what the second forward does"),
    "double_forward_fraction": Field(1.0, UP_TO_ONE, "share of examples in the second forward"),
    "gradient_clip_norm": Field(0.0, at_least(0), "largest norm of the gradient; 0: no limit"),
    # Optimizer.
    "optimizer.name": Field("sgd", name_of(OPTIMIZERS), "optimizer"),
    "optimizer.learning_rate": Field(0.1, POSITIVE, "learning rate before its schedule"),
    "optimizer.momentum": Field(0.9, BELOW_ONE, "momentum of 'sgd'"),
    "optimizer.nesterov": Field(False, ANY, "Nesterov momentum for 'sgd'"),
    "optimizer.weight_decay": Field(0.0, at_least(0), "weight decay"),
    "optimizer.decay_norm_params": Field(False, ANY, "decay scales and biases too"),
    "loss.name": Field("cross_entropy", name_of(LOSSES), "loss, and the metrics beside it"),
    "schedule.name": Field("cosine", choice(SCHEDULES), "learning rate over the run"),
    "schedule.warmup_epochs": Field(0.0, at_least(0), "epochs of a linear warm-up"),
    "schedule.step_epochs": Field((5.0, 7.5), ANY, "epochs at which the rate of 'step' falls"),
    "schedule.step_factor": Field(0.1, POSITIVE, "factor by which the rate of 'step' falls"),
    # Run.
    "steps_per_dispatch": Field(1, at_least(1), "training steps in one call of the devices"),
    "eval_batch_size": Field(512, at_least(1), "rounded up to a multiple of the devices"),
    "recalibrate_batches": Field(0, at_least(0), "batches to evaluate by, too; 0: none"),
    "log_every_steps": Field(100, at_least(1), "steps between records", host_only=True),
    "eval_every_steps": Field(
        0, at_least(0), "steps between evaluations; 0: epoch", host_only=True
    ),
    "checkpoint_every_steps": Field(0, at_least(0), "as for evaluations", host_only=True),
    "keep_checkpoints": Field(3, at_least(1), "newest checkpoints to keep", host_only=True),
    "keep_best": Field(False, ANY, "keep the checkpoint of lowest test error too", host_only=True),
    # Measurement of distribution shift.
    "shift.every_steps": Field(0, at_least(0), "steps between measurements; 0: none"),
    "shift.examples": Field(0, at_least(0), "training examples for the population; 0: all"),
    "shift.layers": Field("", PATTERN, "regular expression; empty: all norm layers"),
}
"""All fields by dotted name, but those of `kwargs`."""

NAMED: dict[str, Mapping[str, Any]] = {
    "dataset": DATASETS,
    "model": MODELS,
    "norm": NORMS,
    "loss": LOSSES,
    "optimizer": OPTIMIZERS,
}
"""The groups of fields with a `name` and any `kwargs`, and their short names.

`dataset.name` may be the name of a TFDS data set, too.
"""


class NamedGroup(ConfigDict):
    """A group of fields with a `name`, which may be set to a class or function of a module."""

    def __setitem__(self, key: str, value: Any) -> None:
        """Sets a field; an object for a name becomes its import path."""
        if key == "name" and callable(value) and not isinstance(value, FieldReference):
            value = import_path(value, "name")
        super().__setitem__(key, value)


def default_config() -> ConfigDict:
    """Returns every field with its default; a config file changes a few of them.

    >>> default_config().norm.name
    'memorized'
    """
    config = ConfigDict()
    for name, field in FIELDS.items():
        *groups, leaf = name.split(".")
        group = config
        for key in groups:
            if key not in group:
                group[key] = NamedGroup({"kwargs": ConfigDict()}) if key in NAMED else ConfigDict()
            group = group[key]
        group[leaf] = field.default
    return with_free_kwargs(config.lock())  # A misspelt field in a config file is an error.


def field_value(config: ConfigDict, name: str) -> Any:
    """Returns the value of a field by its dotted name."""
    return functools.reduce(lambda group, key: group[key], name.split("."), config)


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
    """Names the fields that differ between two results of `fields`; '' where none do.

    A field that `before` does not have had its default.

    >>> now = fields(default_config())
    >>> changes({**now, 'seed': 3}, now)
    'seed was 3 and is 0'
    """
    before = {**fields(default_config()), **before}
    names = sorted(k for k in {**before, **now} if before.get(k) != now.get(k))
    return ", ".join(f"{k} was {before.get(k)!r} and is {now.get(k)!r}" for k in names)


def steps_per_epoch(config: ConfigDict, num_examples: int) -> int:
    """Returns the whole batches of an epoch; left-over examples begin the next one."""
    return num_examples // config.batch_size


def total_steps(config: ConfigDict, num_examples: int) -> int:
    """Returns the total training steps."""
    return int(config.num_epochs * steps_per_epoch(config, num_examples))


def dataset_splits(config: ConfigDict) -> tuple[str, str]:
    """Returns the TFDS splits to train and to evaluate on.

    >>> config = default_config()
    >>> config.dataset.validation = True
    >>> dataset_splits(config)
    ('train[:90%]', 'train[90%:]')
    """
    train, test = config.dataset.train_split, config.dataset.test_split
    return (f"{train}[:90%]", f"{train}[90%:]") if config.dataset.validation else (train, test)


def static_config(config: ConfigDict) -> ConfigDict:
    """Returns what a compiled program depends on, all else at fixed values.

    Two configurations share compiled programs if they are equal in this. Of the hyperparameters
    that programs take as data, it keeps whether the memory has an end and whether its size follows
    a schedule.

    >>> one, other = default_config(), default_config()
    >>> other.norm.decay = 0.5
    >>> static_config(one) == static_config(other)
    True
    """
    fixed = {
        name: field.default
        for name, field in FIELDS.items()
        if field.host_only or name in HPARAM_FIELDS
    }
    norm = config.norm
    fixed["norm.memory_size"] = min(norm.memory_size, 1)
    fixed["norm.memory_capacity"] = memory_capacity(config)
    fixed["norm.memory_schedule.start_size"] = min(norm.memory_schedule.start_size, 1)
    static = config.copy_and_resolve_references()
    static.update_from_flattened_dict(fixed)
    return static


def program_key(config: ConfigDict) -> str:
    """Returns a text that is equal for configurations that share compiled programs."""
    return json.dumps(fields(static_config(config)), sort_keys=True)
