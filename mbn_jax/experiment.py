"""What a configuration stands for: data, network, optimizer and what a device runs.

Three things, one on top of the other. An `Experiment` is checked configuration, data and the pure
functions of one device. A `Program` is an experiment compiled for its devices, with the data on
them. `Programs` keeps the programs that exist, so that runs which differ only in the numbers of
`mbn_jax.config.TRACED` share one.
"""

import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from ml_collections import ConfigDict

from mbn_jax import config as config_lib
from mbn_jax.datasets.images import Split, load_split
from mbn_jax.datasets.pipeline import (
    BatchOrder,
    augment,
    evaluation_batches,
    example_keys,
    pixel_statistics,
    standardize,
    take,
)
from mbn_jax.diagnostics import (
    inference_statistics,
    layers_with_statistics,
    record_norm_inputs,
    statistics_error,
    update_shift,
)
from mbn_jax.double_forward import TrainState, make_train_step
from mbn_jax.errors import UserError
from mbn_jax.models import build_model
from mbn_jax.norms import LAYERS, build_norm
from mbn_jax.optimizers import build_optimizer, build_schedule
from mbn_jax.parallel import (
    AXIS_NAME,
    Devices,
    distribute,
    first_device,
    gather_over_hosts,
    local_devices,
    map_over_devices,
    pool_over_devices,
    replicate,
    split_over_devices,
)
from mbn_jax.statistics import Moments, batch_moments, pool_groups

