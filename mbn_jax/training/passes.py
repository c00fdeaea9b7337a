"""Passes over the data on the devices: training, evaluation, and moments for recalibration.

Every function takes a program and a run configuration; arrays are `[devices, ...]`.
"""

import contextlib
import math
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from mbn_jax.core.batch_stats import pool_batch_stats
from mbn_jax.core.moments import Moments
from mbn_jax.datasets.batches import (
    EvalBatch,
    HostBatches,
    evaluation_batches,
    training_batches,
)
from mbn_jax.datasets.split import Split
from mbn_jax.parallel.devices import (
    distribute,
    first_device,
    gather_over_hosts,
    local_devices,
    replicate,
    split_over_devices,
)
from mbn_jax.step.state import TrainState
from mbn_jax.training.program import Program
from mbn_jax.training.steps import (
    BatchStack,
    Metrics,
    eval_step,
    moments_step,
    replace_statistics,
    train_steps,
)
from mbn_jax.training.task import EvalTotals

PyTree = Any

STEPS_PER_STACK = 1024
"""Steps whose indices go to the devices at once: some kilobytes, and rarely a copy."""

DONATED = (0,)
"""Arguments of `train_steps` whose buffers a dispatch takes over: the state."""


class Dispatch(NamedTuple):
    """What one call of the devices has trained.

    Attributes:
      step: the step reached.
      state: arrays `[devices, ...]`; the next dispatch takes their buffers.
      metrics: metrics of the steps, `[devices, steps]`.
      upcoming: the stack with the next batch; None after the last step of a run.
    """

    step: int
    state: TrainState
    metrics: Metrics
    upcoming: BatchStack | None


def train_pass(
    program: Program, config: ConfigDict, state: TrainState, last_step: int
) -> Iterator[Dispatch]:
    """Trains up to `last_step`, yielding after every dispatch; nothing in it waits for the devices.

    The state that it starts from is donated.
    """
    step = int(first_device(jax.device_get(state.step)))
    total_steps = program.task.total_steps
    stride = config.steps_per_dispatch
    if step == last_step:
        return
    stacks = batch_stacks(program, config, step)
    stack, stack_end = next(stacks)
    hparams = program.hparams(config)
    data = program.data(program.task.train)
    compiled, suits = None, None
    while step < last_step:
        # Up to the next multiple of the stride, where records and checkpoints may be due: a run
        # that was lengthened, or had another stride, resumes between two of them.
        num_steps = min(stride - step % stride, last_step - step)
        guard: contextlib.AbstractContextManager = contextlib.nullcontext()
        if compiled is None or suits != (num_steps, stack_end):
            arguments = state, hparams, data, stack
            compiled = program.specialized(
                train_steps, arguments, donate_argnums=DONATED, num_steps=num_steps
            )
            suits = num_steps, stack_end
            # No hidden copies to the devices in this loop. The first call speaks for those like it,
            # because the guard takes as long as the rest of the loop. (Over several hosts, pmap
            # copies the random keys itself.)
            guard = jax.transfer_guard("disallow" if jax.process_count() == 1 else "allow")
        with guard:
            state, metrics = compiled(state, hparams, data, stack)
        step += num_steps
        if step == stack_end and step < total_steps:
            stack, stack_end = next(stacks)
        yield Dispatch(step, state, metrics, stack if step < total_steps else None)
    stacks.close()  # Ends the processes that decode before this one ends.


