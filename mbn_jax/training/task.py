"""What a configuration stands for: its data, network and optimizer."""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from ml_collections import ConfigDict

from mbn_jax.datasets.augmentation import standardize
from mbn_jax.datasets.batches import pixel_statistics
from mbn_jax.datasets.find import open_split
from mbn_jax.datasets.order import BatchOrder
from mbn_jax.datasets.split import Examples, Split
from mbn_jax.errors import UserError, one_line
from mbn_jax.models import build_model
from mbn_jax.names import is_import_path, kwargs_of, reason
from mbn_jax.statistics.recalibration import record_norm_inputs
from mbn_jax.step.state import TrainState
from mbn_jax.step.train_step import make_train_step
from mbn_jax.training.checks import (
    import_from_config,
    validate,
    validate_devices,
    validate_examples,
)
from mbn_jax.training.config import (
    NAMED,
    dataset_splits,
    static_config,
    steps_per_epoch,
    total_steps,
)
from mbn_jax.training.hparams import HParams
from mbn_jax.training.losses import (
    EvalMetrics,
    Loss,
    build_loss,
    check_eval_metrics,
    masked_sums,
)
from mbn_jax.training.norms import build_norm, norm_layers
from mbn_jax.training.optimizers import build_optimizer, build_schedule

PyTree = Any
EvalTotals = dict[str, tuple[jax.Array, jax.Array]]
"""Numerator and denominator of each metric, summed over the examples that were evaluated."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What all runs of one static configuration share, checked.

    Attributes:
      config: the static configuration (see `mbn_jax.training.config.static_config`); the numbers of
        a run come as `HParams`.
      train: training split.
      test: split that runs are evaluated on.
      pixel_mean: `[channels]`, of the training split; None: 'image' is not standardized.
      pixel_std: `[channels]`, of the training split; None: 'image' is not standardized.
      num_devices: devices that a run is spread over, on all hosts.
      metrics: what an evaluation measures: dtypes of numerator and denominator by name.
    """

    config: ConfigDict
    train: Split
    test: Split
    pixel_mean: np.ndarray | None
    pixel_std: np.ndarray | None
    num_devices: int
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)

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
        _check_images(config, train)
        has_images = config.dataset.standardize and "image" in train.spec
        mean, std = pixel_statistics(train) if has_images else (None, None)
        task = cls(static_config(config), train, test, mean, std, num_devices)
        task.order(config.seed)
        return dataclasses.replace(task, metrics=_check_network(task))

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

    @functools.cached_property
    def loss(self) -> Loss:
        """What the training step minimizes and an evaluation measures."""
        return build_loss(self.config)

    @functools.cached_property
    def norm_layers(self) -> tuple[type[nn.Module], ...]:
        """Classes of the normalization layers."""
        hparams = HParams.from_config(self.config)
        return norm_layers(build_norm(self.config, hparams, self.num_devices, self.total_steps))

    def standardized(self, images: jax.Array) -> jax.Array:
        """Returns images as the network takes them, float32 where they are standardized."""
        if self.pixel_mean is None or self.pixel_std is None:
            return images
        return standardize(images, self.pixel_mean, self.pixel_std)

    def prepared(self, batch: Examples) -> Examples:
        """Returns a batch as the loss takes it: 'image' standardized."""
        if self.pixel_mean is None:
            return batch
        return {**batch, "image": self.standardized(batch["image"])}

    def model(
        self,
        hparams: HParams,
        *,
        remat: bool | None = None,
        norm: Callable[..., nn.Module] | None = None,
    ) -> nn.Module:
        """Returns the network.

        Args:
          hparams: memory size and decay of its norms.
          norm: factory of its norms; default: the one of the config.
          remat: replaces `config.model.remat`; False lets the layers be intercepted.
        """
        norm = norm or build_norm(self.config, hparams, self.num_devices, self.total_steps)
        config = self.config
        if remat is not None:
            config = config.copy_and_resolve_references()
            config.model.remat = remat
        return build_model(config, num_classes=self.train.num_classes, norm=norm)

    def init_variables(
        self, model: nn.Module, key: jax.Array, size: int = 1
    ) -> tuple[PyTree, EvalMetrics]:
        """Initializes a network as `eval_metrics` calls it, with a batch of `size` zeros.

        Returns:
          Its variables, and what `eval_metrics` returned.
        """
        variables: PyTree = {}

        def apply(*args: Any, **kwargs: Any) -> Any:
            nonlocal variables
            if variables:
                return model.apply(variables, *args, **kwargs)
            outputs, variables = model.init_with_output(key, *args, **kwargs)
            return outputs

        found = self.loss.eval_metrics(apply, self.zeros(size))
        return variables, found

    def zeros(self, size: int) -> Examples:
        """Returns a batch of zeros as the loss takes it."""
        return self.prepared(jax.tree.map(jnp.asarray, self.train.zeros(size)))

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
    if train.holds_the_same(test):
        raise UserError(
            f"Data set {config.dataset.name!r} has the same examples in train_split={train.name!r} "
            f"and test_split={test.name!r}; return another source for each split."
        )