PyTree = Any
Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A checked configuration, its data, and what one device computes.

    The functions of a device take `values`, the fields of `mbn_jax.config.TRACED` by name, as data:
    compiled once, they serve every config that differs in these alone.

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
        train = load_dataset_split(config, config.dataset.train_split)
        config_lib.validate_examples(config, len(train))
        test = load_dataset_split(config, config.dataset.test_split)
        config_lib.validate_devices(config, num_devices)
        pixel_mean, pixel_std = pixel_statistics(train)
        experiment = cls(config, train, test, pixel_mean, pixel_std, num_devices)
        experiment.order(config)
        try:
            with record_norm_inputs(LAYERS, config.shift.layers, jnp.shape) as layers:
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
        capacity = self.config.norm.memory_capacity or self.config.norm.memory_size
        return config_lib.with_values(self.config, {**values, "norm.memory_capacity": capacity})

    def model(self, values: Batch) -> nn.Module:
        """Returns the network, its memory by the size and decay of `values`."""
        norm = build_norm(self._with(values), self.num_devices, self.total_steps)
        return build_model(self.config, num_classes=self.train.num_classes, norm=norm)

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

    def step(self, values: Batch) -> Callable:
        """Returns the training step of a device."""
        return make_train_step(
            self.model(values).apply,
            self.optimizer(values),
            classification_loss,
            double_forward=self.config.double_forward,
            axis_name=AXIS_NAME,
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
            return jax.lax.scan(one, state, length=num_steps)
        # Not as a loop of one: convolutions in a loop body are many times slower on CPU.
        state, metrics = one(state, None)
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

    def update_shift(
        self, state: TrainState, values: Batch, data: Batch, block: Batch
    ) -> dict[str, dict[str, jax.Array]]:
        """Measures what the next update does to the statistics of its own batch.

        Args:
          state: of the device, before the update; it stays as it is.
          values: of the run.
          data: the training split, or empty where batches come decoded.
          block: as `batch_of_step` takes it.

        Returns:
          `mbn_jax.diagnostics.update_shift` by layer; averaged over devices.
        """
        batch = self.batch_of_step(values, state, data, block)
        new, _ = self.step(values)(state, batch)
        synced = self.config.norm.sync == "sync"

        def moments(x: jax.Array) -> Moments:
            return _moments(x, axis_name=AXIS_NAME if synced else None)

        def inputs(params: PyTree) -> dict[str, Moments]:
            variables = {"params": params, "batch_stats": state.batch_stats}
            with record_norm_inputs(LAYERS, self.config.shift.layers, moments) as recorded:
                self.model(values).apply(
                    variables,
                    batch["image"],
                    train=True,
                    mutable=["batch_stats"],
                    rngs={"dropout": state.key},  # The same draws before and after.
                )
            return recorded

        before, after = inputs(state.params), inputs(new.params)
        stats = self._inference_statistics(state.batch_stats, values)
        shifts = {}
        for layer, moments_before in before.items():
            _, var = stats.get(layer.split("#")[0], (None, moments_before.var))
            epsilon = self.config.norm.epsilon
            shifts[layer] = update_shift(moments_before, after[layer], var, epsilon)
        return jax.lax.pmean(shifts, AXIS_NAME)

    def norm_inputs(
        self,
        totals: dict[str, Moments],
        values: Batch,
        params: PyTree,
        batch_stats: PyTree,
        data: Batch,
        batch: Batch,
    ) -> dict[str, Moments]:
        """Adds one batch, at inference and augmented, to the moments of what the norms are given.

        Args:
          totals: by layer, or empty before the first batch.
          values: of the run.
          params: of the network.
          batch_stats: that inference goes by.
          data: the split, or empty where batches come decoded.
          batch: as `evaluation_batches` yields them, and 'number', which one it is.

        Returns:
          The moments over all devices and batches so far, by layer.
        """
        mask = batch["mask"]
        examples = take(data, {k: v for k, v in batch.items() if k not in ("mask", "number")})
        batch = self.augmented(values, examples, batch["number"])

        def moments(x: jax.Array) -> Moments:
            return _moments(x, AXIS_NAME, mask.reshape(-1, *(1,) * (x.ndim - 1)))

        variables = {"params": params, "batch_stats": batch_stats}
        with record_norm_inputs(LAYERS, self.config.shift.layers, moments) as recorded:
            self.model(values).apply(variables, batch["image"], train=False)
        if not totals:
            return recorded
        both = jax.tree.map(lambda *x: jnp.stack(x), totals, recorded)
        return {layer: pool_groups(moments) for layer, moments in both.items()}

    def statistics_errors(
        self, population: dict[str, Moments], values: Batch, batch_stats: PyTree
    ) -> dict[str, dict[str, jax.Array]]:
        """Returns `mbn_jax.diagnostics.statistics_error` for each layer that keeps statistics."""
        stats = self._inference_statistics(batch_stats, values)
        errors = {}
        for layer, moments in population.items():
            if (path := layer.split("#")[0]) in stats:
                mean, var = stats[path]
                errors[layer] = statistics_error(mean, var, moments, self.config.norm.epsilon)
        return errors

    def _inference_statistics(self, batch_stats: PyTree, values: Batch):
        size, decay = values["norm.memory_size"], values["norm.decay"]
        return {
            path: inference_statistics(stats, size, decay)
            for path, stats in layers_with_statistics(batch_stats).items()
        }


class Program:
    """An experiment on its devices: compiled as it is needed, with its data.

    Attributes:
      experiment: what it runs.
      devices: on which; None: all, of all hosts.
      step_compilations: how often the training step was compiled.
    """

    def __init__(self, experiment: Experiment, data: Callable[[Split], Batch], devices: Devices):
        """Compiles nothing yet; `data` returns what the devices hold of a split."""
        self.experiment = experiment
        self.data = data
        self.devices = devices
        self.step_compilations = 0
        self._dispatches: dict[int, Callable] = {}
        # On the devices of the run, not on the process's first.
        self._init = jax.jit(
            experiment.initial_state,
            out_shardings=jax.sharding.SingleDeviceSharding(local_devices(devices)[0]),
        )
        self._evaluate = self._map(experiment.evaluate)
        self._update_shift = self._map(experiment.update_shift)
        self._norm_inputs = self._map(experiment.norm_inputs)
        self._statistics_errors = self._map(experiment.statistics_errors)

    def _map(self, function: Callable, **options) -> Callable:
        runtime = self.experiment.config.runtime
        return map_over_devices(function, runtime=runtime, devices=self.devices, **options)

    def initial_state(self, config: ConfigDict) -> TrainState:
        """Returns the state of one device before the first step."""
        return self._init(config_lib.traced_values(config))

    def dispatch(self, num_steps: int) -> Callable:
        """Returns `Experiment.dispatch` of so many steps for all devices; donates the state."""
        if num_steps not in self._dispatches:

            def dispatch(state, values, data, block):
                self.step_compilations += 1
                return self.experiment.dispatch(state, values, data, block, num_steps=num_steps)

            self._dispatches[num_steps] = self._map(dispatch, donate_argnums=(0,))
        return self._dispatches[num_steps]

    def evaluate(
        self, config: ConfigDict, state: TrainState, split: Split | None = None
    ) -> dict[str, float]:
        """Evaluates by the statistics in the state, by the rule that training used.

        Exactly: every example counts once, the last batch is padded and masked.

        Args:
          config: of the run.
          state: arrays `[devices, ...]`; statistics that devices keep for themselves are pooled
            first.
          split: default: the test split.

        Returns:
          'loss', the mean cross-entropy, and 'error', the share of wrong predictions.
        """
        split = split or self.experiment.test
        batch_stats = self._inference_stats(state)
        values = replicate(config_lib.traced_values(config), self.devices)
        # Each batch adds to the sums of the one before: one runs after the other, nothing piles up.
        totals = {"loss": np.float32(0), "wrong": np.int32(0), "count": np.int32(0)}
        totals = replicate(totals, self.devices)
        for batch in self._batches_of(split, config.eval_batch_size):
            data = self.data(split)
            totals = self._evaluate(totals, values, state.params, batch_stats, data, batch)
        sums = {name: float(value[0]) for name, value in jax.device_get(totals).items()}
        return {"loss": sums["loss"] / sums["count"], "error": sums["wrong"] / sums["count"]}

    def measure_shift(
        self, config: ConfigDict, state: TrainState, block: Batch | None
    ) -> dict[str, float]:
        """Measures the next update's shift of the statistics, and the error that they have now.

        Args:
          config: of the run; `config.shift` says which layers, and which population.
          state: arrays `[devices, ...]`.
          block: on the devices, with the next batch; None at the end of a run, which has none.

        Returns:
          'shift_mean', 'shift_std' and 'shift_kl' of the next update (see
          `mbn_jax.diagnostics.update_shift`), and 'error_mean' and 'error_log_variance' of the
          statistics for inference against those of the training split, augmented as in training
          (see `statistics_error`): the average over layers, and '/LAYER' for each.
        """
        values = replicate(config_lib.traced_values(config), self.devices)
        split = self.experiment.train
        data = self.data(split)
        measured = []
        if block is not None:
            measured.append(("shift", self._update_shift(state, values, data, block)))
        batch_stats = self._inference_stats(state)
        population: dict[str, Moments] = {}
        batches = self._batches_of(split, config.eval_batch_size, config.shift.examples)
        for number, batch in enumerate(batches):
            batch["number"] = replicate(np.int32(number), self.devices)
            population = self._norm_inputs(
                population, values, state.params, batch_stats, data, batch
            )
        if batch_stats:
            errors = self._statistics_errors(population, values, batch_stats)
            measured.append(("error", errors))
        found = {}
        for kind, layers in measured:
            host = jax.device_get(first_device(layers))
            for name in {name: None for values in host.values() for name in values}:
                by_layer = {layer: float(values[name]) for layer, values in host.items()}
                found[f"{kind}_{name}"] = sum(by_layer.values()) / len(by_layer)
                found |= {f"{kind}_{name}/{layer}": value for layer, value in by_layer.items()}
        return found

    def _inference_stats(self, state: TrainState) -> PyTree:
        """Returns the statistics that inference goes by: of all devices together."""
        if not self.experiment.local_statistics:
            return state.batch_stats
        pooled = pool_over_devices(gather_over_hosts(state.batch_stats))
        return replicate(pooled, self.devices)

    def _batches_of(self, split: Split, batch_size: int, examples: int = 0) -> Iterator[Batch]:
        """Yields every example of a split (or the first few) once, on the devices."""
        count = self.experiment.num_devices
        batches = evaluation_batches(
            split,
            math.ceil(min(batch_size, examples or len(split)) / count) * count,
            num_examples=examples,
            process_index=0 if self.devices else jax.process_index(),
            process_count=1 if self.devices else jax.process_count(),
        )
        for batch in batches:
            yield distribute(split_over_devices(batch, devices=self.devices), self.devices)


class Programs:
    """The programs on some devices, made as configs ask for them.

    Attributes:
      devices: on which; None: all, of all hosts.
    """

    def __init__(self, devices: Devices = None):
        """Makes none yet."""
        self.devices = devices
        self._programs: dict[str, Program] = {}
        self._data: dict[int, tuple[Split, Batch]] = {}

    def get(self, config: ConfigDict) -> Program:
        """Returns the program that serves `config`; raises UserError as `Experiment.build`."""
        config_lib.validate(config)
        key = config_lib.program_key(config)
        if key not in self._programs:
            count = len(self.devices) if self.devices else None
            experiment = Experiment.build(config, num_devices=count)
            self._programs[key] = Program(experiment, self._data_of, self.devices)
        return self._programs[key]

    def _data_of(self, split: Split) -> Batch:
        """Returns a split's arrays on every device, or `{}` where it is decoded as it is used."""
        if split.images is None:
            return {}
        if id(split) not in self._data:  # An id is one split's for as long as that is kept.
            arrays = {"image": split.images, "label": split.labels}
            self._data[id(split)] = split, replicate(arrays, self.devices)
        return self._data[id(split)][1]

    @property
    def step_compilations(self) -> int:
        """How often a training step was compiled, over all programs."""
        return sum(program.step_compilations for program in self._programs.values())


def _moments(x: jax.Array, axis_name: str | None, mask: jax.Array | None = None) -> Moments:
    """Returns the moments of a layer's input, exactly: two passes, channels last."""
    axes = tuple(range(x.ndim - 1))
    return batch_moments(x, axes, axis_name=axis_name, mask=mask, use_fast_variance=False)


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
            max_bytes_in_memory=options.max_bytes_in_memory,
        )


# Runs of one process share what is in memory: decoding takes longer than many a run.
_load_split_once = functools.lru_cache(maxsize=4)(load_split)
_loading = threading.Lock()
