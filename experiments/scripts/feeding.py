r"""How fast one core feeds a network with JPEGs of ImageNet's size, stage by stage.

    python experiments/scripts/photographs.py --data_dir=/tmp/photographs
    taskset -c 0 python experiments/scripts/feeding.py decoders --data_dir=/tmp/photographs
    taskset -c 0 python experiments/scripts/feeding.py stages --data_dir=/tmp/photographs \
        --batch_per_host=256 --step_ms=100
    python experiments/scripts/feeding.py workers --data_dir=/tmp/photographs
    python experiments/scripts/feeding.py memory --data_dir=/tmp/photographs --images=100000

`decoders` and `stages` count processor time, not time on the clock, so that other work on the
machine counts only by what it takes of caches and memory; all rows take turns, and the median over
the rounds is printed. `stages` ends with the cores that a host needs, at a few rates and for the
batch and the time of a step that it is given.
`workers` compares threads with processes by the clock, on all cores. `memory` reads so many images
and prints the resident memory on the way. The files are in the page cache: the time of a disk is
not in these numbers. Result: docs/results/feeding.md.
"""

import argparse
import contextlib
import functools
import importlib
import io
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from mbn_jax.datasets.batches import HostBatches, training_batches
from mbn_jax.datasets.crops import random_box, reduction, resize, resize_random_part
from mbn_jax.datasets.find import open_split
from mbn_jax.datasets.order import BatchOrder
from mbn_jax.datasets.split import Split
from mbn_jax.datasets.standard import standard_dataset
from mbn_jax.parallel.devices import distribute, split_over_devices

SHAPE = (224, 224, 3)
SEED = 0


def open_photographs(data_dir: str) -> Split:
    """Opens the training split as configs/imagenet.py does."""
    options = standard_dataset("imagenet2012")
    return open_split(
        options["name"],
        "train",
        data_dir=data_dir,
        image_size=options["image_size"],
        random_resized_crop=options["random_resized_crop"],
    )


def with_pillow(file: bytes) -> np.ndarray:
    """Decodes as TFDS does where OpenCV is not installed."""
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def with_opencv(file: bytes, flags: int = cv2.IMREAD_COLOR) -> np.ndarray:
    """Decodes to RGB."""
    image = cv2.imdecode(np.frombuffer(file, np.uint8), flags)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)


def box_of(file: bytes, number: int) -> tuple[float, float, float, float]:
    """Returns the random part of the image with this number."""
    height, width, *_ = simplejpeg.decode_jpeg_header(file)
    return random_box((height, width), (SEED, 0, number))