def compile_start(program: Program, config: ConfigDict) -> None:
    """Compiles what makes the first state of a run and, beside it, what trains from there."""
    task, devices = program.task, len(local_devices(program.devices))
    num_steps = min(config.steps_per_dispatch, task.total_steps)
    batch_size = config.batch_size // task.num_devices
    is_on_disk = task.train.in_memory is None
    example: Any = task.train.zeros(1) if is_on_disk else np.zeros(1, np.int32)
    steps = num_steps if is_on_disk else _steps_per_stack(program, config)

    def stacked(x: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((devices, steps, batch_size, *x.shape[1:]), x.dtype)

    first_step = jax.ShapeDtypeStruct((devices,), np.int32)
    arguments = (
        program.state_shapes(),
        program.hparams(config),
        program.data(task.train),
        BatchStack(first_step, jax.tree.map(stacked, example)),
    )
    program.specialized(train_steps, arguments, donate_argnums=DONATED, num_steps=num_steps)


def _steps_per_stack(program: Program, config: ConfigDict) -> int:
    """Returns how many steps' batches go to the devices at once, whole dispatches."""
    stride = config.steps_per_dispatch
    if program.task.train.in_memory is None:
        return stride
    return max(1, STEPS_PER_STACK // stride) * stride


def batch_stacks(
    program: Program, config: ConfigDict, first_step: int
) -> Generator[tuple[BatchStack, int]]:
    """Yields the training batches from a step's dispatch on, and the step after each stack."""
    task, stride = program.task, config.steps_per_dispatch
    steps_per_stack = _steps_per_stack(program, config)
    first_step -= first_step % stride  # So that no dispatch needs two stacks.
    host = HostBatches(
        task.train, task.order(config.seed), jax.process_index(), jax.process_count()
    )
    stacks = training_batches(
        host,
        first_step=first_step,
        num_steps=task.total_steps,
        steps_per_stack=steps_per_stack,
        num_workers=config.dataset.num_workers,
    )
    for number, batches in enumerate(stacks):
        start = first_step + number * steps_per_stack
        on_devices = split_over_devices(batches, axis=1, devices=program.devices)
        stack = BatchStack(
            replicate(np.int32(start), program.devices), distribute(on_devices, program.devices)
        )
        yield stack, start + steps_per_stack


def evaluate(
    program: Program, config: ConfigDict, state: TrainState, split: Split | None = None
) -> dict[str, float]:
    """Evaluates on every example of a split exactly once.

    Statistics that devices keep for themselves are pooled first. The default is the test split.

    Returns:
      The metrics of the loss; of 'cross_entropy' these are 'loss', the mean cross-entropy,
      and 'error', the share of wrong predictions. A ratio of 0 to 0 is NaN.
    """
    task = program.task
    split = split or task.test
    step = program.compiled(eval_step)
    batch_stats = shared_batch_stats(program, state)
    hparams = program.hparams(config)
    data = program.data(split)
    # Every batch adds to the totals of the one before, so that batches do not pile up.
    zeros = {name: tuple(np.zeros((), d) for d in pair) for name, pair in task.metrics.items()}
    totals: tuple[jax.Array, EvalTotals] = replicate((np.int32(0), zeros), program.devices)
    for batch in _eval_batches(program, split, config.eval_batch_size):
        totals = step(totals, hparams, state.params, batch_stats, data, batch)
    values = {"loss": math.nan}  # First, in what people read.
    counted, sums = first_device(jax.device_get(totals))
    if counted != len(split):  # Whatever lost them: a number over other examples is no result.
        raise RuntimeError(f"Evaluated {counted} of the {len(split)} examples of {split.name!r}.")
    for name, pair in sums.items():
        numerator, denominator = map(float, pair)
        values[name] = numerator / denominator if denominator else math.nan
    return values


def shared_batch_stats(program: Program, state: TrainState) -> PyTree:
    """Returns the statistics to evaluate by, the same on all devices."""
    if not program.task.local_statistics:
        return state.batch_stats
    pooled = pool_batch_stats(gather_over_hosts(state.batch_stats))
    return replicate(pooled, program.devices)


def input_moments(
    program: Program,
    config: ConfigDict,
    params: PyTree,
    batch_stats: PyTree,
    num_examples: int,
    *,
    recalibrate: bool = False,
) -> dict[str, Moments]:
    """Returns the moments of the norm layers' inputs, by layer, the same on all devices.

    They are over `num_examples` training examples, evenly spaced; 0: over all. `recalibrate` is
    that of `moments_step`.
    """
    split = program.task.train
    step = program.compiled(moments_step, recalibrate=recalibrate)
    hparams = program.hparams(config)
    data = program.data(split)
    moments: dict[str, Moments] = {}
    batches = _eval_batches(program, split, config.eval_batch_size, num_examples, config.seed)
    for number, batch in enumerate(batches):
        on_devices = replicate(np.int32(number), program.devices)
        moments = step(moments, hparams, params, batch_stats, data, batch, on_devices)
    return moments


def recalibrate(
    program: Program, config: ConfigDict, state: TrainState, num_batches: int
) -> TrainState:
    """Returns the state with its statistics computed anew under its parameters.

    From `num_batches` batches of `eval_batch_size` training examples; at most the whole split.
    """
    num_examples = min(num_batches * config.eval_batch_size, len(program.task.train))
    moments = input_moments(
        program, config, state.params, state.batch_stats, num_examples, recalibrate=True
    )
    replace = program.compiled(replace_statistics)
    return state.replace(batch_stats=replace(state.batch_stats, moments))


def _eval_batches(
    program: Program,
    split: Split,
    batch_size: int,
    num_examples: int = 0,
    crop_seed: int | None = None,
) -> Iterator[EvalBatch]:
    """Yields a split's examples once, or `num_examples` of them, on the devices."""
    count = program.task.num_devices
    batches = evaluation_batches(
        split,
        math.ceil(min(batch_size, num_examples or len(split)) / count) * count,
        num_examples=num_examples,
        crop_seed=crop_seed,
        process_index=0 if program.devices else jax.process_index(),
        process_count=1 if program.devices else jax.process_count(),
    )
    for batch in batches:
        yield distribute(split_over_devices(batch, devices=program.devices), program.devices)
