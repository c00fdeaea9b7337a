"""What a configuration stands for: data, network, optimizer and what a device runs."""

import dataclasses
import functools
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from ml_collections import ConfigDict

from mbn_jax.core.batch_stats import (
    inference_statistics,
    layers_with_statistics,
)
from mbn_jax.core.moments import Moments
from mbn_jax.datasets.images import Split, load_split
from mbn_jax.datasets.pipeline import (
    BatchOrder,
    augment,
    example_keys,
    pixel_statistics,
    standardize,
    take,
)
from mbn_jax.errors import UserError
from mbn_jax.models import build_model
from mbn_jax.parallel.devices import AXIS_NAME
from mbn_jax.statistics.recalibration import LAYERS_WITH_STATISTICS, add_moments, record_norm_inputs
from mbn_jax.step.state import TrainState
from mbn_jax.step.train_step import make_train_step
from mbn_jax.training import config as config_lib
from mbn_jax.training.norms import LAYERS, build_norm
from mbn_jax.training.optimizers import build_optimizer, build_schedule

PyTree = Any
Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A checked configuration, its data, and what one device computes.

    The functions of a device take `values`, the fields of `mbn_jax.training.config.TRACED` by name,
    as data: compiled once, they serve every config that differs in these alone.

    Attributes:
      config: of the run.
      train: the training split.
      test: the split that evaluation is reported on.
      pixel_mean: `[channels]`, of the training split.
      pixel_std: `[channels]`, likewise.
      num_devices: over which a run of it is spread, on all hosts.
    """

    config: ConfigDict
    train: Split
    test: Split
    pixel_mean: np.ndarray
    pixel_std: np.ndarray
    num_devices: int

    @classmethod
    def build(cls, config: ConfigDict, *, num_devices: int | None = None) -> "Experiment":
        """Checks the configuration and opens its data; nothing compiles.

        Args:
          config: of the run.
          num_devices: default: all that there are.

        Raises:
          UserError: for a configuration or data set that cannot work.
        """
        num_devices = num_devices or jax.device_count()
        config_lib.validate(config)
        train_split, test_split = config_lib.dataset_splits(config)
        train = load_dataset_split(config, train_split)
        config_lib.validate_examples(config, len(train))
        test = load_dataset_split(config, test_split)
        config_lib.validate_devices(config, num_devices)
        pixel_mean, pixel_std = pixel_statistics(train)
        experiment = cls(config, train, test, pixel_mean, pixel_std, num_devices)
        experiment.order(config)
        try:
            with record_norm_inputs(LAYERS, config.shift.layers) as layers:
                jax.eval_shape(experiment.initial_state, config_lib.traced_values(config))
        except (ValueError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"The network {config.model.name!r} with norm {config.norm.name!r} cannot take "
                f"images of {train.image_shape}: {reason}"
            ) from error
        if config.shift.every_steps and not layers:
            raise UserError(
                f"shift.layers={config.shift.layers!r} matches no normalization layer of "
                f"{config.model.name!r}; '' matches all."
            )
        return experiment

    @property
    def total_steps(self) -> int:
        """Of a run."""
        return config_lib.total_steps(self.config, len(self.train))

    @property
    def local_statistics(self) -> bool:
        """Whether devices may hold different statistics."""
        return self.config.norm.sync != "sync"

    def order(self, config: ConfigDict) -> BatchOrder:
        """Returns the order of the training examples under the seed of `config`."""
        return BatchOrder(
            self.train,
            seed=config.seed,
            batch_size=config.batch_size,
            classes_per_batch=config.dataset.classes_per_batch,
        )

    def schedule(self, config: ConfigDict) -> optax.Schedule:
        """Returns the learning rate by step under the rate of `config`."""
        steps_per_epoch = config_lib.steps_per_epoch(config, len(self.train))
        return build_schedule(config, steps_per_epoch=steps_per_epoch, total_steps=self.total_steps)

    def _with(self, values: Batch) -> ConfigDict:
        capacity = config_lib.memory_capacity(self.config)
        if not self.config.norm.memory_schedule.start_size:  # No schedule, statically.
            values = {k: v for k, v in values.items() if k != "norm.memory_schedule.start_size"}
        return config_lib.with_values(self.config, {**values, "norm.memory_capacity": capacity})

    def model(self, values: Batch, *, remat: bool | None = None) -> nn.Module:
        """Returns the network, its memory by the size and decay of `values`.

        Args:
          values: of the run.
          remat: in place of `config.model.remat`: False to look into the network from outside,
            which `nn.remat` does not allow.
        """
        config = self._with(values)
        norm = build_norm(config, self.num_devices, self.total_steps)
        if remat is not None:
            config.model.remat = remat
        return build_model(config, num_classes=self.train.num_classes, norm=norm)

    def optimizer(self, values: Batch) -> optax.GradientTransformation:
        """Returns the optimizer, with the learning rate and weight decay of `values`."""
        config = self._with(values)
        return build_optimizer(config, self.schedule(config))

    def initial_state(self, values: Batch) -> TrainState:
        """Returns the state before the first step, a function of the seed alone."""
        init_key, run_key, _ = _keys(values)
        images = jnp.zeros((1, *self.train.image_shape), jnp.float32)
        variables = self.model(values).init(init_key, images, train=False)
        return TrainState.create(variables, self.optimizer(values), run_key)

    def images(self, batch: Batch) -> jax.Array:
        """Returns the standardized images of a batch, float32."""
        return standardize(batch["image"], self.pixel_mean, self.pixel_std)

    def augmented(self, values: Batch, batch: Batch, step: jax.Array) -> Batch:
        """Returns a device's batch with its images standardized, and augmented as of `step`."""
        options = self.config.dataset
        size = batch["label"].shape[0]
        # In the global batch, so that the draws do not depend on the number of devices.
        positions = jax.lax.axis_index(AXIS_NAME) * size + jnp.arange(size)
        keys = example_keys(_keys(values)[2], step, positions)
        images = augment(
            self.images(batch), keys, crop_padding=options.crop_padding, flip=options.flip
        )
        return {**batch, "image": images}

    def batch_of_step(self, values: Batch, state: TrainState, data: Batch, block: Batch) -> Batch:
        """Returns this device's part of the batch that the state's next step trains on.

        Args:
          values: of the run.
          state: of the device.
          data: the training split, or empty where batches come decoded.
          block: `[steps, local batch, ...]`, and 'first_step', the step of its first entry.
        """
        at = state.step - block["first_step"]
        batch = take(data, {k: x[at] for k, x in block.items() if k != "first_step"})
        return self.augmented(values, batch, state.step)

    def inference_statistics(
        self, batch_stats: PyTree, values: Batch
    ) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Returns (mean, var) that each layer normalizes by at inference, by its path."""
        return {
            path: inference_statistics(stats)
            for path, stats in layers_with_statistics(batch_stats).items()
        }

    def step(self, values: Batch) -> Callable:
        """Returns the training step of a device."""
        return make_train_step(
            self.model(values).apply,
            self.optimizer(values),
            classification_loss,
            double_forward=self.config.double_forward,
            double_forward_fraction=self.config.double_forward_fraction,
            axis_name=AXIS_NAME,
            local_statistics=self.local_statistics,
        )

    def dispatch(
        self, state: TrainState, values: Batch, data: Batch, block: Batch, *, num_steps: int
    ) -> tuple[TrainState, Batch]:
        """Runs the steps of one dispatch on one device.

        Args:
          state: of the device.
          values: of the run.
          data: the training split, or empty where batches come decoded.
          block: as `batch_of_step` takes it.
          num_steps: of this dispatch.

        Returns:
          The new state, and metrics `[steps]`.
        """
        step = self.step(values)

        def one(state: TrainState, _) -> tuple[TrainState, Batch]:
            return step(state, self.batch_of_step(values, state, data, block))

        if num_steps > 1:
            # XLA's CPU compiler brings the convolutions of a backward pass into the form that it
            # has a fast kernel for, but not inside a loop, where they are many times slower.
            unroll = jax.default_backend() == "cpu"
            return jax.lax.scan(one, state, length=num_steps, unroll=unroll)
        state, metrics = one(state, None)  # Not as a loop of one, for that.
        return state, jax.tree.map(lambda x: x[None], metrics)

    def evaluate(
        self,
        totals: Batch,
        values: Batch,
        params: PyTree,
        batch_stats: PyTree,
        data: Batch,
        batch: Batch,
    ) -> Batch:
        """Adds a batch's summed loss, wrong predictions and count, of all devices, to `totals`."""
        batch = take(data, batch)
        variables = {"params": params, "batch_stats": batch_stats}
        logits = self.model(values).apply(variables, self.images(batch), train=False)
        logits = jnp.asarray(logits)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        sums = {
            "loss": jnp.sum(jnp.where(batch["mask"], loss, 0)),
            "wrong": jnp.sum((logits.argmax(-1) != batch["label"]) & batch["mask"]),
            "count": jnp.sum(batch["mask"]),
        }
        return jax.tree.map(jnp.add, totals, jax.lax.psum(sums, AXIS_NAME))

    def norm_inputs(
        self,
        totals: dict[str, Moments],
        values: Batch,
        params: PyTree,
        batch_stats: PyTree,
        data: Batch,
        batch: Batch,
        *,
        recalibrate: bool,
    ) -> dict[str, Moments]:
        """Adds one batch, at inference and augmented, to the moments of what the norms are given.

        Args:
          totals: by layer, or empty before the first batch.
          values: of the run.
          params: of the network.
          batch_stats: that inference goes by.
          data: the split, or empty where batches come decoded.
          batch: as `evaluation_batches` yields them, and 'number', which one it is.
          recalibrate: normalize by the batch's own statistics, those of all devices, instead; and
            record the layers that have any. Else those of `config.shift.layers`.

        Returns:
          The moments over all devices and batches so far, by layer.
        """
        examples = take(data, {k: v for k, v in batch.items() if k not in ("mask", "number")})
        images = self.augmented(values, examples, batch["number"])["image"]
        variables = {"params": params, "batch_stats": batch_stats}
        with record_norm_inputs(
            LAYERS_WITH_STATISTICS if recalibrate else LAYERS,
            "" if recalibrate else self.config.shift.layers,
            mask=batch["mask"],
            axis_name=AXIS_NAME,
            normalize_by_them=recalibrate,
        ) as recorded:
            mutable = ["batch_stats"] if recalibrate else False
            model = self.model(values, remat=False)
            model.apply(variables, images, train=False, mutable=mutable)
        return add_moments(totals, recorded)


def _keys(values: Batch) -> jax.Array:
    """Returns the random keys of initialization, of the steps and of the augmentation."""
    return jax.random.split(jax.random.key(values["seed"]), 3)


def classification_loss(apply, batch: Batch):
    """Returns mean cross-entropy, {'error': share of wrong predictions} and the updates."""
    logits, updates = apply(batch["image"], train=True)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    error = jnp.mean(logits.argmax(-1) != batch["label"])
    return loss.mean(), ({"error": error}, updates)


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


# Runs of one process share what is in memory: decoding takes longer than many a run.
_load_split_once = functools.lru_cache(maxsize=4)(load_split)
_loading = threading.Lock()