def pillow_draft(file: bytes, number: int) -> np.ndarray:
    """Decodes as small as the part allows, and resizes; all with Pillow."""
    image, box = Image.open(io.BytesIO(file)), box_of(file, number)
    width, height = image.size
    factor = reduction(box, SHAPE)
    image.draft("RGB", (width // factor, height // factor))
    box = tuple(x * image.size[0] / width for x in box)
    return np.asarray(image.resize(SHAPE[:2], Image.Resampling.BILINEAR, box=box))


def opencv_reduced(file: bytes, number: int) -> np.ndarray:
    """Decodes at half the size where the part allows, and resizes; all with OpenCV."""
    box = box_of(file, number)
    factor = min(reduction(box, SHAPE), 2)
    flags = cv2.IMREAD_REDUCED_COLOR_2 if factor == 2 else cv2.IMREAD_COLOR
    image = with_opencv(file, flags)
    return resize_random_part(image, SHAPE, tuple(x / factor for x in box))


def decoders(split: Split) -> dict[str, Callable[[bytes, int], Any]]:
    """Returns ways to decode, and to decode and crop, by name; those that are installed."""
    found: dict[str, Callable[[bytes, int], Any]] = {
        "decode: Pillow": lambda file, _: with_pillow(file),
        "decode: OpenCV": lambda file, _: with_opencv(file),
        "decode: simplejpeg": lambda file, _: simplejpeg.decode_jpeg(file),
        "crop: Pillow, resized by Pillow": lambda file, i: resize(
            with_pillow(file), SHAPE, box_of(file, i)
        ),
        "crop: Pillow, reduced (draft), resized by Pillow": pillow_draft,
        "crop: simplejpeg, resized by Pillow": lambda file, i: resize(
            simplejpeg.decode_jpeg(file), SHAPE, box_of(file, i)
        ),
        "crop: OpenCV, reduced, resized by OpenCV": opencv_reduced,
        "crop: simplejpeg, reduced, resized by OpenCV": functools.partial(as_in_training, split),
    }
    with contextlib.suppress(ImportError):
        imagecodecs = importlib.import_module("imagecodecs")
        found["decode: imagecodecs"] = lambda file, _: imagecodecs.jpeg8_decode(file)
    with contextlib.suppress(ImportError):
        found |= with_nvimgcodec(importlib.import_module("nvidia.nvimgcodec"), split)
    return found


def as_in_training(split: Split, file: bytes, number: int) -> np.ndarray:
    """Decodes and resizes a part as training does."""
    return split.images.read(file, 0, (SEED, 0, number))


def with_nvimgcodec(nvimgcodec: Any, split: Split) -> dict[str, Callable[[bytes, int], Any]]:
    """Returns the ways of nvImageCodec on a CPU: it can decode a part of an image alone."""
    decoder = nvimgcodec.Decoder(
        max_num_cpu_threads=1,
        device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
        backends=[nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)],
    )

    def part(file: bytes, number: int) -> np.ndarray:
        box = box_of(file, number)
        if reduction(box, SHAPE) > 1:
            return as_in_training(split, file, number)
        left, top, right, bottom = map(round, box)
        region = nvimgcodec.Region(start=[top, left], end=[bottom, right])
        code = nvimgcodec.CodeStream(file).get_sub_code_stream(0, region=region)
        image = np.asarray(decoder.decode(code).cpu())
        return resize_random_part(image, SHAPE, (0.0, 0.0, right - left, bottom - top))

    return {
        "decode: nvImageCodec": lambda file, _: decoder.decode(nvimgcodec.CodeStream(file)).cpu(),
        "crop: the same, but nvImageCodec's part alone where it is not reduced": part,
    }


def processor_time(rows: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Returns the median time that each row takes of the processor, in seconds."""
    times: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(rounds + 1):
        for name, call in rows.items():
            begin = time.process_time()
            call()
            if number:  # The first opens files.
                times[name].append(time.process_time() - begin)
    return {name: float(np.median(seconds)) for name, seconds in times.items()}


def print_rates(seconds: Mapping[str, float], images: int, to: str) -> None:
    """Prints a table as Markdown; ratios are to the rate of the row `to`."""
    print(f"| | ms an image | images/s a core | to {to} |\n| --- | --- | --- | --- |")
    for name, time_of in seconds.items():
        each = time_of / images
        print(f"| {name} | {1e3 * each:.3f} | {1 / each:,.0f} | {seconds[to] / time_of:.2f} |")


def measure_decoders(split: Split, args: argparse.Namespace) -> None:
    """Prints the rate of each decoder on the same files."""
    files = [split.source[i]["image"] for i in some_examples(split, args.images)]
    rows = {
        name: lambda decode=decode: [decode(file, i) for i, file in enumerate(files)] and None
        for name, decode in decoders(split).items()
    }
    print_rates(processor_time(rows, args.rounds), len(files), "decode: simplejpeg")


def some_examples(split: Split, count: int) -> list[int]:
    """Returns examples in a random order."""
    return [int(i) for i in np.random.default_rng(SEED).permutation(len(split))[:count]]


def measure_stages(split: Split, args: argparse.Namespace) -> None:
    """Prints the time of each stage, of the whole, of the pipeline before, and the cores needed."""
    examples = some_examples(split, args.images)
    files = [split.source[i]["image"] for i in examples]
    numbered = list(enumerate(files))
    keys = [(SEED, 0, i) for i in range(len(files))]
    images = [simplejpeg.decode_jpeg(file) for file in files]
    boxes = [box_of(file, i) for i, file in numbered]
    stack = split.read(np.array(examples), keys)

    def before() -> None:
        found = [split.source[i] for i in examples]
        pixels = [
            resize(with_pillow(x["image"]), SHAPE, box_of(x["image"], i))
            for i, x in enumerate(found)
        ]
        np.stack(pixels)

    def whole() -> None:
        steps = len(files) // args.batch
        host = host_batches(split, args.batch)
        for batch in training_batches(host, first_step=0, num_steps=steps, steps_per_stack=1):
            distribute(split_over_devices(batch, axis=1))

    rows = {
        "decode, in full": lambda: [simplejpeg.decode_jpeg(file) is None for file in files],
        "read: record, label, checks": lambda: [split.source[i] is None for i in examples],
        "draw the part": lambda: [box_of(file, i) for i, file in numbered],
        "crop and resize": lambda: [
            resize_random_part(image, SHAPE, box) is None
            for image, box in zip(images, boxes, strict=True)
        ],
        "stack": lambda: np.stack(list(stack["image"])),
        "copy to the device": lambda: distribute(
            split_over_devices({name: x[None] for name, x in stack.items()}, axis=1)
        ),
        "all of it, before": before,
        "all of it": functools.partial(split.read, np.array(examples), keys),
        "all of it, by Grain's threads, to the device": whole,
    }
    seconds = processor_time(rows, args.rounds)
    print_rates(seconds, len(files), "decode, in full")
    each = seconds["all of it, by Grain's threads, to the device"] / len(files)
    print_cores(each, args)


def print_cores(seconds_an_image: float, args: argparse.Namespace) -> None:
    """Prints how many cores keep a host fed."""
    own = 1e3 * args.batch_per_host / args.step_ms
    named = f"{args.batch_per_host} images every {args.step_ms:g} ms: {own:,.0f} images/s"
    needs = {f"{need:,} images/s": need for need in (1000, 2000, 5000, 10_000, 20_000)} | {
        named: own
    }
    print("\n| a host that takes | cores |\n| --- | --- |")
    for name, need in needs.items():
        print(f"| {name} | {need * seconds_an_image:.1f} |")


def host_batches(split: Split, batch: int) -> HostBatches:
    """Returns the batches of one host alone."""
    return HostBatches(split, BatchOrder(split, seed=SEED, batch_size=batch))


def measure_workers(split: Split, args: argparse.Namespace) -> None:
    """Prints the rate by the clock of one thread, of all threads, and of processes."""
    cores = os.cpu_count() or 1
    kinds = {"1 process": 1, f"{cores} processes": cores, f"{cores} threads": 0}
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(args.rounds):
        for name, workers in kinds.items():
            steps = args.images // args.batch
            batches = training_batches(
                host_batches(split, args.batch),
                first_step=number * steps,
                num_steps=(number + 1) * steps,
                steps_per_stack=1,
                num_workers=workers,
            )
            next(batches)  # Processes start, and read ahead.
            next(batches)
            begin = time.perf_counter()
            count = sum(batch["label"].size for batch in batches)
            rates[name].append(count / (time.perf_counter() - begin))
    print("| | images/s by the clock | lowest and highest |\n| --- | --- | --- |")
    for name, found in rates.items():
        print(f"| {name} | {np.median(found):,.0f} | {min(found):,.0f} to {max(found):,.0f} |")


def measure_memory(split: Split, args: argparse.Namespace) -> None:
    """Prints the resident memory after every tenth of the images."""
    steps = args.images // args.batch
    batches = training_batches(
        host_batches(split, args.batch),
        first_step=0,
        num_steps=steps,
        steps_per_stack=1,
        num_workers=args.workers,
    )
    print("| images | resident MiB |\n| --- | --- |")
    for step, _ in enumerate(batches, 1):
        if step % max(1, steps // 10) == 0:
            print(f"| {step * args.batch:,} | {resident_bytes() / 2**20:,.0f} |", flush=True)


def resident_bytes() -> int:
    """Returns the memory that this process and its workers have in use."""
    pids = [os.getpid(), *(process.pid for process in multiprocessing.active_children())]
    pages = 0
    for pid in pids:
        with open(f"/proc/{pid}/statm") as file:
            pages += int(file.read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Prints tables as Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    measures = {
        "decoders": measure_decoders,
        "stages": measure_stages,
        "workers": measure_workers,
        "memory": measure_memory,
    }
    parser.add_argument("what", choices=measures)
    parser.add_argument("--data_dir", required=True, help="where photographs.py wrote")
    parser.add_argument("--images", type=int, default=512, help="images of a turn")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=64, help="images of a batch that is decoded")
    parser.add_argument("--workers", type=int, default=0, help="processes of memory; 0: threads")
    parser.add_argument("--batch_per_host", type=int, default=256, help="of the host to be fed")
    parser.add_argument("--step_ms", type=float, default=100.0, help="time of its step")
    args = parser.parse_args()
    measures[args.what](open_photographs(args.data_dir), args)


if __name__ == "__main__":
    main()
