"""Crops of images of any size, resized to the size that the network takes."""

from collections.abc import Sequence

import numpy as np

Box = tuple[float, float, float, float]


def random_box(size: tuple[int, int], key: Sequence[int]) -> Box:
    """Draws a part of an image: 8 to 100 % of its area, its sides in a ratio of 3/4 to 4/3.

    Args:
      size: (height, width) of the image.
      key: numbers that the draw is a function of.

    Returns:
      (left, upper, right, lower), in pixels.

    References:
      Szegedy et al., "Going deeper with convolutions", CVPR 2015, section 6.

    >>> random_box((100, 80), (0, 1)) == random_box((100, 80), (0, 1))
    True
    """
    height, width = size
    rng = np.random.default_rng((*key, 1))  # Not the stream of an epoch's order.
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1.0)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return float(left), float(upper), float(left + w), float(upper + h)
    return center_box(size)


def center_box(size: tuple[int, int]) -> Box:
    """Returns the central square of an image, 7/8 of its shorter side: 224 of 256 pixels.

    >>> center_box((256, 320))
    (48.0, 16.0, 272.0, 240.0)
    """
    height, width = size
    side = min(size) * 7 / 8
    left, upper = (width - side) / 2, (height - side) / 2
    return left, upper, left + side, upper + side


def resize(image: np.ndarray, shape: tuple[int, int, int], box: Box | None) -> np.ndarray:
    """Resizes a part of an image.

    Args:
      image: `[height, width, channels]`, uint8 unless it has the shape already.
      shape: (height, width, channels) of the result.
      box: the part, as `random_box` returns it; None: the whole image.

    Returns:
      An image of `shape`, by bilinear interpolation.
    """
    if image.shape == shape and box is None:
        return image
    from PIL import Image

    height, width, channels = shape
    resized = Image.fromarray(image.squeeze(-1) if channels == 1 else image)
    resized = resized.resize((width, height), Image.Resampling.BILINEAR, box=box)
    return np.asarray(resized).reshape(shape)
