"""The usual preprocessing and augmentation of well-known data sets."""

from typing import Any

CROP_AND_FLIP = {"crop_padding": 4, "flip": True}

STANDARD: dict[str, dict[str, Any]] = {
    "digits": {},
    "cifar10": CROP_AND_FLIP,
    "cifar100": CROP_AND_FLIP,
    "fashion_mnist": {"crop_padding": 2, "flip": True},
    "svhn_cropped": {},  # Digits do not look alike mirrored; the 'extra' split stays unused.
    "imagenet2012": {
        "test_split": "validation",
        "image_size": 224,
        "random_resized_crop": True,
        "flip": True,
        "num_workers": 8,
    },
}
"""The fields of `config.dataset` that differ from the default, by TFDS name.

Every data set is standardized by mean and deviation of each channel over its training split.
"""


def standard_dataset(name: str) -> dict[str, Any]:
    """Returns the fields of `config.dataset` for a data set in `STANDARD`.

    >>> standard_dataset('cifar100')
    {'name': 'cifar100', 'crop_padding': 4, 'flip': True}
    """
    return {"name": name, **STANDARD[name]}
