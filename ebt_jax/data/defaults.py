"""Pictures and clips without a download: those that scikit-learn ships.

Handwritten digits (Alpaydin and Kaynak 1998), two photographs, and clips of digits that
move about, made here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ebt_jax.data import pictures
from ebt_jax.data.corpus import held_out_documents
from ebt_jax.data.items import Frames, Items
from ebt_jax.data.sources import optional_package
from ebt_jax.errors import UserError

_NAMES = "zero one two three four five six seven eight nine".split()
_TILE = 32  # side of a photograph's squares, and of moving digits' frames, by default
_CLIPS = 2000  # of moving digits
_DIGITS = 2  # in each of them
_DIGIT_SHARE = 0.5  # side of a digit / side of a frame
_SPEEDS = 0.2, 0.6  # of a digit, in its range of motion per second


def digits() -> Items:
    """1,797 handwritten digits of 8 x 8 pixels, grey; captions name their classes.

    Raises:
      UserError: if scikit-learn is not installed.
    """
    images, labels = _load_digits()

    def read(index: int) -> Frames:
        return Frames(0.0, iter([pictures.of_array(images[index])]))

    names = [f"digit {number}" for number in range(len(images))]
    told = [(f"the digit {_NAMES[label]}",) for label in labels]
    return Items(names, read, [str(label) for label in labels], told)


def photographs(side: int) -> Items:
    """A temple and a flower, 640 x 427 pixels each, cut into squares side by side.

    Args:
      side: of a square, pixels; 0: 32.

    Raises:
      UserError: if scikit-learn is not installed, or they are smaller.
    """
    datasets = optional_package("sklearn.datasets", "data.path photographs", "vision")
    loaded = datasets.load_sample_images()
    side = side or _TILE
    tiles, names, classes = [], [], []
    for name, image in zip(("china", "flower"), loaded.images, strict=True):
        for top in range(0, image.shape[0] - side + 1, side):
            for left in range(0, image.shape[1] - side + 1, side):
                tiles.append(image[top : top + side, left : left + side])
                names.append(f"{name}, {left} right, {top} down")
                classes.append(name)
    if not tiles:
        raise UserError(
            f"vision.size is {side}, but the photographs are 427 pixels high; lower it"
        )

    def read(index: int) -> Frames:
        return Frames(0.0, iter([pictures.of_array(tiles[index])]))

    return Items(names, read, classes)


def moving_digits(side: int, seconds: float, frames: int, held_out: float) -> Items:
    """Clips of two digits that move straight on and bounce off the borders.

    Clip i is the same everywhere and always. The clips that `held_out` keeps for
    evaluation show digits that no other clip shows.

    Args:
      side: of a frame, pixels; 0: 32.
      seconds: from one frame to the next.
      frames: of each clip.
      held_out: share of the clips, and of the digits.

    Raises:
      UserError: if scikit-learn is not installed.
    """
    side = side or _TILE
    size = max(round(_DIGIT_SHARE * side), 1)
    images, _ = _load_digits()
    apart = held_out_documents(len(images), held_out) if held_out else None
    kept = held_out_documents(_CLIPS, held_out) if held_out else np.zeros(_CLIPS, bool)

    def read(index: int) -> Frames:
        rng = np.random.default_rng(index)
        known = np.arange(len(images))
        if apart is not None:
            known = np.flatnonzero(apart == kept[index])
        clip = np.zeros((frames, side, side), np.float32)
        for digit in rng.choice(known, _DIGITS, replace=False):
            image = pictures.of_array(images[digit]).resize((size, size))
            resized = np.asarray(image, np.float32)
            clip = np.maximum(clip, _moving(resized, side, seconds, frames, rng))
        rendered = clip.round().astype(np.uint8)
        return Frames(seconds, map(pictures.of_array, rendered))

    return Items([f"clip {number}" for number in range(_CLIPS)], read)


def _moving(
    image: np.ndarray, side: int, seconds: float, frames: int, rng: np.random.Generator
) -> np.ndarray:
    """A picture on its way through an empty square, float32 `[frames, side, side]`."""
    room = side - len(image)
    begin = rng.uniform(0, 2, 2)
    speed = rng.uniform(*_SPEEDS, 2) * rng.choice([-1, 1], 2)
    way = (begin + speed * seconds * np.arange(frames)[:, None]) % 2
    places = room * np.minimum(way, 2 - way)  # there and back again
    down, right = (_moved(len(image), axis, side) for axis in places.T)
    return down.swapaxes(1, 2) @ (image @ right)


def _moved(size: int, places: np.ndarray, side: int) -> np.ndarray:
    """What moves `size` pixels to places, also between pixels: `[places, size, side]`.

    Each pixel is shared by the two that it comes to lie on.
    """
    distance = np.arange(side) - np.arange(size)[:, None] - places[:, None, None]
    return np.maximum(1 - np.abs(distance), 0).astype(np.float32)


def _load_digits() -> tuple[np.ndarray, Any]:
    """uint8 `[1797, 8, 8]` and their labels."""
    datasets = optional_package("sklearn.datasets", "the handwritten digits", "vision")
    loaded = datasets.load_digits()
    return (loaded.images * (255 / 16)).round().astype(np.uint8), loaded.target
