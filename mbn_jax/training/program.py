"""The compiled functions of a task, and its data, on devices."""

import dataclasses
import functools
import gc
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from ml_collections import ConfigDict

from mbn_jax.datasets.split import Examples, Split
from mbn_jax.parallel.devices import AXIS_NAME, Devices, local_devices, replicate
from mbn_jax.step.state import TrainState
from mbn_jax.training.checks import validate
from mbn_jax.training.config import program_key
from mbn_jax.training.hparams import HParams
from mbn_jax.training.steps import init_state, train_steps
from mbn_jax.training.task import Task

PyTree = Any

MAX_SHARE_OF_MEMORY_MAPS = 0.5

QUICKLY = {"xla_backend_optimization_level": 1}
"""How to compile for a CPU what draws random numbers, once: in a third of the time, and to the same
bits, as `tests/training/test_program.py` checks."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A task on its devices: functions that are compiled once, and data that is copied once.

    Attributes:
      task: what it runs.
      devices: devices to run on; None: all devices of all hosts.
      data: returns a split on the devices (see `Programs.data`).
      compilations: counts compilations by the name of the device function.
    """

    task: Task
    devices: Devices
    data: Callable[[Split], Examples | None]
    compilations: Counter[str]
    _compiled: dict[Any, Callable] = dataclasses.field(default_factory=dict)
    _specialized: dict[Any, Callable] = dataclasses.field(default_factory=dict)

    def compiled(
        self, function: Callable, *, donate_argnums: tuple[int, ...] = (), **static: Any
    ) -> Callable:
        """Compiles a device function for all devices, once for each set of static arguments.

        Args:
          function: pure function of the task, of arrays of one device, and of static arguments.
          donate_argnums: arrays whose buffers the result may reuse, counted without the task.
          **static: static arguments.

        Returns:
          A function of arrays `[devices, ...]`.
        """
        key = function, *sorted(static.items())
        if key not in self._compiled:

            def device_function(*args: Any) -> Any:
                self.compilations[function.__name__] += 1  # Runs once, as JAX traces it.
                return function(self.task, *args, **static)

            self._compiled[key] = jax.pmap(
                device_function,
                axis_name=AXIS_NAME,
                devices=self.devices,
                donate_argnums=donate_argnums,
            )
        return self._compiled[key]

    def specialized(
        self,
        function: Callable,
        arguments: PyTree,
        *,
        donate_argnums: tuple[int, ...] = (),
        **static: Any,
    ) -> Callable:
        """Compiles a device function at once, for arguments of these shapes alone.

        It takes less time to call than what `compiled` returns. Over several hosts it is just that,
        not compiled yet, because one host's arguments are not all of the program's.

        Args:
          function: as for `compiled`.
          arguments: arrays `[devices, ...]`, or `jax.ShapeDtypeStruct` in their place.
          donate_argnums: as for `compiled`.
          **static: as for `compiled`.
        """
        compiled: Any = self.compiled(function, donate_argnums=donate_argnums, **static)
        if jax.process_count() > 1:
            return compiled
        leaves, structure = jax.tree.flatten(arguments)
        key = compiled, structure, *((x.shape, x.dtype) for x in leaves)
        if key not in self._specialized:
            self._specialized[key] = compiled.lower(*arguments).compile()
        return self._specialized[key]

    def init_state(self, config: ConfigDict) -> TrainState:
        """Returns the state before the first step, on one device."""
        compiled = self._init_state[1].result()
        return compiled(HParams.from_config(config).as_arrays())

    def state_shapes(self) -> TrainState:
        """Returns the shapes of a state on the devices, and begins to compile `init_state`."""
        count = len(local_devices(self.devices))
        shapes = self._init_state[0].out_info
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), shapes)

    @functools.cached_property
    def _init_state(self) -> tuple[jax.stages.Lowered, Future[jax.stages.Compiled]]:
        """The program that makes the state, and the same compiled, in a thread of its own."""
        # On a device of the program, which may not be the first of the process.
        device = local_devices(self.devices)[0]
        lowered = jax.jit(
            functools.partial(init_state, self.task),
            out_shardings=jax.sharding.SingleDeviceSharding(device),
            compiler_options=QUICKLY if device.platform == "cpu" else None,
        ).lower(HParams.from_config(self.task.config).as_arrays())
        thread = ThreadPoolExecutor(1)
        compiled = thread.submit(lowered.compile)
        thread.shutdown(wait=False)
        return lowered, compiled

    def hparams(self, config: ConfigDict) -> HParams:
        """Returns the hyperparameters on the devices, `[devices]`."""
        return replicate(HParams.from_config(config).as_arrays(), self.devices)


class Programs:
    """The programs on some devices; runs that differ in `HParams` alone share one.

    Attributes:
      devices: devices to run on; None: all devices of all hosts.
    """

    def __init__(self, devices: Devices = None):
        """Makes no program yet."""
        self.devices = devices
        self._compilations: Counter[str] = Counter()
        self._tasks: dict[str, Task] = {}
        self._programs: dict[str, Program] = {}
        self._data: dict[int, tuple[Split, Examples]] = {}

    @property
    def step_compilations(self) -> int:
        """How often training steps were compiled, over all programs."""
        return self._compilations[train_steps.__name__]

    def task(self, config: ConfigDict) -> Task:
        """Returns the task of a run configuration; raises UserError as `Task.build`."""
        validate(config)
        key = program_key(config)
        if key not in self._tasks:
            count = len(self.devices) if self.devices else None
            self._tasks[key] = Task.build(config, num_devices=count)
        return self._tasks[key]

    def get(self, config: ConfigDict) -> Program:
        """Returns the program of a run configuration; raises UserError as `Task.build`."""
        task = self.task(config)
        key = program_key(config)
        if key not in self._programs:
            if is_short_of_memory_maps():
                # Drops all compiled programs of the process; those in use compile again.
                self._programs.clear()
                jax.clear_caches()
                gc.collect()
            self._programs[key] = Program(task, self.devices, self.data, self._compilations)
        return self._programs[key]

    def data(self, split: Split) -> Examples | None:
        """Returns a split on every device, or None where it is decoded as it is used."""
        if split.in_memory is None:
            return None
        if id(split) not in self._data:  # The id stays unique, because the split is kept too.
            self._data[id(split)] = split, replicate(split.in_memory, self.devices)
        return self._data[id(split)][1]


def is_short_of_memory_maps() -> bool:
    """Returns whether the process uses `MAX_SHARE_OF_MEMORY_MAPS` of what Linux allows it.

    A program compiled for a CPU takes some 2,000 of the 65,530 maps. A process that needs more ends
    with "LLVM compilation error: Cannot allocate memory".
    """
    try:
        with open("/proc/self/maps", "rb") as maps, open("/proc/sys/vm/max_map_count") as limit:
            return sum(1 for _ in maps) > int(limit.read()) * MAX_SHARE_OF_MEMORY_MAPS
    except OSError:  # Not Linux.
        return False