def _check_images(config: ConfigDict, train: Split) -> None:
    """Raises UserError for preprocessing that would not suit the arrays of the data set."""
    options, spec = config.dataset, train.spec
    is_classification = set(spec) == {"image", "label"} and not spec["label"].shape
    if (options.crop_padding or options.flip) and not is_classification:
        raise UserError(
            "dataset.crop_padding and flip move 'image' alone, and suit data sets of 'image' and a "
            f"number 'label'; {options.name!r} has {sorted(spec)}. Augment in the data source, and "
            "set dataset.max_bytes_in_memory=0, so that each epoch reads it anew."
        )
    if (options.image_size or options.random_resized_crop) and train.images is None:
        raise UserError(
            f"dataset.image_size and random_resized_crop are for TFDS data sets, and "
            f"{options.name!r} is a function; resize in the data source."
        )


def _check_network(task: Task) -> dict[str, Any]:
    """Traces the network, the loss and, where one is the user's own, a training step.

    Returns:
      What `Task.metrics` holds.

    Raises:
      UserError: in a sentence, where they do not fit each other or the data.
    """
    config = task.config
    own = any(is_import_path(config[group].name) for group in NAMED)
    hparams = HParams.from_config(config).as_arrays()
    norm = build_norm(config, hparams, task.num_devices, task.total_steps)
    # The user's code may fail in any way.
    expected: tuple[type[Exception], ...] = (Exception,) if own else (ValueError, TypeError)
    calls = []

    def counted(*args: Any, **kwargs: Any) -> nn.Module:
        calls.append(args)
        return norm(*args, **kwargs)

    def evaluate(hparams: HParams) -> EvalTotals:
        model = task.model(hparams, norm=counted, remat=False if measures_shift else None)
        _, found = task.init_variables(model, jax.random.key(0), size=2)
        check_eval_metrics(found, 2)
        return masked_sums(found, jnp.ones(2, bool))

    measures_shift = config.shift.every_steps > 0  # Only this has to look into the layers.
    recording: contextlib.AbstractContextManager[dict] = contextlib.nullcontext({})
    if measures_shift:
        recording = record_norm_inputs(task.norm_layers, config.shift.layers)
    try:
        with recording as layers:
            totals = jax.eval_shape(evaluate, hparams)
        if not calls:
            raise ValueError(
                "it never calls its norm=, so that norm.name has no effect; make its "
                "normalization layers by norm(use_running_average=not train)"
            )
        if own:
            jax.eval_shape(functools.partial(_one_step, task), hparams)
    except UserError:
        raise
    except expected as error:
        raise UserError(_explained(task, error)) from error
    if measures_shift and not layers:
        raise UserError(
            f"shift.layers={config.shift.layers!r} matches no normalization layer of "
            f"{config.model.name!r}; '' matches all."
        )
    return {name: tuple(x.dtype for x in pair) for name, pair in totals.items()}


def _one_step(task: Task, hparams: HParams) -> dict[str, jax.Array]:
    """Runs a training step on zeros, as on one device whose norms are not synced."""
    config = task.config.copy_and_resolve_references()
    config.norm.update(sync="local", virtual_batch_size=0)
    model = task.model(hparams, norm=build_norm(config, hparams, 1, task.total_steps))
    tx = task.optimizer(hparams)
    variables, _ = task.init_variables(model, jax.random.key(0))
    step = make_train_step(
        model.apply,
        tx,
        task.loss,
        double_forward=config.double_forward,
        double_forward_fraction=config.double_forward_fraction,
    )
    state = TrainState.create(variables, tx, jax.random.key(0))
    return step(state, task.zeros(config.batch_size // task.num_devices))[1]


def _explained(task: Task, error: Exception) -> str:
    """Returns in a sentence why network, norm, loss and data do not fit each other."""
    config, arrays = task.config, task.train.spec
    names = f"The network {config.model.name!r} with norm {config.norm.name!r}"
    if is_import_path(config.loss.name):
        names += f" and loss {config.loss.name!r}"
    if is_import_path(config.optimizer.name):
        names += f", by optimizer {config.optimizer.name!r},"
    if set(arrays) == {"image", "label"}:
        data = f"images of {arrays['image'].shape}"
    else:
        data = "batches of " + ", ".join(f"{name} {spec.shape}" for name, spec in arrays.items())
    is_told = isinstance(error, ValueError | TypeError)
    why = one_line(error) if is_told else reason(error)
    if isinstance(error, TypeError) and "'train'" in why:
        why += "; a network must take train=, whether it is called in training"
    if isinstance(error, TypeError) and "'num_classes'" in why and not task.train.num_classes:
        why += "; give the data source an attribute num_classes, or set model.kwargs.num_classes"
    return f"{names} cannot take {data}: {why}"


def load_dataset_split(config: ConfigDict, split: str) -> Split:
    """Opens a split of the data set of `config.dataset`, once; raises UserError as `open_split`."""
    options = config.dataset
    with _loading:
        import_from_config(config)
        return _load_split_once(
            options.name,
            split,
            kwargs=tuple(sorted(kwargs_of(options).items())),
            data_dir=options.data_dir or None,
            image_size=options.image_size,
            random_resized_crop=options.random_resized_crop,
            max_bytes_in_memory=options.max_bytes_in_memory,
        )


# The runs of a process share their splits, because decoding takes longer than many a run.
_load_split_once = functools.lru_cache(maxsize=4)(open_split)
_loading = threading.Lock()
