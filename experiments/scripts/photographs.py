r"""A data set of ImageNet's shape without ImageNet: JPEGs of its sizes, in its TFDS layout.

    python experiments/scripts/photographs.py --data_dir=/tmp/photographs
    mbn-train --config=configs/imagenet.py --workdir=runs/photographs \
        --config.dataset.data_dir=/tmp/photographs

The pictures are parts of the two photographs that ship with scikit-learn, scaled to sizes that are
common in ImageNet; labels are drawn at random. Name, version, features and array_record files are
those of TFDS's `imagenet2012`, so that the same config reads it.
"""

import argparse
import functools
import io
import os
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_sample_images

SIZES = {
    (500, 375): 0.42,
    (375, 500): 0.15,
    (500, 333): 0.15,
    (333, 500): 0.06,
    (640, 480): 0.05,
    (400, 300): 0.05,
    (300, 225): 0.04,
    (250, 200): 0.03,
    (200, 150): 0.02,
    (1024, 768): 0.02,
    (1600, 1200): 0.01,
}
"""(width, height) and how often it is drawn. 500 by 375 is the most common size in ImageNet; the
shares are made up so that mean sizes and bytes are about ImageNet's."""


def photograph(index: int) -> bytes:
    """Returns a JPEG, a function of the index: a part of a picture, scaled."""
    rng = np.random.default_rng(index)
    width, height = list(SIZES)[rng.choice(len(SIZES), p=list(SIZES.values()))]
    picture = pictures()[rng.integers(2)]
    room_y, room_x = picture.shape[0] / height, picture.shape[1] / width
    scale = min(room_y, room_x) * rng.uniform(0.6, 1.0)
    w, h = scale * width, scale * height
    x, y = rng.uniform(0, picture.shape[1] - w), rng.uniform(0, picture.shape[0] - h)
    part = Image.fromarray(picture).resize(
        (width, height), Image.Resampling.LANCZOS, box=(x, y, x + w, y + h)
    )
    file = io.BytesIO()
    # Most cameras store colour at half the resolution.
    subsampling = "4:2:0" if rng.random() < 0.75 else "4:4:4"
    part.save(file, "jpeg", quality=int(rng.integers(95, 100)), subsampling=subsampling)
    return file.getvalue()


@functools.cache
def pictures() -> list[np.ndarray]:
    """Returns the two photographs."""
    return load_sample_images().images


class Imagenet2012(tfds.core.GeneratorBasedBuilder):
    """Parts of two photographs in the layout of ImageNet; see the module."""

    VERSION = tfds.core.Version("5.1.0")

    def __init__(self, *, num_train: int = 2000, num_validation: int = 500, **options):
        self._sizes = {"train": num_train, "validation": num_validation}
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=1000),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        train = self._sizes["train"]
        return {
            "train": self._generate_examples(0, train),
            "validation": self._generate_examples(train, train + self._sizes["validation"]),
        }

    def _generate_examples(self, start: int, stop: int) -> Iterator[tuple[int, dict]]:
        for index in range(start, stop):
            label = int(np.random.default_rng((index, 1)).integers(1000))
            name = f"{index:08}.JPEG"
            yield index, {"image": photograph(index), "label": label, "file_name": name}


def write(data_dir: str | os.PathLike, num_train: int, num_validation: int) -> None:
    """Writes the data set into a TFDS folder, unless it is there."""
    tfds.disable_progress_bar()
    builder = Imagenet2012(
        num_train=num_train,
        num_validation=num_validation,
        data_dir=data_dir,
        file_format="array_record",
    )
    builder.download_and_prepare()


def main() -> None:
    """Writes the data set."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--train", type=int, default=2000, help="training images")
    parser.add_argument("--validation", type=int, default=500, help="validation images")
    args = parser.parse_args()
    write(args.data_dir, args.train, args.validation)


if __name__ == "__main__":
    main()
