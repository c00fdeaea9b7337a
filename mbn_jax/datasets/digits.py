"""The handwritten digits of scikit-learn as a TFDS data set, prepared without a network."""

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

TEST_EXAMPLES = 360


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
        from sklearn.datasets import load_digits

        digits = load_digits()
        # Stored as 0 to 16; as 8-bit grey values the usual preprocessing applies.
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)
        order = np.random.default_rng(0).permutation(len(images))
        train, test = order[:-TEST_EXAMPLES], order[-TEST_EXAMPLES:]
        return {
            "train": self._generate_examples(images, digits.target, train),
            "test": self._generate_examples(images, digits.target, test),
        }

    def _generate_examples(self, images, labels, indices):
        for i in indices:
            # As PIL images, because TFDS encodes arrays through TensorFlow.
            yield int(i), {"image": Image.fromarray(images[i]), "label": int(labels[i])}
