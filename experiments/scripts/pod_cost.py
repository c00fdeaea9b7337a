r"""What a training step of a config costs on a pod that is not there: compiled for it, not run.

    python experiments/scripts/pod_cost.py --config=configs/imagenet.py --topology=v5e:16x16 \
        --config.batch_size=8192

Compiles the step of the run for all chips of a topology that is not there, and prints a table:
all-reduces and the bytes that they carry, FLOPs, bytes accessed, temporary memory a chip, what of
it is alive at once (the rest is lost between arrays), and the compiler's own estimate of the time,
each a ratio to the first row where that says more. `fits` compares arguments and temporary memory
with the chip's.
TPU topologies need pip's libtpu alone (`pip install '.[train,tpu]'`). `--topology=h100:64` needs
JAX's CUDA plugin (`pip install '.[train,cuda]'`), and prints neither FLOPs, bytes nor an estimate:
that compiler has none; what cuDNN takes beside the arrays is not counted.
Without --topology it compiles for the CPU devices that there are, for counts of collectives:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 \
        python experiments/scripts/pod_cost.py --config=configs/cifar.py:resnet8 \
        --config.batch_size=32 --image 16 16 3 --classes 10

`--config.FIELD=VALUE` changes a field for all rows. The data set is not read: --image, --classes
and --examples say what it has. An estimate of the compiler is not a measurement.
"""

import argparse
import functools
import math
import re
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from live_memory import alive_at_once
from ml_collections import ConfigDict
from topologies import MEMORY_GIB, topology_devices

from mbn_jax.datasets.split import ArraySpec, Split
from mbn_jax.errors import UserError
from mbn_jax.parallel.devices import AXIS_NAME
from mbn_jax.training.checks import validate_devices
from mbn_jax.training.config import static_config
from mbn_jax.training.config_files import parse_config, with_fields
from mbn_jax.training.hparams import HParams
from mbn_jax.training.steps import BatchStack, init_state, train_steps
from mbn_jax.training.task import Task

BATCH = {"norm.name": "batch", "double_forward": "off"}
OFF, REWRITE, TRANSPORT = ({"double_forward": mode} for mode in ("off", "rewrite", "transport"))
QUARTER = {**TRANSPORT, "double_forward_fraction": 0.25}
LOCAL, SYNCED = {"norm.sync": "local"}, {"norm.sync": "sync"}
GROUPS = {"norm.sync": "group", "norm.sync_group_size": 4}
CASES: dict[str, dict[str, Any]] = {
    "batch, local": BATCH | LOCAL,
    "batch, synced": BATCH | SYNCED,
    "memory, local, off": OFF | LOCAL,
    "memory, local, rewrite": REWRITE | LOCAL,
    "memory, local, transport": TRANSPORT | LOCAL,
    "memory, local, transport by 1/4": QUARTER | LOCAL,
    "memory, groups of 4, transport": TRANSPORT | GROUPS,
    "memory, synced, off": OFF | SYNCED,
    "memory, synced, rewrite": REWRITE | SYNCED,
    "memory, synced, transport": TRANSPORT | SYNCED,
    "memory, synced, transport by 1/4": QUARTER | SYNCED,
}


