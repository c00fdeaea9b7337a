"""The way of the data: real images, an order that depends on nothing but seed and step."""

import io
import itertools
import signal
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from mbn_jax.datasets.augmentation import augment, example_keys, look_up, standardize
from mbn_jax.datasets.batches import (
    HostBatches,
    evaluation_batches,
    pixel_statistics,
    training_batches,
)
from mbn_jax.datasets.find import open_split as load_split
from mbn_jax.datasets.order import BatchOrder
from mbn_jax.datasets.standard import STANDARD, standard_dataset
from mbn_jax.errors import UserError
from mbn_jax.training.checks import validate
from mbn_jax.training.config import default_config


@pytest.fixture(scope="module")
def train(data_dir):
    return load_split("digits", "train", data_dir=data_dir)


def stacks(
    split,
    *,
    seed=0,
    batch_size=12,
    classes_per_batch=0,
    process_index=0,
    process_count=1,
    **options,
):
    order = BatchOrder(split, seed=seed, batch_size=batch_size, classes_per_batch=classes_per_batch)
    host = HostBatches(split, order, process_index, process_count)
    return list(training_batches(host, **options))


def indices(split, *, first_step=0, num_steps=30, **options):
    found = stacks(split, first_step=first_step, num_steps=num_steps, steps_per_stack=7, **options)
    # The last stack is padded.
    return np.concatenate(found)[: num_steps - first_step]


def test_digits_are_the_real_ones_each_in_one_split(data_dir, train):
    test = load_split("digits", "test", data_dir=data_dir)
    assert (len(train), len(test)) == (1437, 360)
    assert (train.spec["image"].shape, train.num_classes) == ((8, 8, 1), 10)
    found = {
        (image.tobytes(), int(label))
        for split in (train, test)
        for image, label in zip(split.in_memory["image"], split.in_memory["label"], strict=True)
    }
    digits = load_digits()
    stored = np.round(digits.images * (255 / 16)).astype(np.uint8)
    pairs = zip(stored, digits.target, strict=True)
    assert found == {(image.tobytes(), int(label)) for image, label in pairs}


def test_slices_of_splits(data_dir, train):
    part = load_split("digits", "train[10%:20%]", data_dir=data_dir)
    assert len(part) == 143
    assert (part.in_memory["image"] == train.in_memory["image"][144:287]).all()


