"""One picture: from the bytes of a file to a square of pixels.

    image = opened(content)                 # Pillow's, its first frame
    image, notes = flattened(image, 3)      # colour, no alpha
    pixels = squared(image, 64, "center")   # uint8 [64, 64, 3]

Models see floats in [-1, 1]: `to_floats`; people see pixels: `to_pixels`.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from ebt_jax.data.sources import optional_package

SUFFIXES = (
    ".bmp",
    ".gif",
    ".jpeg",
    ".jpg",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)
# What is done to pictures that are not as a model wants them, and said.
NOTES = {
    "grey": "grey, so all their channels are the same",
    "alpha": "partly transparent, so they are laid on white",
    "frames": "animated, or hold several pictures: the first is taken",
}
_DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N")  # 16 bits


class Corrupt(ValueError):
    """A picture or a clip that cannot be used; the message says why."""


def pillow(module: str) -> Any:
    """A module of Pillow, such as "Image".

    Raises:
      UserError: if it is not installed.
    """
    return optional_package(f"PIL.{module}", "reading pictures", "vision")


def opened(content: bytes) -> Any:
    """The picture of a file, decoded whole; of an animated one the first frame.

    Args:
      content: of the file.

    Returns:
      Pillow's image; its `n_frames` tells how many the file holds, where it has that.

    Raises:
      Corrupt: if it cannot be decoded.
    """
    images = pillow("Image")
    try:
        image = images.open(io.BytesIO(content))
        image.load()
    except Exception as error:  # Pillow has no common base for what it raises
        reason = (
            "no picture" if type(error).__name__ == "UnidentifiedImageError" else ""
        )
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Corrupt(f"is corrupt ({reason or text})") from error
    return image


def of_array(pixels: np.ndarray) -> Any:
    """Pillow's image of uint8 `[height, width]`, or `[height, width, 1, 3 or 4]`."""
    grey = pixels.ndim == 3 and pixels.shape[-1] == 1
    return pillow("Image").fromarray(pixels[..., 0] if grey else pixels)


def flattened(image: Any, channels: int) -> tuple[Any, set[str]]:
    """A picture in colour or grey, upright, without alpha.

    Args:
      image: Pillow's.
      channels: 3: colour; 1: grey.

    Returns:
      The picture, and keys of `NOTES`: what had to be done.
    """
    notes = {"frames"} if getattr(image, "n_frames", 1) > 1 else set()
    image = pillow("ImageOps").exif_transpose(image)
    if image.mode in _DEEP:
        image = pillow("Image").fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("1", "L", "LA") and channels > 1:
        notes.add("grey")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        notes.add("alpha")
        image = image.convert("RGBA")
        white = pillow("Image").new("RGBA", image.size, "white")
        image = pillow("Image").alpha_composite(white, image)
    return image.convert("L" if channels == 1 else "RGB"), notes


def squared(image: Any, side: int, crop: str) -> np.ndarray:
    """A picture's pixels, made square.

    Args:
      image: Pillow's, in colour or grey.
      side: of the square, pixels.
      crop: "center": the middle, after halving it while it is twice too large and a
        bicubic resize, as in Dhariwal and Nichol 2021 (ADM); "squash": the whole,
        resized bilinearly, its proportions lost.

    Returns:
      uint8 `[side, side, channels]`.
    """
    if image.size == (side, side):
        return _pixels(image)
    images = pillow("Image")
    if crop == "squash":
        return _pixels(image.resize((side, side), images.Resampling.BILINEAR))
    while min(image.size) >= 2 * side:
        halves = tuple(length // 2 for length in image.size)
        image = image.resize(halves, images.Resampling.BOX)
    scale = side / min(image.size)
    lengths = tuple(round(length * scale) for length in image.size)
    pixels = _pixels(image.resize(lengths, images.Resampling.BICUBIC))
    top, left = ((length - side) // 2 for length in pixels.shape[:2])
    return pixels[top : top + side, left : left + side]


def to_floats(pixels: np.ndarray) -> np.ndarray:
    """Pixels 0 to 255 as float32 in [-1, 1]."""
    return np.float32(1 / 127.5) * pixels.astype(np.float32) - np.float32(1)


def to_pixels(floats: np.ndarray) -> np.ndarray:
    """The inverse of `to_floats`, in colour: uint8 `[..., height, width, 3]`.

    Args:
      floats: `[..., height, width, 1 or 3]`; what is out of [-1, 1] is clipped.
    """
    clipped = np.clip(np.asarray(floats, np.float32), -1, 1)
    pixels = np.round(127.5 * (clipped + 1)).astype(np.uint8)
    return np.broadcast_to(pixels, (*pixels.shape[:-1], 3))


def _pixels(image: Any) -> np.ndarray:
    """uint8 `[height, width, channels]`."""
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]
