"""Every config file trains one step on random images, and every sweep file declares valid runs."""

import dataclasses
import math
import pathlib
import runpy

import jax
import numpy as np
import pytest

from mbn_jax.sweeps.command import load_sweep
from mbn_jax.training.checks import validate
from mbn_jax.training.config import default_config, fields
from mbn_jax.training.config_files import parse_config
from mbn_jax.training.loop import train
from mbn_jax.training.program import Programs

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted((ROOT / "configs").glob("*.py"))
SWEEPS = sorted((ROOT / "experiments").glob("*.py"))


def arguments(file):
    """The arguments that a config file names; one empty one where it takes none."""
    return list(runpy.run_path(str(file)).get("ARGUMENTS", [""]))


CONFIGS = [f"{file.name}:{a}".rstrip(":") for file in FILES for a in arguments(file)]
SAME_NETWORK = ("small_images.py:fashion_mnist", "small_images.py:svhn")
"""Their ResNet-20 takes its step in cifar.py; here its shapes are checked, and nothing compiled."""

SETS = {  # Image shape and number of classes.
    "digits": ((8, 8, 1), 10),
    "cifar10": ((32, 32, 3), 10),
    "cifar100": ((32, 32, 3), 100),
    "fashion_mnist": ((28, 28, 1), 10),
    "svhn_cropped": ((32, 32, 3), 10),
    "imagenet2012": ((40, 48, 3), 1000),
}
EXAMPLES = 8


@pytest.fixture(scope="session")
def random_sets(tmp_path_factory):
    """A TFDS folder with random images in the shape of each set, called random_NAME."""
    import tensorflow_datasets as tfds
    from PIL import Image

    folder = str(tmp_path_factory.mktemp("random_sets"))
    tfds.disable_progress_bar()
    for name, (shape, num_classes) in SETS.items():
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (EXAMPLES, *shape), np.uint8)
        labels = rng.integers(0, num_classes, EXAMPLES)

        def info(self, shape=shape, num_classes=num_classes):
            features = {
                "image": tfds.features.Image(shape=shape),
                "label": tfds.features.ClassLabel(num_classes=num_classes),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
            )

        def examples(self, images=images, labels=labels):
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                # As PIL images, because TFDS encodes arrays through TensorFlow.
                yield i, {"image": Image.fromarray(image.squeeze()), "label": int(label)}

        members = {
            "VERSION": tfds.core.Version("1.0.0"),
            "_info": info,
            "_split_generators": lambda self, _: {
                split: self._generate_examples() for split in ("train", "test", "validation")
            },
            "_generate_examples": examples,
        }
        title = "".join(part.capitalize() for part in ("random", *name.split("_")))
        builder = type(title, (tfds.core.GeneratorBasedBuilder,), members)
        builder(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def on_random_images(name, folder):
    """The config with its data set replaced, and smaller in what only costs time."""
    config = parse_config(str(ROOT / "configs" / name))
    config.dataset.name = f"random_{config.dataset.name}"
    config.dataset.data_dir = folder
    config.dataset.train_split, config.dataset.test_split = "train", "test"
    config.dataset.image_size = min(config.dataset.image_size, 32)
    config.dataset.num_workers = 0
    config.batch_size = config.eval_batch_size = 4
    config.log_every_steps = 1
    config.eval_every_steps = config.checkpoint_every_steps = 1_000_000
    return config


class StepTakenError(Exception):
    """Ends a run after its first record."""


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in SAME_NETWORK])
@pytest.mark.slow
def test_every_config_trains_a_step(name, random_sets, tmp_path):
    losses = []

    def on_record(step, values):
        losses.append((step, values["train_loss"]))
        raise StepTakenError

    config, programs = on_random_images(name, random_sets), Programs(jax.devices()[:1])
    with pytest.raises(StepTakenError):
        train(config, tmp_path, programs=programs, on_record=on_record)
    [(step, loss)] = losses
    assert step == 1
    assert math.isfinite(loss)
    assert 0 < loss < 20


@pytest.mark.parametrize("name", SAME_NETWORK)
def test_every_other_config_fits_its_network(name, random_sets):
    config = on_random_images(name, random_sets)
    same = parse_config(str(ROOT / "configs" / "cifar.py:resnet20,cifar10"))
    assert config.model == same.model
    assert config.norm == same.norm
    assert config.double_forward == same.double_forward
    Programs(jax.devices()[:1]).get(config)  # Raises UserError where shapes do not fit.


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_valid_and_changes_known_fields_only(name):
    config = parse_config(str(ROOT / "configs" / name))
    validate(config)
    assert set(fields(config)) == set(fields(default_config()))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_config_file_names_its_commands_and_its_paper(file):
    opening = file.read_text().split('"""')[1]
    assert f"mbn-train --config=configs/{file.name}" in opening
    assert "arXiv" in opening
    assert all(f"`{argument}`" in opening for argument in arguments(file) if argument)


@pytest.mark.parametrize("file", [f for f in FILES if arguments(f) != [""]], ids=lambda f: f.name)
def test_an_unknown_argument_is_answered_with_those_that_exist(file):
    get_config = runpy.run_path(str(file))["get_config"]
    with pytest.raises(ValueError, match="expected one of ") as raised:
        get_config("no_such_recipe")
    assert all(argument in str(raised.value) for argument in arguments(file))
    assert get_config(arguments(file)[0]).to_json() == get_config().to_json()


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.name)
@pytest.mark.slow
def test_every_sweep_declares_members_that_are_valid(file):
    sweep, config = load_sweep(str(file), [], None)
    assert len({member.folder for member in sweep.members()}) == len(sweep.members())
    assert config.dataset.name == next(iter(sweep.configs))
    first_seed = dataclasses.replace(sweep, seeds=1)
    for member in first_seed.members():
        validate(member.config(config))
    _, config = load_sweep(str(file), ["--config.dataset.name=cifar10"], None)
    size = 0 if file.name == "real_size.py" else 16  # 0: as the images are.
    assert (config.dataset.name, config.dataset.image_size) == ("cifar10", size)
    assert f"mbn-sweep experiments/{file.name} --workdir=" in file.read_text()
