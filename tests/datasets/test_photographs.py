"""JPEGs of ImageNet's sizes and layout: decoded as Pillow would, cropped, damaged, trained on."""

import dataclasses
import io
import pathlib
import sys

import jax
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from mbn_jax.datasets import batches
from mbn_jax.datasets.batches import HostBatches, evaluation_batches, training_batches
from mbn_jax.datasets.crops import random_box, reduction, resize
from mbn_jax.datasets.find import open_split
from mbn_jax.datasets.order import BatchOrder
from mbn_jax.errors import UserError
from mbn_jax.training.config_files import parse_config
from mbn_jax.training.loop import train
from mbn_jax.training.program import Programs

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "experiments" / "scripts"))

import feeding  # noqa: E402
import photographs  # noqa: E402

SHAPE = (224, 224, 3)
TRAIN, VALIDATION = 40, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("photographs"))
    photographs.write(folder, TRAIN, VALIDATION)
    return folder


def opened(folder, split="train", size=224):
    return open_split(
        "imagenet2012", split, data_dir=folder, image_size=size, random_resized_crop=True
    )


@pytest.fixture(scope="module")
def split(folder):
    return opened(folder)


def with_pillow(file):
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def as_jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "jpeg", **options)
    return file.getvalue()


def test_photographs_are_read_as_imagenet(split, folder):
    assert (len(split), split.num_classes, split.spec["image"].shape) == (TRAIN, 1000, SHAPE)
    assert split.in_memory is None
    files = [split.source[i]["image"] for i in range(TRAIN)]
    assert len(set(files)) == TRAIN
    sizes = {Image.open(io.BytesIO(file)).size for file in files}
    assert sizes <= set(photographs.SIZES)
    assert len(sizes) > 4
    assert len(opened(folder, "validation")) == VALIDATION


def test_a_jpeg_has_the_pixels_that_pillow_finds(split):
    # Both use libjpeg-turbo, whose versions may round differently.
    for i in range(TRAIN):
        file = split.source[i]["image"]
        difference = simplejpeg.decode_jpeg(file).astype(int) - with_pillow(file)
        assert np.abs(difference).max() <= 1


def test_evaluation_resizes_the_centre_as_before(split):
    batch = next(evaluation_batches(split, TRAIN)).examples
    for i in range(TRAIN):
        image = with_pillow(split.source[i]["image"])
        side = min(image.shape[:2]) * 7 / 8
        upper, left = ((n - side) / 2 for n in image.shape[:2])
        expected = resize(image, SHAPE, (left, upper, left + side, upper + side))
        assert np.abs(batch["image"][i].astype(int) - expected).max() <= 1


def smooth(image):
    """Means of 8 x 8 pixels, of which filters of any kind should have the same."""
    return image.reshape(28, 8, 28, 8, 3).mean((1, 3), dtype=float)


# Measured over 60 draws: means of 1.8 and 4.0 of 255; of the means of 8 x 8 pixels at most 0.6
# and 1.5.
@pytest.mark.parametrize(
    ("size", "reductions", "mean"), [((500, 375), {1}, 2.5), ((1600, 1200), {2, 4}, 5.0)]
)
def test_a_random_part_looks_as_pillow_has_it(split, size, reductions, mean):
    picture = Image.fromarray(photographs.pictures()[0]).resize(size, Image.Resampling.LANCZOS)
    file = as_jpeg(picture, quality=95)
    image = with_pillow(file)
    reduced, differences = set(), []
    for position in range(30):
        key = (0, 3, position)
        box = random_box(image.shape[:2], key)
        reduced.add(reduction(box, SHAPE))
        found = split.images.read(file, 0, key)
        expected = resize(image, SHAPE, box)
        differences.append(np.abs(found.astype(float) - expected).mean())
        assert np.abs(smooth(found) - smooth(expected)).mean() < 2
    assert np.mean(differences) < mean
    assert reduced == reductions


def test_a_reduced_image_keeps_as_many_pixels_as_the_result_has():
    assert [reduction((0, 0, w, 500), SHAPE) for w in (100, 447, 448, 500)] == [1, 1, 2, 2]
    assert [reduction((7, 9, 7 + w, 9 + w), SHAPE) for w in (895, 896, 9000)] == [2, 4, 8]


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": "4:4:4"}])
def test_grey_and_other_jpegs_are_read(split, options):
    grey = Image.fromarray(photographs.pictures()[1]).convert("L")
    file = as_jpeg(grey, **{k: v for k, v in options.items() if k != "subsampling"})
    found = split.images.read(file, 0, (0, 0, 0))
    assert found.shape == SHAPE
    assert (found[..., :1] == found).all()
    colour = as_jpeg(Image.fromarray(photographs.pictures()[1]), **options)
    assert np.ptp(split.images.read(colour, 0, (0, 0, 0)), axis=-1).max() > 0


