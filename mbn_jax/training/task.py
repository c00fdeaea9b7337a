"""What a configuration stands for: its data, network and optimizer."""

import dataclasses
import functools
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from ml_collections import ConfigDict

from mbn_jax.datasets.augmentation import standardize
from mbn_jax.datasets.batches import pixel_statistics
from mbn_jax.datasets.order import BatchOrder
from mbn_jax.datasets.split import Split
from mbn_jax.datasets.tfds_splits import load_split
from mbn_jax.errors import UserError
from mbn_jax.models import build_model
from mbn_jax.statistics.recalibration import record_norm_inputs
from mbn_jax.training.config import (
    dataset_splits,
    static_config,
    steps_per_epoch,
    total_steps,
)
from mbn_jax.training.hparams import HParams
from mbn_jax.training.norms import LAYERS, build_norm
from mbn_jax.training.optimizers import build_optimizer, build_schedule
from mbn_jax.training.rules import validate, validate_devices, validate_examples


@dataclasses.dataclass(frozen=True)
class Task:
    """What all runs of one static configuration share, checked.

    Attributes:
      config: the static configuration (see `mbn_jax.training.config.static_config`); the numbers of
        a run come as `HParams`.
      train: training split.
      test: split that runs are evaluated on.
      pixel_mean: `[channels]`, of the training split.
      pixel_std: `[channels]`, of the training split.
      num_devices: devices that a run is spread over, on all hosts.
    """

    config: ConfigDict
    train: Split
    test: Split
    pixel_mean: np.ndarray
    pixel_std: np.ndarray
    num_devices: int

    @classmethod
    def build(cls, config: ConfigDict, *, num_devices: int | None = None) -> "Task":
        """Checks a run configuration and opens its data; compiles nothing.

        Args:
          config: run configuration.
          num_devices: devices to run on; default: all devices of all hosts.

        Raises:
          UserError: for a configuration or data set that cannot work.
        """
        num_devices = num_devices or jax.device_count()
        validate(config)
        train_split, test_split = dataset_splits(config)
        train = load_dataset_split(config, train_split)
        validate_examples(config, len(train))
        test = load_dataset_split(config, test_split)
        _check_splits(config, train, test)
        validate_devices(config, num_devices)
        task = cls(static_config(config), train, test, *pixel_statistics(train), num_devices)
        task.order(config.seed)
        _check_network(task)
        return task

    @property
    def steps_per_epoch(self) -> int:
        """Training steps of an epoch."""
        return steps_per_epoch(self.config, len(self.train))

    @property
    def total_steps(self) -> int:
        """Total training steps."""
        return total_steps(self.config, len(self.train))

    @property
    def local_statistics(self) -> bool:
        """Whether devices may hold different statistics."""
        return self.config.norm.sync != "sync"

    def order(self, seed: int) -> BatchOrder:
        """Returns the order of the training examples; raises UserError as `BatchOrder`."""
        return BatchOrder(
            self.train,
            seed=seed,
            batch_size=self.config.batch_size,
            classes_per_batch=self.config.dataset.classes_per_batch,
        )

    def standardized(self, images: jax.Array) -> jax.Array:
        """Returns images as the network takes them, float32."""
        return standardize(images, self.pixel_mean, self.pixel_std)

    def model(self, hparams: HParams, *, remat: bool | None = None) -> nn.Module:
        """Returns the network.

        Args:
          hparams: memory size and decay of its norms.
          remat: replaces `config.model.remat`. False lets the network's layers be intercepted,
            which `nn.remat` does not allow.
        """
        norm = build_norm(self.config, hparams, self.num_devices, self.total_steps)
        config = self.config
        if remat is not None:
            config = config.copy_and_resolve_references()
            config.model.remat = remat
        return build_model(config, num_classes=self.train.num_classes, norm=norm)

    def schedule(self, hparams: HParams) -> optax.Schedule:
        """Returns the learning rate as a function of the step."""
        return build_schedule(
            self.config,
            hparams,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
        )

    def optimizer(self, hparams: HParams) -> optax.GradientTransformation:
        """Returns the optimizer."""
        return build_optimizer(self.config, hparams, self.schedule(hparams))


def _check_splits(config: ConfigDict, train: Split, test: Split) -> None:
    """Raises UserError if training and evaluation share examples."""
    shared = train.count_shared(test)
    if shared:
        raise UserError(
            f"dataset.train_split={train.name!r} and test_split={test.name!r} of "
            f"{config.dataset.name!r} must be apart, and share {shared} examples; choose other "
            "splits, 'train[:90%]' and 'train[90%:]' for example."
        )


def _check_network(task: Task) -> None:
    """Raises UserError if the network cannot take the images, or has no layer to measure."""
    config = task.config

    def init(hparams: HParams) -> Any:
        images = jnp.zeros((1, *task.train.image_shape), jnp.float32)
        return task.model(hparams).init(jax.random.key(0), images, train=False)

    try:
        with record_norm_inputs(LAYERS, config.shift.layers) as layers:
            jax.eval_shape(init, HParams.from_config(config).as_arrays())
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"The network {config.model.name!r} with norm {config.norm.name!r} cannot take "
            f"images of {task.train.image_shape}: {reason}"
        ) from error
    if config.shift.every_steps and not layers:
        raise UserError(
            f"shift.layers={config.shift.layers!r} matches no normalization layer of "
            f"{config.model.name!r}; '' matches all."
        )


def load_dataset_split(config: ConfigDict, split: str) -> Split:
    """Opens a split of the data set of `config.dataset`, once; raises UserError as `load_split`."""
    options = config.dataset
    with _loading:
        return _load_split_once(
            options.name,
            split,
            data_dir=options.data_dir or None,
            image_size=options.image_size,
            random_resized_crop=options.random_resized_crop,
            max_bytes_in_memory=options.max_bytes_in_memory,
        )


# The runs of a process share their splits, because decoding takes longer than many a run.
_load_split_once = functools.lru_cache(maxsize=4)(load_split)
_loading = threading.Lock()
