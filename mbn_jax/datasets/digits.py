"""The handwritten digits of scikit-learn as a TFDS data set, prepared without a network."""

import importlib.metadata

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

TEST_EXAMPLES = 360
FILE = "sklearn/datasets/data/digits.csv.gz"
"""Where scikit-learn keeps them: 64 pixels of 0 to 16, and the label."""


class Digits(tfds.core.GeneratorBasedBuilder):
    """1,797 real 8x8 grey images of handwritten digits, shipped inside scikit-learn.

    The order is drawn once at random; the last 360 examples are the test split.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager):
        # Read as a file: importing scikit-learn takes a hundred times as long.
        file = str(importlib.metadata.distribution("scikit-learn").locate_file(FILE))
        pixels, labels = np.split(np.loadtxt(file, delimiter=","), [64], axis=1)
        # As 8-bit grey values the usual preprocessing applies.
        images = np.round(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        labels = labels[:, 0].astype(int)
        order = np.random.default_rng(0).permutation(len(images))
        train, test = order[:-TEST_EXAMPLES], order[-TEST_EXAMPLES:]
        return {
            "train": self._generate_examples(images, labels, train),
            "test": self._generate_examples(images, labels, test),
        }

    def _generate_examples(self, images, labels, indices):
        for i in indices:
            # As PIL images, because TFDS encodes arrays through TensorFlow.
            yield int(i), {"image": Image.fromarray(images[i]), "label": int(labels[i])}