@pytest.mark.parametrize("other", ["PNG", "CMYK"])
def test_what_imagenet_had_among_its_jpegs_is_read(split, other):
    picture, file = Image.fromarray(photographs.pictures()[1]), io.BytesIO()
    if other == "PNG":
        picture.save(file, "png")
    else:
        picture.convert("CMYK").save(file, "jpeg", quality=98)
    for key in (None, (0, 0, 0)):
        found = split.images.read(file.getvalue(), 0, key)
        expected = split.images.read(as_jpeg(picture, quality=98), 0, key)
        assert np.abs(found.astype(int) - expected).mean() < 2


def damaged(file, damage):
    return {"truncated": file[: len(file) // 2], "no JPEG": b"<html>not found</html>"}[damage]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncated", "cannot be read .*truncated"),
        ("no JPEG", "cannot be read "),
    ],
)
def test_a_damaged_jpeg_is_named(tmp_path, monkeypatch, damage, message):
    photograph = photographs.photograph
    monkeypatch.setattr(
        photographs,
        "photograph",
        lambda i: damaged(photograph(i), damage) if i == 5 else photograph(i),
    )
    photographs.write(tmp_path, 8, 1)
    split = opened(str(tmp_path))
    sound = {photograph(i) for i in range(8)}
    [broken] = [i for i in range(8) if split.source[i]["image"] not in sound]
    pattern = f"^Example {broken} of split 'train' of data set 'imagenet2012' .*{message}"
    with pytest.raises(UserError, match=pattern) as error:
        list(evaluation_batches(split, 4))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=pattern):
        list(stacks(split, batch_size=4, num_steps=2))


def stacks(split, *, batch_size=20, process_index=0, process_count=1, **options):
    order = BatchOrder(split, seed=0, batch_size=batch_size)
    host = HostBatches(split, order, process_index, process_count)
    options = {"first_step": 0, "num_steps": 6, "steps_per_stack": 1, **options}
    return list(training_batches(host, **options))


class Watched:
    """A source that remembers what was read."""

    def __init__(self, source):
        self.source, self.read = source, []

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        self.read.append(index)
        return self.source[index]


def test_a_run_resumes_at_any_step_and_hosts_read_their_own_part(folder, monkeypatch):
    monkeypatch.setattr(batches, "EXAMPLES_PER_CHUNK", 6)  # A host's part has two, one shorter.
    split = opened(folder, size=32)
    whole = stacks(split)
    for first_step in (1, 4):
        later = stacks(split, first_step=first_step)
        assert len(later) == 6 - first_step
        for a, b in zip(later, whole[first_step:], strict=True):
            assert (a["image"] == b["image"]).all()
            assert (a["label"] == b["label"]).all()
    watched = [dataclasses.replace(split, source=Watched(split.source)) for _ in range(2)]
    parts = [stacks(x, process_index=i, process_count=2) for i, x in enumerate(watched)]
    for a, b, both in zip(*parts, whole, strict=True):
        assert (np.concatenate([a["image"], b["image"]], axis=1) == both["image"]).all()
        assert (np.concatenate([a["label"], b["label"]], axis=1) == both["label"]).all()
    read = [x.source.read for x in watched]
    assert [len(found) for found in read] == [60, 60]
    # Three epochs of 40: each example is read once in each of them, by one host or the other.
    assert sorted(read[0] + read[1]) == sorted(list(range(TRAIN)) * 3)


@pytest.mark.slow
def test_a_step_of_the_config_for_imagenet_on_jpegs(folder, tmp_path):
    config = parse_config(str(ROOT / "configs" / "imagenet.py"))
    config.dataset.data_dir = folder
    config.dataset.num_workers = 0
    config.model.name = "cifar_resnet8"  # Compiled in seconds.
    config.dataset.image_size = 32
    config.batch_size = config.eval_batch_size = 8
    config.num_epochs = 8 / TRAIN
    config.schedule.warmup_epochs = 0.0
    config.recalibrate_batches = 0
    config.log_every_steps = 1
    records = []
    train(
        config,
        tmp_path,
        programs=Programs(jax.devices()[:1]),
        on_record=lambda step, values: records.append((step, values)),
    )
    [(step, values)] = records
    assert step == 1
    assert 5 < values["train_loss"] < 10  # ln 1000 is 6.9.
    assert 0 <= values["test_error"] <= 1


def test_feeding_is_measured(folder, monkeypatch, capsys):
    options = ["--images=16", "--batch=8", "--rounds=1", "--batch_per_host=300", "--step_ms=100"]
    rows = {}
    for what in ("decoders", "stages"):
        monkeypatch.setattr(sys, "argv", ["feeding.py", what, f"--data_dir={folder}", *options])
        feeding.main()
        cells = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
        rows |= {line[0].strip("| "): line[1] for line in cells if len(line) > 1}
    assert 0 < float(rows["decode: simplejpeg"]) < float(rows["all of it, before"])
    # The processor time of 3,000 images is that of 3 times 1,000.
    [own] = [cores for name, cores in rows.items() if name.endswith(": 3,000 images/s")]
    assert float(own.strip("| ")) == pytest.approx(
        3 * float(rows["1,000 images/s"].strip("| ")), abs=0.3
    )
