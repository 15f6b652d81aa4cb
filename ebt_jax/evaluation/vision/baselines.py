"""What a model has to beat: a Gaussian filter, and the frame before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.typing import ArrayLike
from scipy import ndimage

from ebt_jax.errors import UserError

# Pixels. Small ones leave the picture all but alone, large ones leave little of it.
WIDTHS = (0.0, *(0.3 * 1.15**i for i in range(18)))


def gaussian_filter(pictures: ArrayLike, width: float) -> np.ndarray:
    """Pictures blurred in height and width, mirrored at the border.

    Args:
      pictures: `[batch, height, width, channels]`.
      width: standard deviation of the Gaussian in pixels; 0 leaves them as they are.
    """
    pictures = np.asarray(pictures, np.float32)
    if not width:
        return pictures
    return ndimage.gaussian_filter(pictures, (0, width, width, 0), mode="reflect")


def choose_width(
    noised: ArrayLike, clean: ArrayLike, widths: Sequence[float] = WIDTHS
) -> float:
    """The width whose filter has the least squared error from the clean pictures.

    For a fair baseline choose it on training pictures, noised as those it is used on.
    Errors fall with the width up to the best one and rise from there on.

    Args:
      noised: `[batch, height, width, channels]`.
      clean: of the same shape.
      widths: to choose from, in pixels, rising.

    Raises:
      UserError: if there is no picture.
    """
    clean = np.asarray(clean, np.float32)
    if not len(clean):
        raise UserError("a filter's width has to be chosen on at least one picture")
    best, least = widths[0], np.inf
    for width in widths:
        error = np.square(gaussian_filter(noised, width) - clean).mean(dtype=np.float64)
        if error > least:
            break
        best, least = width, error
    return best


def copy_last(batch: Mapping[str, jax.Array]) -> jax.Array:
    """Each frame `[batch, seq, frame_size]` as the prediction of the one after it."""
    return batch["frames"]
