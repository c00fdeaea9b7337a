"""An experiment on its devices: what is compiled, and the data that is there.

`Programs` keeps those that exist, so that runs which differ only in the numbers of
`mbn_jax.training.config.TRACED` share one.
"""

import functools
import gc
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mbn_jax.core.batch_stats import pool_batch_stats
from mbn_jax.core.moments import Moments
from mbn_jax.datasets.images import Split
from mbn_jax.datasets.pipeline import evaluation_batches, training_blocks
from mbn_jax.parallel.devices import (
    Devices,
    distribute,
    first_device,
    gather_over_hosts,
    local_devices,
    map_over_devices,
    replicate,
    split_over_devices,
)
from mbn_jax.statistics.recalibration import recalibrated
from mbn_jax.step.state import TrainState
from mbn_jax.training import config as config_lib
from mbn_jax.training.divergence import LayerCheck
from mbn_jax.training.shift import ShiftMeter
from mbn_jax.training.task import Batch, Experiment

PyTree = Any

MAX_SHARE_OF_MEMORY_MAPS = 0.5
STEPS_PER_BLOCK = 1024
"""Of indices that go to the devices at once; some kilobytes, and no copy in most steps."""


class Program:
    """An experiment on its devices: compiled as it is needed, with its data.

    Attributes:
      experiment: what it runs.
      devices: on which; None: all, of all hosts.
    """

    def __init__(
        self,
        experiment: Experiment,
        data: Callable[[Split], Batch],
        count_compilation: Callable[[], None],
        devices: Devices,
    ):
        """Compiles nothing yet.

        Args:
          experiment: what it runs.
          data: returns what the devices hold of a split.
          count_compilation: called whenever a training step is compiled.
          devices: on which; None: all, of all hosts.
        """
        self.experiment = experiment
        self.data = data
        self.devices = devices
        self._count_compilation = count_compilation
        self._dispatches: dict[int, Callable] = {}
        # On the devices of the run, not on the process's first.
        self._init = jax.jit(
            experiment.initial_state,
            out_shardings=jax.sharding.SingleDeviceSharding(local_devices(devices)[0]),
        )
        self._evaluate = self.map_over_devices(experiment.evaluate)
        self._norm_inputs = {
            recalibrate: self.map_over_devices(
                functools.partial(experiment.norm_inputs, recalibrate=recalibrate)
            )
            for recalibrate in (False, True)
        }
        self._recalibrated = self.map_over_devices(recalibrated)

    def map_over_devices(self, function: Callable, **options) -> Callable:
        """Compiles a function of one device for all of them."""
        runtime = self.experiment.config.runtime
        return map_over_devices(function, runtime=runtime, devices=self.devices, **options)

    @functools.cached_property
    def shift(self) -> ShiftMeter:
        """What measures the shift of the statistics."""
        return ShiftMeter(self)

    @functools.cached_property
    def layer_check(self) -> LayerCheck:
        """What finds the layers with statistics that are not finite."""
        return LayerCheck(self)

    def initial_state(self, config: ConfigDict) -> TrainState:
        """Returns the state of one device before the first step."""
        return self._init(config_lib.traced_values(config))

    def dispatch(self, num_steps: int) -> Callable:
        """Returns `Experiment.dispatch` of so many steps for all devices; donates the state."""
        if num_steps not in self._dispatches:

            def dispatch(state, values, data, block):
                self._count_compilation()
                return self.experiment.dispatch(state, values, data, block, num_steps=num_steps)

            self._dispatches[num_steps] = self.map_over_devices(dispatch, donate_argnums=(0,))
        return self._dispatches[num_steps]

    def blocks(self, config: ConfigDict, first_step: int) -> Iterator[tuple[Batch, int]]:
        """Yields batches of several steps on the devices, and the step where they end."""
        experiment, stride = self.experiment, config.steps_per_dispatch
        in_memory = experiment.train.images is not None
        steps_per_block = max(1, STEPS_PER_BLOCK // stride) * stride if in_memory else stride
        blocks = training_blocks(
            experiment.train,
            experiment.order(config),
            first_step=first_step,
            num_steps=experiment.total_steps,
            steps_per_block=steps_per_block,
            num_workers=config.dataset.num_workers,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        step = first_step
        for block in blocks:
            on_devices = distribute(
                split_over_devices(block, axis=1, devices=self.devices), self.devices
            )
            first = replicate({"first_step": np.int32(step)}, self.devices)
            step += steps_per_block
            yield {**on_devices, **first}, step

    def dispatches(
        self, config: ConfigDict, state: TrainState, last_step: int
    ) -> Iterator[tuple[int, TrainState, Batch, Batch | None]]:
        """Trains, dispatch by dispatch; nothing in it waits for the devices.

        Args:
          config: of the run.
          state: arrays `[devices, ...]`, to start from; it is donated, and so is each yielded one.
          last_step: to stop after.

        Yields:
          The step reached; the state; the metrics of the dispatch, `[devices, steps]`; the block
          with the next batch, or None after the last step of a run.
        """
        step, total_steps = int(first_device(state.step)), self.experiment.total_steps
        if step == last_step:
            return
        blocks = self.blocks(config, step)
        block, block_end = next(blocks)
        values = replicate(config_lib.traced_values(config), self.devices)
        data = self.data(self.experiment.train)
        while step < last_step:
            size = min(config.steps_per_dispatch, last_step - step)
            dispatch = self.dispatch(size)
            # Nothing in the loop may copy to the device unseen. (Over several hosts pmap itself
            # copies the random keys.)
            with jax.transfer_guard("disallow" if jax.process_count() == 1 else "allow"):
                state, metrics = dispatch(state, values, data, block)
            step += size
            if step == block_end and step < total_steps:
                block, block_end = next(blocks)
            yield step, state, metrics, block if step < total_steps else None

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
        batch_stats = self.inference_stats(state)
        values = replicate(config_lib.traced_values(config), self.devices)
        # Each batch adds to the sums of the one before: one runs after the other, nothing piles up.
        totals = {"loss": np.float32(0), "wrong": np.int32(0), "count": np.int32(0)}
        totals = replicate(totals, self.devices)
        for batch in self.batches_of(split, config.eval_batch_size):
            data = self.data(split)
            totals = self._evaluate(totals, values, state.params, batch_stats, data, batch)
        sums = {name: float(value[0]) for name, value in jax.device_get(totals).items()}
        return {"loss": sums["loss"] / sums["count"], "error": sums["wrong"] / sums["count"]}

    def norm_inputs(
        self,
        config: ConfigDict,
        params: PyTree,
        batch_stats: PyTree,
        examples: int,
        *,
        recalibrate: bool = False,
    ) -> dict[str, Moments]:
        """Returns the moments, by layer, of what the norms are given by training examples.

        Args:
          config: of the run.
          params: arrays `[devices, ...]`.
          batch_stats: that inference goes by, likewise.
          examples: so many, evenly spaced over the training split; 0: all.
          recalibrate: as for `Experiment.norm_inputs`.

        Returns:
          Arrays `[devices, ...]`, the same on all.
        """
        split = self.experiment.train
        values = replicate(config_lib.traced_values(config), self.devices)
        moments: dict[str, Moments] = {}
        batches = self.batches_of(split, config.eval_batch_size, examples, config.seed)
        for number, batch in enumerate(batches):
            batch["number"] = replicate(np.int32(number), self.devices)
            moments = self._norm_inputs[recalibrate](
                moments, values, params, batch_stats, self.data(split), batch
            )
        return moments

    def recalibrate(self, config: ConfigDict, state: TrainState, num_batches: int) -> TrainState:
        """Returns the state with its statistics computed anew, with frozen parameters.

        Args:
          config: of the run.
          state: arrays `[devices, ...]`.
          num_batches: of `eval_batch_size` training examples each, or as many as there are.
        """
        examples = min(num_batches * config.eval_batch_size, len(self.experiment.train))
        moments = self.norm_inputs(
            config, state.params, state.batch_stats, examples, recalibrate=True
        )
        return state.replace(batch_stats=self._recalibrated(state.batch_stats, moments))

    def inference_stats(self, state: TrainState) -> PyTree:
        """Returns the statistics that inference goes by: of all devices together."""
        if not self.experiment.local_statistics:
            return state.batch_stats
        pooled = pool_batch_stats(gather_over_hosts(state.batch_stats))
        return replicate(pooled, self.devices)

    def batches_of(
        self, split: Split, batch_size: int, examples: int = 0, crop_seed: int | None = None
    ) -> Iterator[Batch]:
        """Yields each example of a split (or so many, evenly spaced) once, on the devices."""
        count = self.experiment.num_devices
        batches = evaluation_batches(
            split,
            math.ceil(min(batch_size, examples or len(split)) / count) * count,
            num_examples=examples,
            crop_seed=crop_seed,
            process_index=0 if self.devices else jax.process_index(),
            process_count=1 if self.devices else jax.process_count(),
        )
        for batch in batches:
            yield distribute(split_over_devices(batch, devices=self.devices), self.devices)


class Programs:
    """The programs on some devices, made as configs ask for them.

    Attributes:
      devices: on which; None: all, of all hosts.
      step_compilations: how often a training step was compiled, over all programs.
    """

    def __init__(self, devices: Devices = None):
        """Makes none yet."""
        self.devices = devices
        self.step_compilations = 0
        self._experiments: dict[str, Experiment] = {}
        self._programs: dict[str, Program] = {}
        self._data: dict[int, tuple[Split, Batch]] = {}

    def experiment(self, config: ConfigDict) -> Experiment:
        """Returns what `config` stands for; raises UserError as `Experiment.build`."""
        config_lib.validate(config)
        key = config_lib.program_key(config)
        if key not in self._experiments:
            count = len(self.devices) if self.devices else None
            self._experiments[key] = Experiment.build(config, num_devices=count)
        return self._experiments[key]

    def get(self, config: ConfigDict) -> Program:
        """Returns the program that serves `config`; raises UserError as `Experiment.build`."""
        experiment = self.experiment(config)
        key = config_lib.program_key(config)
        if key not in self._programs:
            if is_short_of_memory_maps():
                # All that the process has compiled; what is still in use compiles once more.
                self._programs.clear()
                jax.clear_caches()
                gc.collect()
            self._programs[key] = Program(
                experiment, self._data_of, self._count_compilation, self.devices
            )
        return self._programs[key]

    def _count_compilation(self) -> None:
        self.step_compilations += 1

    def _data_of(self, split: Split) -> Batch:
        """Returns a split's arrays on every device, or `{}` where it is decoded as it is used."""
        if split.images is None:
            return {}
        if id(split) not in self._data:  # An id is one split's for as long as that is kept.
            arrays = {"image": split.images, "label": split.labels}
            self._data[id(split)] = split, replicate(arrays, self.devices)
        return self._data[id(split)][1]


def is_short_of_memory_maps() -> bool:
    """Returns whether the process has used `MAX_SHARE_OF_MEMORY_MAPS` of what Linux allows it.

    A program that is compiled for a CPU takes some 2,000 of 65,530, and without one the process
    ends: "LLVM compilation error: Cannot allocate memory".
    """
    try:
        with open("/proc/self/maps", "rb") as maps, open("/proc/sys/vm/max_map_count") as limit:
            return sum(1 for _ in maps) > int(limit.read()) * MAX_SHARE_OF_MEMORY_MAPS
    except OSError:  # Not Linux.
        return False
