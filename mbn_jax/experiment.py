"""What a configuration stands for: data, network, optimizer and what a device runs."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from ml_collections import ConfigDict

from mbn_jax import config as config_lib
from mbn_jax.datasets.images import Split, load_split
from mbn_jax.datasets.pipeline import augment, example_keys, pixel_statistics, standardize, take
from mbn_jax.double_forward import TrainState, make_train_step
from mbn_jax.models import build_model
from mbn_jax.norms import build_norm
from mbn_jax.optimizers import build_optimizer, build_schedule
from mbn_jax.parallel import AXIS_NAME, replicate

PyTree = Any
Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A checked configuration and all that is built from it.

    Attributes:
      config: of the run.
      train: the training split.
      test: the split that evaluation is reported on.
      pixel_mean: `[channels]`, of the training split.
      pixel_std: `[channels]`, likewise.
      model: the network.
      schedule: learning rate by step.
      tx: the optimizer.
      total_steps: of the run.
    """

    config: ConfigDict
    train: Split
    test: Split
    pixel_mean: np.ndarray
    pixel_std: np.ndarray
    model: nn.Module
    schedule: optax.Schedule
    tx: optax.GradientTransformation
    total_steps: int

    @classmethod
    def build(cls, config: ConfigDict) -> "Experiment":
        """Checks the configuration, opens its data and builds the rest; nothing compiles.

        Raises:
          UserError: for a configuration or data set that cannot work.
        """
        config_lib.validate(config)
        train = load_dataset_split(config, config.dataset.train_split)
        config_lib.validate_examples(config, len(train))
        test = load_dataset_split(config, config.dataset.test_split)
        total_steps = config_lib.total_steps(config, len(train))
        steps_per_epoch = config_lib.steps_per_epoch(config, len(train))
        schedule = build_schedule(config, steps_per_epoch=steps_per_epoch, total_steps=total_steps)
        pixel_mean, pixel_std = pixel_statistics(train)
        return cls(
            config=config,
            train=train,
            test=test,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
            model=build_model(
                config,
                num_classes=train.num_classes,
                norm=build_norm(config, jax.device_count()),
            ),
            schedule=schedule,
            tx=build_optimizer(config, schedule),
            total_steps=total_steps,
        )

    @property
    def local_statistics(self) -> bool:
        """Whether devices may hold different statistics."""
        return self.config.norm.sync != "sync"

    def initial_state(self) -> TrainState:
        """Returns the state before the first step, a function of the seed alone."""
        init_key, run_key, _ = self._keys()
        images = jnp.zeros((1, *self.train.image_shape), jnp.float32)
        init = jax.jit(functools.partial(self.model.init, train=False))
        return TrainState.create(init(init_key, images), self.tx, run_key)

    def _keys(self) -> jax.Array:
        """Returns the random keys of initialization, of the steps and of the augmentation."""
        return jax.random.split(jax.random.key(self.config.seed), 3)

    def images(self, batch: Batch) -> jax.Array:
        """Returns the standardized images of a batch, float32."""
        return standardize(batch["image"], self.pixel_mean, self.pixel_std)

    def dispatch(self, state: TrainState, data: Batch, batch: Batch) -> tuple[TrainState, Batch]:
        """Runs the steps of one dispatch on one device.

        Args:
          state: of the device.
          data: the training split, or empty where batches come decoded.
          batch: `[steps, local batch, ...]`.

        Returns:
          The new state, and metrics `[steps]`.
        """
        options = self.config.dataset
        step = make_train_step(
            self.model.apply,
            self.tx,
            classification_loss,
            double_forward=self.config.double_forward,
            axis_name=AXIS_NAME,
        )

        def one(state: TrainState, batch: Batch) -> tuple[TrainState, Batch]:
            batch = take(data, batch)
            size = batch["label"].shape[0]
            # In the global batch, so that the draws do not depend on the number of devices.
            positions = jax.lax.axis_index(AXIS_NAME) * size + jnp.arange(size)
            keys = example_keys(self._keys()[2], state.step, positions)
            images = augment(
                self.images(batch), keys, crop_padding=options.crop_padding, flip=options.flip
            )
            return step(state, {**batch, "image": images})

        if jax.tree.leaves(batch)[0].shape[0] > 1:
            return jax.lax.scan(one, state, batch)
        # Not as a loop of one: convolutions in a loop body are many times slower on CPU.
        state, metrics = one(state, jax.tree.map(lambda x: x[0], batch))
        return state, jax.tree.map(lambda x: x[None], metrics)


def classification_loss(apply, batch: Batch):
    """Returns mean cross-entropy, {'error': share of wrong predictions} and the updates."""
    logits, updates = apply(batch["image"], train=True)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    error = jnp.mean(logits.argmax(-1) != batch["label"])
    return loss.mean(), ({"error": error}, updates)


def device_data(split: Split) -> Batch:
    """Returns the split's arrays on every device, or nothing where it is decoded as it is used."""
    if split.images is None:
        return {}
    return replicate({"image": split.images, "label": split.labels})


def load_dataset_split(config: ConfigDict, split: str) -> Split:
    """Opens a split of the data set of `config.dataset`; raises UserError as `load_split`."""
    options = config.dataset
    return load_split(
        options.name,
        split,
        data_dir=options.data_dir or None,
        image_size=options.image_size,
        max_bytes_in_memory=options.max_bytes_in_memory,
    )
