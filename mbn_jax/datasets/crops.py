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


def resize_random_part(image: np.ndarray, shape: tuple[int, int, int], box: Box) -> np.ndarray:
    """Resizes a part of an image in a fifth of the time that `resize` takes.

    It interpolates between the four nearest pixels, however much the part shrinks: by about two at
    most if the image was decoded with a `reduction`. The box is rounded to whole pixels.
    """
    import cv2

    height, width, _ = shape
    left, upper, right, lower = map(round, box)
    part = image[upper:lower, left:right]
    return cv2.resize(part, (width, height), interpolation=cv2.INTER_LINEAR).reshape(shape)


def reduction(box: Box, shape: tuple[int, int, int]) -> int:
    """Returns by how much an image may be reduced, so that a part still has all pixels of a shape.

    Returns:
      1, 2, 4 or 8: libjpeg-turbo decodes fewer pixels in less time by these factors alone.

    >>> reduction((0.0, 0.0, 500.0, 448.0), (224, 224, 3))
    2
    """
    height, width, _ = shape
    left, upper, right, lower = box
    possible = min((right - left) / width, (lower - upper) / height)
    return max(factor for factor in (1, 2, 4, 8) if factor <= max(possible, 1))
