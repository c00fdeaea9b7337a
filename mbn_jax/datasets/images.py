"""Decodes the images of TFDS data sets, and crops and resizes them."""

import dataclasses
from typing import Any

import numpy as np
import simplejpeg

from mbn_jax.datasets.crops import (
    Box,
    center_box,
    random_box,
    reduction,
    resize,
    resize_random_part,
)
from mbn_jax.errors import UserError, one_line

JPEG = b"\xff\xd8\xff"
"""The first bytes of every JPEG."""


def unreadable(index: int, name: str, error: Exception) -> UserError:
    """Returns the error for an example whose record, or the image in it, is damaged."""
    return UserError(
        f"Example {index} of {name} cannot be read ({one_line(error)}); its record "
        "files are damaged or not all there: prepare the data set anew."
    )


@dataclasses.dataclass(frozen=True)
class ImageReader:
    """Turns image files into pixels of one shape, and checks them on the way.

    Attributes:
      feature: TFDS's image feature, which says what the data set declares.
      shape: (height, width, channels) of the result.
      random_resized_crop: resize a part of each image, a random one in training and else the
        centre; False: the whole image.
      name: the split and its data set, for messages.
    """

    feature: Any
    shape: tuple[int, int, int]
    random_resized_crop: bool
    name: str

    def read(self, file: bytes, index: int, key: tuple[int, ...] | None = None) -> np.ndarray:
        """Decodes, crops and resizes an image.

        Args:
          file: the encoded image.
          index: which example it is of, for messages.
          key: what a random crop is a function of; None: the centre.

        Returns:
          An image of `shape`.

        Raises:
          UserError: for an image that is damaged or not what its data set declares.
        """
        try:
            image, box = self._decode(file, key)
        except Exception as error:  # Decoders fail in many ways on damaged bytes.
            raise unreadable(index, self.name, error) from error
        self._check(image, index)
        if box is not None and key is not None:
            return resize_random_part(image, self.shape, box)
        return resize(image, self.shape, box)

    def _decode(self, file: bytes, key: tuple[int, ...] | None) -> tuple[np.ndarray, Box | None]:
        """Returns an image, perhaps reduced, and the part of it to resize; None: the whole."""
        declared = (self.feature.np_dtype, self.feature.shape)
        if declared == (np.uint8, (None, None, 3)) and file.startswith(JPEG):
            try:
                return self._decode_jpeg(file, key)
            except ValueError:
                pass  # Not quite sound: Pillow, which passes over more, decides.
        image = self.feature.decode_example_np_with_pil(file, self.shape[-1])
        return image, self._box(image.shape[:2], key)

    def _decode_jpeg(
        self, file: bytes, key: tuple[int, ...] | None
    ) -> tuple[np.ndarray, Box | None]:
        height, width = map(int, simplejpeg.decode_jpeg_header(file)[:2])
        box = self._box((height, width), key)
        if box is None or key is None:
            return simplejpeg.decode_jpeg(file), box
        factor = reduction(box, self.shape)
        image = simplejpeg.decode_jpeg(
            file,
            min_height=-(-height // factor),
            min_width=-(-width // factor),
            min_factor=factor,
        )
        left, upper, right, lower = box
        return image, (left / factor, upper / factor, right / factor, lower / factor)

    def _box(self, size: tuple[int, int], key: tuple[int, ...] | None) -> Box | None:
        if not self.random_resized_crop:
            return None
        return center_box(size) if key is None else random_box(size, key)

    def _check(self, image: np.ndarray, index: int) -> None:
        declared = self.feature.shape
        if len(image.shape) != len(declared) or any(
            expected not in (None, found)
            for expected, found in zip(declared, image.shape, strict=True)
        ):
            raise UserError(
                f"Example {index} of {self.name} has an image of shape {image.shape}, expected "
                f"{declared} as the data set declares; prepare it anew with images that are alike."
            )
        if image.dtype == np.float32 and not np.isfinite(image).all():
            raise UserError(
                f"Example {index} of {self.name} has pixels that are NaN or infinite, expected "
                "finite ones; prepare the data set anew without them."
            )