class MadeUp:
    """A data source of a known length; nothing reads it."""

    def __init__(self, length: int):
        """Holds no example."""
        self._length = length

    def __len__(self) -> int:
        """Returns the number of examples."""
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises IndexError: there is none."""
        raise IndexError(index)


def made_up_split(image: tuple[int, ...], classes: int, examples: int) -> Split:
    """Returns a split of images in this shape, which stay where they are."""
    spec = {
        "image": ArraySpec(image, np.dtype("uint8")),
        "label": ArraySpec((), np.dtype("int32")),
    }
    return Split("train", (), MadeUp(examples), spec, num_classes=classes)


def compiled_step(config: ConfigDict, split: Split, devices: list[Any]) -> Any:
    """Compiles the training step of a run for devices, from the shapes of its arguments."""
    validate_devices(config, len(devices))
    channels = split.spec["image"].shape[-1]
    pixels = np.zeros(channels, np.float32)
    task = Task(static_config(config), split, split, pixels, pixels + 1, len(devices))
    hparams = HParams.from_config(config).as_arrays()
    local = config.batch_size // len(devices)
    batch = {
        name: jax.ShapeDtypeStruct((1, local, *spec.shape), spec.dtype)
        for name, spec in split.spec.items()
    }
    state = jax.eval_shape(functools.partial(init_state, task), hparams)
    arguments = state, hparams, BatchStack(np.int32(0), batch)
    mesh = Mesh(np.array(devices), (AXIS_NAME,))
    spec = PartitionSpec(AXIS_NAME)

    def on_devices(x: Any) -> jax.ShapeDtypeStruct:
        shape = (len(devices), *np.shape(x))
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=NamedSharding(mesh, spec))

    def per_device(state, hparams, stack):
        state, hparams, stack = jax.tree.map(lambda x: x[0], (state, hparams, stack))
        out = train_steps(task, state, hparams, None, stack, num_steps=1)
        return jax.tree.map(lambda x: x[None], out)

    mapped = jax.shard_map(per_device, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    lowered = jax.jit(mapped, donate_argnums=0).lower(*jax.tree.map(on_devices, arguments))
    return lowered.compile()


COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
SHAPE = re.compile(r"\b([a-z]+)(\d+)\[([\d,]*)\]")


def collectives(text: str) -> dict[str, float]:
    """Returns the number of collectives in a compiled program, and the bytes that they carry.

    >>> collectives("x = (f32[8]{0}, f32[2,2]{1,0}) all-reduce(a, b), channel_id=1")
    {'all-reduces': 1, 'other collectives': 0, 'KiB carried': 0.046875}
    """
    found = re.findall(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", text)
    carried = sum(
        int(bits) // 8 * int(np.prod([int(n) for n in dims.split(",") if n]))
        for shapes, _ in found
        for _, bits, dims in SHAPE.findall(shapes)
    )
    reduces = sum(name == "all-reduce" for _, name in found)
    return {
        "all-reduces": reduces,
        "other collectives": len(found) - reduces,
        "KiB carried": carried / 1024,
    }


def estimated_seconds(optimal: float, text: str) -> float:
    """Returns the compiler's estimate of a step, without what stands for operations of no cost.

    The cost model of XLA for TPUs adds -1 s for each operation that it cannot time. `ConcatBitcast`
    is one: it renames memory and moves nothing. NaN where others are left.

    >>> estimated_seconds(-0.75, 'custom_call_target="ConcatBitcast"')
    0.25
    >>> estimated_seconds(-0.75, '')
    nan
    """
    found = optimal + text.count('custom_call_target="ConcatBitcast"')
    return found if found > 0 else math.nan


def measure(config: ConfigDict, split: Split, devices: list[Any]) -> dict[str, float]:
    """Compiles a step, and returns what the compiler says of it: NaN for what it does not say."""
    begin = time.perf_counter()
    step = compiled_step(config, split, devices)
    cost = step.cost_analysis() or {}  # The compiler for GPUs has none.
    memory = step.memory_analysis()
    text = step.as_text()
    return collectives(text) | {
        "FLOPs": cost.get("flops", math.nan),
        "bytes": cost.get("bytes accessed", math.nan),
        "memory": memory.temp_size_in_bytes,
        "alive": alive_at_once(text),
        "needed": memory.temp_size_in_bytes + memory.argument_size_in_bytes,
        "estimate": estimated_seconds(cost.get("optimal_seconds", math.nan), text),
        "compiled in": time.perf_counter() - begin,
    }


def ratio(found: dict[str, float], base: dict[str, float], key: str) -> str:
    """Returns a ratio to the first row, or nothing where the compiler gives no number."""
    return "" if math.isnan(found[key] / base[key]) else f"{found[key] / base[key]:.3f}"


def row_of(name: str, found: dict[str, float], base: dict[str, float], gib: int | None) -> str:
    """Returns a row of the table."""
    needed = found["needed"] / 2**30
    fits = "" if gib is None else f" ({'fits' if needed < gib else 'too large'})"
    cells = [
        name,
        f"{found['all-reduces']} + {found['other collectives']}",
        f"{found['KiB carried']:.1f}",
        *(ratio(found, base, key) for key in ("FLOPs", "bytes", "memory", "alive")),
        f"{found['estimate'] * 1e3:.3f} ms ({ratio(found, base, 'estimate')})"
        if found["estimate"] > 0
        else "",
        f"{needed:.2f} GiB{fits}",
        f"{found['compiled in']:.0f} s",
    ]
    return f"| {' | '.join(cells)} |"


HEADER = (
    "step",
    "all-reduces + others",
    "KiB carried",
    "FLOPs",
    "bytes",
    "temporary memory",
    "alive at once",
    "estimate",
    "memory a chip",
    "compiled in",
)


def main() -> None:
    """Prints the table, row by row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="config file")
    parser.add_argument("--topology", help="v5e:16x16 or another TPU topology; h100:64")
    parser.add_argument("--image", type=int, nargs=3, default=(224, 224, 3))
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--examples", type=int, default=1_281_167)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    args, overrides = parser.parse_known_args()
    try:
        config = parse_config(args.config, overrides)
        devices = topology_devices(args.topology) if args.topology else jax.devices()
        validate_devices(config, len(devices))
    except (UserError, ValueError) as error:
        parser.error(str(error))
    gib = MEMORY_GIB.get(args.topology.split(":")[0]) if args.topology else None
    split = made_up_split(tuple(args.image), args.classes, args.examples)
    local = config.batch_size // len(devices)
    print(f"{config.model.name}, {config.model.dtype}, {len(devices)} devices x {local} examples")
    print(f"| {' | '.join(HEADER)} |\n|{' --- |' * len(HEADER)}", flush=True)
    base: dict[str, float] = {}
    for name in args.cases:
        try:
            found = measure(with_fields(config, CASES[name], name), split, devices)
        except (ValueError, UserError) as error:  # A quarter of two examples, for example.
            print(f"| {name} | not possible: {error} |", flush=True)
            continue
        base = base or found
        print(row_of(name, found, base, gib), flush=True)


if __name__ == "__main__":
    main()