def test_an_order_draws_each_epoch_once_and_is_forgotten_with_its_run(train, monkeypatch):
    orders = [BatchOrder(train, seed=seed, batch_size=len(train) // 2) for seed in range(3)]
    drawn = []
    draw = BatchOrder._draw
    monkeypatch.setattr(BatchOrder, "_draw", lambda *args: drawn.append(args) or draw(*args))
    for step in range(4):  # Two epochs each, by turns.
        for order in orders:
            order.steps(step, step + 1)
    assert len(drawn) == len({(order.seed, epoch) for order, epoch in drawn}) == 6
    drawn.clear()
    forgotten = weakref.ref(orders.pop(0))
    del order
    assert forgotten() is None


def test_every_epoch_sees_every_example_once_in_an_order_of_its_own(train):
    order = indices(train, batch_size=1437, num_steps=2)
    assert (np.sort(order, axis=1) == np.arange(1437)[None]).all()
    assert (order[0] != order[1]).any()


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_batches_of_few_classes(train, classes):
    order = indices(train, batch_size=20, classes_per_batch=classes, num_steps=60)
    seen = [len(set(train.in_memory["label"][batch])) for batch in order]
    assert max(seen) == classes
    # Mixed: half of a batch has its classes too, more often than not.
    halves = [len(set(train.in_memory["label"][batch[:10]])) for batch in order]
    assert np.mean(np.equal(halves, seen)) > 0.6
    # An epoch has some 65 such batches; no example comes twice in it.
    assert len(set(order.flat)) == order.size
    again = indices(train, batch_size=20, classes_per_batch=classes, num_steps=200)
    assert (again[:60] == order).all()
    assert len(set(again.flat)) > 0.99 * len(train)


def test_batches_of_few_classes_need_enough_examples(data_dir, train):
    with pytest.raises(UserError, match="needs 300 examples of a class"):
        stacks(train, batch_size=300, classes_per_batch=1, num_steps=1)


def test_a_split_on_disk_has_batches_of_few_classes_too(data_dir, train):
    on_disk = load_split("digits", "train", data_dir=data_dir, max_bytes_in_memory=0)
    assert (on_disk.read_labels() == train.in_memory["label"]).all()
    options = {"classes_per_batch": 2, "num_steps": 4, "first_step": 0, "steps_per_stack": 4}
    decoded, looked_up = (stacks(split, **options) for split in (on_disk, train))
    assert (decoded[0]["label"] == train.in_memory["label"][looked_up[0]]).all()
    assert {len(set(labels)) for labels in decoded[0]["label"]} <= {1, 2}


def test_order_depends_on_seed_and_resumes_at_any_step(train):
    order = indices(train)
    assert (indices(train) == order).all()
    assert (indices(train, seed=1) != order).any()
    assert (indices(train, first_step=17) == order[17:]).all()


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_divide_each_global_batch_between_them(train, hosts):
    parts = [indices(train, process_index=i, process_count=hosts) for i in range(hosts)]
    whole = indices(train)
    assert (np.concatenate(parts, axis=1) == whole).all()
    assert len(set(whole.flat)) == whole.size  # So that no host reads what another does.


def test_a_split_on_disk_gives_the_same_batches_as_one_in_memory(data_dir, train):
    on_disk = load_split("digits", "train", data_dir=data_dir, max_bytes_in_memory=0)
    assert on_disk.in_memory is None
    options = {"seed": 3, "batch_size": 4, "first_step": 2, "num_steps": 7, "steps_per_stack": 2}
    decoded, looked_up = (stacks(s, **options) for s in (on_disk, train))
    assert [len(stack["label"]) for stack in decoded] == [2, 2, 1]
    for a, b in zip(decoded, looked_up, strict=True):
        b = look_up(train.in_memory, b)
        steps = len(a["label"])
        assert (a["image"] == b["image"][:steps]).all()
        assert (a["label"] == b["label"][:steps]).all()
    assert np.allclose(pixel_statistics(on_disk), pixel_statistics(train), atol=0)


def prepare(folder, name, images, labels, shape, *, dtype=np.uint8, num_classes=4):
    """Prepares a set of PIL images, or of PNG files, as its own builder would; returns `folder`."""
    import tensorflow_datasets as tfds

    def info(self):
        features = {
            "image": tfds.features.Image(shape=shape, dtype=dtype),
            "label": tfds.features.ClassLabel(num_classes=num_classes),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _generate_examples(self):
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield i, {"image": image, "label": label}

    members = {
        "VERSION": tfds.core.Version("1.0.0"),
        "__module__": __name__,
        "_info": info,
        "_split_generators": lambda self, _: {"train": self._generate_examples()},
        "_generate_examples": _generate_examples,
    }
    builder = type(name.capitalize(), (tfds.core.GeneratorBasedBuilder,), members)
    builder(data_dir=folder, file_format="array_record").download_and_prepare()
    return str(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with a set of 40 images of many sizes, whose pixels tell where they are."""
    images = []
    for i in range(40):
        width, height = 30 + i, 69 - i
        image = np.zeros((height, width, 3), np.uint8)
        image[..., 0] = 3 * np.arange(width)[None]
        image[..., 1] = 3 * np.arange(height)[:, None]
        image[..., 2] = i
        images.append(Image.fromarray(image))
    labels = [i % 4 for i in range(40)]
    folder = tmp_path_factory.mktemp("pictures")
    return prepare(folder, "pictures", images, labels, (None, None, 3))


def boxes(batch):
    """Returns left, right, upper and lower of what was cropped, in pixels, about."""
    image = batch["image"].astype(float) / 3
    ends = (image[..., 8, 0, 0], image[..., 8, -1, 0], image[..., 0, 8, 1], image[..., -1, 8, 1])
    return np.stack(ends, -1)


def test_random_resized_crops_are_drawn_by_seed_step_and_position(pictures):
    split = load_split(
        "pictures", "train", data_dir=pictures, image_size=16, random_resized_crop=True
    )
    assert split.in_memory is None
    assert split.spec["image"].shape == (16, 16, 3)
    options = {"batch_size": 20, "num_steps": 20, "first_step": 0, "steps_per_stack": 4}
    runs = [stacks(split, **options) for _ in range(2)]
    for stack, again in zip(*runs, strict=True):
        assert (stack["image"] == again["image"]).all()
    drawn = np.concatenate([boxes(stack) for stack in runs[0]]).reshape(-1, 4)
    which = np.concatenate([stack["image"][..., 8, 8, 2] for stack in runs[0]]).reshape(-1)
    left, right, upper, lower = drawn.T
    area = (right - left) * (lower - upper) / ((30.0 + which) * (69.0 - which))
    # 8 to 100 % of the image, from pixel centre to pixel centre of what it was resized to.
    assert 0.03 < area.min() < 0.15
    assert 0.7 < area.max() < 1.0
    # Each image comes ten times, never cropped alike.
    assert len(np.unique(drawn.round(2), axis=0)) > 390
    later = stacks(split, **{**options, "first_step": 12})
    assert (later[0]["image"] == runs[0][3]["image"]).all()
    hosts = [stacks(split, **options, process_index=i, process_count=2) for i in range(2)]
    whole = np.concatenate([host[0]["image"] for host in hosts], axis=1)
    assert (whole == runs[0][0]["image"]).all()


@pytest.mark.slow
def test_worker_processes_decode_the_same(pictures):
    split = load_split(
        "pictures", "train", data_dir=pictures, image_size=16, random_resized_crop=True
    )
    options = {"batch_size": 4, "num_steps": 6, "first_step": 1, "steps_per_stack": 2}
    plain, by_workers = (stacks(split, **options, num_workers=n) for n in (0, 2))
    assert [len(stack["label"]) for stack in by_workers] == [2, 2, 1]
    for a, b in zip(plain, by_workers, strict=True):
        assert (a["image"] == b["image"]).all()
        assert (a["label"] == b["label"]).all()


WORKER = """
import multiprocessing, os, signal, time
from mbn_jax.datasets.workers import begin_worker

def work(ready):
    begin_worker(0, 1)
    ready.set()
    time.sleep(600)

fork = multiprocessing.get_context("fork")
ready = fork.Event()
worker = fork.Process(target=work, args=(ready,), daemon=True)
worker.start()
ready.wait()
for number in (signal.SIGTERM, signal.SIGINT):
    os.kill(worker.pid, number)
worker.join(0.5)
print(worker.is_alive(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_outlives_signals_and_not_the_process_it_serves():
    process = subprocess.Popen([sys.executable, "-c", WORKER], stdout=subprocess.PIPE, text=True)
    # The worker writes to the same pipe: it is read to its end when both have ended.
    said, _ = process.communicate(timeout=120)
    assert (said, process.returncode) == ("True\n", -signal.SIGKILL)


def test_evaluation_sees_the_centre(pictures):
    split = load_split(
        "pictures", "train", data_dir=pictures, image_size=16, random_resized_crop=True
    )
    batch = next(evaluation_batches(split, 40)).examples
    which = batch["image"][:, 8, 8, 2].astype(float)
    sides = np.minimum(30 + which, 69 - which) * 7 / 8
    seeded = next(evaluation_batches(split, 40, crop_seed=0)).examples
    assert (seeded["label"] == batch["label"]).all()
    assert (seeded["image"] != batch["image"]).any()
    left, right, upper, lower = boxes(batch).T
    # Half a pixel of the result is side / 32 pixels of the image, on each side.
    np.testing.assert_allclose(right - left, sides * 15 / 16, atol=0.7)
    np.testing.assert_allclose(lower - upper, sides * 15 / 16, atol=0.7)
    np.testing.assert_allclose((left + right + 1) / 2, (30 + which) / 2, atol=0.7)
    squashed = load_split("pictures", "train", data_dir=pictures, image_size=16)
    assert squashed.in_memory["image"].shape == (40, 16, 16, 3)


def test_the_table_of_standard_sets_has_fields_of_the_config():
    for name in STANDARD:
        config = default_config()
        config.dataset.update(standard_dataset(name))
        validate(config)
        assert config.dataset.name == name
    assert STANDARD["imagenet2012"]["random_resized_crop"]


def test_evaluation_counts_every_example_once(train):
    batches = list(evaluation_batches(train, 100))
    assert {len(batch.mask) for batch in batches} == {100}
    counted = np.concatenate([batch.examples[batch.mask] for batch in batches])
    assert counted.tolist() == list(range(1437))


def test_evaluation_on_a_few_is_on_some_of_everywhere(train):
    batches = list(evaluation_batches(train, 100, num_examples=250))
    counted = np.concatenate([batch.examples[batch.mask] for batch in batches])
    assert (np.diff(counted) < 0).any()  # In no order.
    counted = np.sort(counted)
    assert (len(counted), counted[0], counted[-1]) == (250, 0, 1436)
    assert set(np.diff(counted)) == {5, 6}


def test_images_are_resized_on_request(data_dir, train):
    large = load_split("digits", "test[:5]", data_dir=data_dir, image_size=16)
    assert large.in_memory["image"].shape == (5, 16, 16, 1)


def test_standardized_pixels_have_mean_0_and_variance_1(train):
    images = standardize(jnp.asarray(train.in_memory["image"]), *pixel_statistics(train))
    # Float32 sums over 92,000 pixels.
    assert abs(float(images.mean())) < 1e-4
    assert abs(float(images.std()) - 1) < 1e-4


def test_augmentation_shifts_and_mirrors():
    image = np.zeros((9, 9, 1), np.float32)
    image[4, 4], image[4, 5] = 1.0, 2.0
    keys = example_keys(jax.random.key(0), 0, jnp.arange(400))
    images = jnp.tile(image[None], (400, 1, 1, 1))
    shown = np.asarray(augment(images, keys, crop_padding=2, flip=True))
    ones, twos = (np.argwhere(shown[..., 0] == value)[:, 1:] for value in (1.0, 2.0))
    assert len(ones) == len(twos) == 400
    steps = (twos - ones)[:, 1]
    assert set(steps) == {1, -1}
    # 400 fair draws: 5 standard deviations are 50.
    assert abs((steps == 1).sum() - 200) < 50
    assert set(map(tuple, ones)) == set(itertools.product(range(2, 7), range(2, 7)))


def test_augmentation_depends_on_step_and_position_alone(train):
    images = standardize(jnp.asarray(train.in_memory["image"][:8]), *pixel_statistics(train))
    key = jax.random.key(5)

    def augmented(positions, step=3):
        keys = example_keys(key, jnp.int32(step), positions)
        return augment(images[positions], keys, crop_padding=2, flip=True)

    whole = augmented(jnp.arange(8))
    halves = jnp.concatenate([augmented(jnp.arange(4)), augmented(jnp.arange(4, 8))])
    assert (whole == halves).all()
    assert (whole != augmented(jnp.arange(8), step=4)).any()
    assert (augment(images, None, crop_padding=0, flip=False) == images).all()


@pytest.mark.parametrize(
    ("name", "split", "options", "message"),
    [
        ("digit", "train", {}, "TFDS has no data set 'digit'. Did you mean 'digits'"),
        ("cifar10", "train", {}, r"'cifar10' is not prepared in .*\[prepare\].*tfds build"),
        (
            "digits",
            "valid",
            {},
            r"'digits' has no examples in split 'valid'; its splits are \['test', 'train'\]",
        ),
        (
            "digits",
            "train",
            {"kwargs": (("version", "9.9.9"),)},
            "Data set 'digits' cannot be opened",
        ),
        ("digits", "test[:0]", {}, r"'digits' has no examples in split 'test\[:0\]'"),
    ],
)
def test_what_cannot_be_read_is_said_in_a_sentence(data_dir, name, split, options, message):
    with pytest.raises(UserError, match=message):
        load_split(name, split, data_dir=data_dir, **options)


def test_only_image_classification_is_accepted(tmp_path):
    import tensorflow_datasets as tfds

    class Numbers(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"x": tfds.features.Scalar(np.int64), "y": tfds.features.Scalar(np.int64)}
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("x", "y"),
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield 0, {"x": 1, "y": 2}

    Numbers(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    with pytest.raises(UserError, match="'numbers' is not an image-classification set"):
        load_split("numbers", "train", data_dir=str(tmp_path))


def flat(channels=1, size=(8, 8)):
    return Image.fromarray(np.full((*size, channels), 7, np.uint8).squeeze())


def grey16():
    return Image.fromarray(np.full((8, 8), 1000, np.uint16))


@pytest.mark.parametrize(
    ("name", "odd", "label", "options", "message"),
    [
        ("tall", flat(size=(9, 8)), 1, {}, r"an image of shape \(9, 8, 1\), expected \(8, 8, 1\)"),
        ("rgba", flat(channels=4), 1, {}, r"an image of shape \(8, 8, 4\), expected \(8, 8, 1\)"),
        ("unlabelled", flat(), -1, {}, "has label -1, expected 0 to 3"),
        ("sixteenbit", grey16(), 1, {"dtype": np.uint16}, "of uint16, expected one of uint8"),
        ("text", b"no image", 1, {}, "cannot be read .* its record files are damaged"),
    ],
)
@pytest.mark.slow
def test_examples_that_are_not_what_their_set_declares(
    tmp_path, name, odd, label, options, message
):
    images, labels = [flat()] * 20 + [odd], [1] * 20 + [label]
    folder = prepare(tmp_path, name, images, labels, (8, 8, 1), **options)
    with pytest.raises(UserError, match=message) as error:
        load_split(name, "train", data_dir=folder)
    assert "\n" not in str(error.value)
    if options:
        return
    # Decoded as it is used: said when it is read, whoever reads it.
    split = load_split(name, "train", data_dir=folder, max_bytes_in_memory=0)
    with pytest.raises(UserError, match=message):
        pixel_statistics(split)
    for workers in (0, 1) if name == "tall" else (0,):  # A process takes seconds to start.
        with pytest.raises(UserError, match=message):
            stacks(split, first_step=0, num_steps=2, steps_per_stack=1, num_workers=workers)
    if label < 0:
        with pytest.raises(UserError, match=message):
            split.read_labels()


def test_pixels_of_float32_are_kept_and_must_be_finite(tmp_path, monkeypatch):
    from tensorflow_datasets.core.features import image_feature

    # Without TensorFlow, TFDS cannot write such images itself: a float32 is a PNG's four bytes.
    monkeypatch.setattr(
        image_feature._FloatImageEncoder, "encode_image_or_path", lambda self, image: image
    )
    found = np.linspace(-3, 3, 4 * 64).astype(np.float32).reshape(4, 8, 8, 1)

    def png(image):
        file = io.BytesIO()
        Image.fromarray(image.view(np.uint8)).save(file, "png")
        return file.getvalue()

    options = {"labels": [0, 1, 2, 3], "shape": (8, 8, 1), "dtype": np.float32}
    folder = prepare(tmp_path, "floats", [png(x) for x in found], **options)
    split = load_split("floats", "train", data_dir=folder)
    assert split.in_memory["image"].dtype == np.float32
    assert (np.sort(split.in_memory["image"].ravel()) == found.ravel()).all()
    images = standardize(jnp.asarray(split.in_memory["image"]), *pixel_statistics(split))
    assert abs(float(images.std()) - 1) < 1e-5
    assert (
        load_split("floats", "train", data_dir=folder, max_bytes_in_memory=1023).in_memory is None
    )

    found[2, 3, 4, 0] = np.nan
    folder = prepare(tmp_path, "holes", [png(x) for x in found], **options)
    with pytest.raises(UserError, match=r"Example \d of split 'train' .* NaN or infinite"):
        load_split("holes", "train", data_dir=folder)


@pytest.mark.parametrize("damage", ["truncated", "a flipped bit", "missing"])
def test_a_damaged_record_file_is_said_in_a_sentence(tmp_path, damage):
    name = "damaged" + damage.split()[-1]
    folder = prepare(tmp_path, name, [flat()] * 20, [1] * 20, (8, 8, 1))
    (records,) = tmp_path.glob(f"{name}/*/*.array_record*")
    content = bytearray(records.read_bytes())
    if damage == "truncated":
        records.write_bytes(content[: len(content) - 100])
    elif damage == "missing":
        records.unlink()
    else:
        content[content.index(b"IHDR")] ^= 1
        records.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot be read .* prepare the data set anew") as error:
        load_split(name, "train", data_dir=folder)
    assert "\n" not in str(error.value)
