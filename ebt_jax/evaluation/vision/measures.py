"""How close predicted pictures are to the right ones, in numbers.

Pictures are `[..., height, width, channels]` with values in [-1, 1]: their peak is 2.
Over a set, PSNR is that of the mean squared error of the whole set, never a mean of the
PSNRs of pictures: it does not depend on how pictures are batched, and one picture that
is all but exact cannot hide what the others are like.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ebt_jax.errors import UserError

PEAK = 2.0  # of values in [-1, 1]
WINDOW, WIDTH = 11, 1.5  # SSIM: pixels of the window's side, and its Gaussian's sigma


def quality(predicted: jax.Array, target: jax.Array) -> dict[str, jax.Array]:
    """How close each picture is.

    Args:
      predicted: `[batch, height, width, channels]`.
      target: of the same shape.

    Returns:
      `mse`, `l1` (means over a picture) and `ssim`, `[batch]` each.
    """
    error = predicted - target
    return {
        "mse": jnp.mean(jnp.square(error), axis=(1, 2, 3)),
        "l1": jnp.mean(jnp.abs(error), axis=(1, 2, 3)),
        "ssim": ssim(predicted, target),
    }


def set_quality(means: Mapping[str, float]) -> dict[str, float]:
    """What is reported of a set of pictures.

    Args:
      means: over the set, of what `quality` gives.

    Returns:
      `psnr` (dB), `mse` (of values in [0, 255], as the paper gives it), `ssim`, and
      `l1` (of values in [-1, 1]).
    """
    return {
        "psnr": psnr(means["mse"]),
        "mse": in_255(means["mse"]),
        "ssim": float(means["ssim"]),
        "l1": float(means["l1"]),
    }


def add_quality(
    sums: Mapping[str, float],
    predicted: ArrayLike,
    target: ArrayLike,
    weights: ArrayLike,
) -> dict[str, float]:
    """Adds a batch to the sums that `mean_quality` divides; {} to begin with.

    Args:
      sums: so far.
      predicted: `[batch, height, width, channels]`.
      target: of the same shape.
      weights: `[batch]`, 0 for a picture that does not count, whatever it holds.
    """
    found = _sums(*map(jnp.asarray, (predicted, target, weights)))
    # float64 on the host, so that nothing is lost over many batches.
    added = {name: float(value) for name, value in found.items()}
    return {name: sums[name] + x if sums else x for name, x in added.items()}


def mean_quality(sums: Mapping[str, float]) -> dict[str, float]:
    """`set_quality` of all pictures that were added.

    Raises:
      UserError: if there is none.
    """
    if not sums or not sums["weights"]:
        raise UserError("there is no picture to score; give the data more of them")
    return set_quality({name: sums[name] / sums["weights"] for name in sums})


def psnr(mse: float, peak: float = PEAK) -> float:
    """Peak signal-to-noise ratio, `10 log10(peak^2 / mse)` dB; inf without an error.

    Args:
      mse: mean squared error.
      peak: difference of the largest and the smallest value that there can be.
    """
    if mse == 0:
        return math.inf
    return 20 * math.log10(peak) - 10 * math.log10(mse)


def in_255(mse: float) -> float:
    """A mean squared error of values in [-1, 1] as that of values in [0, 255]."""
    return float(mse) * (255 / PEAK) ** 2


def ssim(a: jax.Array, b: jax.Array, peak: float = PEAK) -> jax.Array:
    """Structural similarity (Wang et al. 2004, equation 13), 1 where pictures agree.

    Means, variances and the covariance are those in a Gaussian window (11 x 11, sigma
    1.5) that lies wholly in the picture; similarities of all places and channels are
    averaged. Where a side is below 11, the window's is the largest odd one that fits.

    Args:
      a: `[..., height, width, channels]`.
      b: of the same shape.
      peak: as in `psnr`.

    Returns:
      `[...]`, at most 1.
    """
    down, across = (_windows(side) for side in a.shape[-3:-1])

    def mean(x: jax.Array) -> jax.Array:
        return jnp.einsum("ph,qw,...hwc->...pqc", down, across, x, precision="highest")

    mean_a, mean_b = mean(a), mean(b)
    variances = mean(a * a) - mean_a**2 + mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    light, contrast = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    similarity = (2 * mean_a * mean_b + light) * (2 * covariance + contrast)
    similarity /= (mean_a**2 + mean_b**2 + light) * (variances + contrast)
    return similarity.mean(axis=(-3, -2, -1))


def _windows(side: int) -> np.ndarray:
    """`[places, side]` weights of a Gaussian window at each place where it fits."""
    size = min(WINDOW, side - 1 + side % 2)
    offset = np.arange(size) - (size - 1) / 2
    weights = np.exp(-0.5 * (offset / WIDTH) ** 2)
    weights /= weights.sum()
    places = side - size + 1
    rows = np.zeros((places, side), np.float32)
    for place in range(places):
        rows[place, place : place + size] = weights
    return rows


@jax.jit
def _sums(
    predicted: jax.Array, target: jax.Array, weights: jax.Array
) -> dict[str, jax.Array]:
    each = quality(predicted, target)
    total = lambda values: jnp.where(weights > 0, values * weights, 0.0).sum()
    return {name: total(values) for name, values in each.items()} | {
        "weights": weights.sum()
    }
