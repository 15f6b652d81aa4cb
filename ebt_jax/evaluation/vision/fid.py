"""Frechet distance of two sets of features: FID, with whatever extractor is given.

Two sets of features with means m, n and covariances A, B are as far apart as Gaussians
with these are (Heusel et al. 2017):

    |m - n|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2))

The last trace is that of (A^(1/2) B A^(1/2))^(1/2), which is symmetric, so eigenvalues
are all that is needed. Numbers of different extractors, or of sets of other sizes, are
not comparable: the distance of finite samples of one distribution is above 0.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ebt_jax.errors import UserError


class Moments(NamedTuple):
    """Mean and covariance of features.

    Attributes:
      mean: `[size]`, float64.
      covariance: `[size, size]`, float64, of a sample.
    """

    mean: np.ndarray
    covariance: np.ndarray


def moments(features: ArrayLike) -> Moments:
    """Mean and covariance of features `[examples, size]`.

    Raises:
      UserError: for fewer than two examples.
    """
    features = np.asarray(features, np.float64)
    if len(features) < 2:
        raise UserError(
            f"a covariance needs at least two pictures, but there are {len(features)}; "
            "give more"
        )
    covariance = np.cov(features, rowvar=False)
    return Moments(features.mean(axis=0), np.atleast_2d(covariance))


def frechet_distance(a: Moments, b: Moments) -> float:
    """The distance above, 0 where both are the same."""
    offset = a.mean - b.mean
    values, vectors = np.linalg.eigh(a.covariance)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    # Rounding leaves eigenvalues of singular covariances a little below 0.
    shared = np.linalg.eigvalsh(root @ b.covariance @ root)
    overlap = np.sqrt(np.maximum(shared, 0)).sum()
    spread = np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap
    return float(offset @ offset + max(spread, 0.0))
