"""Principal components of image patches: an encoder that needs no trained weights.

    params = fit_pca(images, patch=8, features=64)
    latents = encode(params, images)    # [batch, side/8, side/8, 64]
    images = decode(params, latents)    # the nearest images that 64 numbers can say

The components are orthonormal: distances between latents are distances between the
images they decode to. A patch as large as the image makes one vector of each image.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ebt_jax.errors import UserError

_MAX_SIDE = 2048  # a matrix of this side has its eigenvectors in seconds
_CHUNK = 4096  # patches held in float64 at a time


def fit_pca(images: np.ndarray, patch: int, features: int) -> dict[str, np.ndarray]:
    """The leading principal components of the images' patches.

    Patches of up to 2,048 numbers count all; of larger ones, such as whole frames,
    2,048 spaced evenly over the images do.

    Args:
      images: `[..., height, width, channels]`, any range and number type.
      patch: side of a patch in pixels; divides height and width.
      features: components to keep, numbers in an encoded patch.

    Returns:
      `mean` `[patch, patch, channels]` and `components` `[features, patch, patch,
      channels]`, of falling variance, float32.

    Raises:
      UserError: if the images do not divide into patches, or there are fewer patches,
        or numbers in one, than features.
    """
    images = np.asarray(images)
    shape = patch, patch, images.shape[-1]
    patches = np.asarray(_patches(images, patch)).reshape(-1, np.prod(shape))
    count, numbers = patches.shape
    if not 1 <= features <= numbers:
        raise UserError(
            f"{features} features of a patch of {patch} x {patch} x {shape[-1]} = "
            f"{numbers} numbers; take between 1 and {numbers}"
        )
    if count < features:
        raise UserError(
            f"{features} components cannot be fitted to {count} patches; give more "
            "images or take fewer features"
        )
    if numbers > _MAX_SIDE and count > _MAX_SIDE:
        chosen = np.linspace(0, count - 1, max(_MAX_SIDE, features)).round().astype(int)
        patches = patches[np.unique(chosen)]
    mean = patches.mean(axis=0, dtype=np.float64)
    components = _leading(patches, mean, features)
    # Eigenvectors have no sign: the largest number of each is made positive.
    largest = np.abs(components).argmax(axis=1)
    components *= np.sign(components[np.arange(features), largest])[:, None]
    return {
        "mean": mean.astype(np.float32).reshape(shape),
        "components": components.astype(np.float32).reshape(features, *shape),
    }


def encode(params: dict[str, Any], images: jax.Array) -> jax.Array:
    """Latents of images.

    Args:
      params: see `fit_pca`.
      images: `[..., height, width, channels]`.

    Returns:
      `[..., height / patch, width / patch, features]`.

    Raises:
      UserError: if the images do not divide into patches, or have other channels.
    """
    components = jnp.asarray(params["components"])
    _, patch, _, channels = components.shape
    if images.shape[-1] != channels:
        raise UserError(
            f"images have {images.shape[-1]} channels, but the components were fitted "
            f"to {channels}; give images as those that were fitted"
        )
    patches = _patches(images, patch)
    centred = patches - _as_last(params["mean"], patches)
    return jnp.einsum("...hwc,fhwc->...f", centred, components)


def decode(params: dict[str, Any], latents: jax.Array) -> jax.Array:
    """Images of latents: the inverse of `encode` within the span of the components.

    Args:
      params: see `fit_pca`.
      latents: `[..., rows, columns, features]`.

    Returns:
      `[..., rows * patch, columns * patch, channels]`, not clipped.

    Raises:
      UserError: if the latents have another number of features.
    """
    components = jnp.asarray(params["components"])
    features, patch, _, channels = components.shape
    *leading, rows, columns, own = latents.shape
    if own != features:
        raise UserError(
            f"latents have {own} features, but there are {features} components; give "
            "latents that these components encoded"
        )
    patches = jnp.einsum("...f,fhwc->...hwc", latents, components)
    patches = patches + _as_last(params["mean"], patches)
    images = jnp.swapaxes(patches, -4, -3)  # rows, patch, columns, patch, channels
    return images.reshape(*leading, rows * patch, columns * patch, channels)


def _patches(images: Any, patch: int) -> Any:
    """`[..., height, width, channels]` as `[..., rows, columns, patch, patch, c]`."""
    *leading, height, width, channels = images.shape
    if patch < 1 or height % patch or width % patch:
        raise UserError(
            f"images of {height} x {width} pixels do not divide into patches of "
            f"{patch} x {patch}; resize them or take a patch that divides both sides"
        )
    rows, columns = height // patch, width // patch
    cut = images.reshape(*leading, rows, patch, columns, patch, channels)
    return cut.swapaxes(-4, -3)


def _as_last(array: Any, other: Any) -> Any:
    """An array with axes of length 1 in front, as many axes as the other has."""
    return jnp.reshape(array, (1,) * (other.ndim - np.ndim(array)) + np.shape(array))


def _leading(patches: np.ndarray, mean: np.ndarray, features: int) -> np.ndarray:
    """The leading principal directions of `[count, numbers]`, `[features, numbers]`."""
    count, numbers = patches.shape
    if numbers <= max(count, _MAX_SIDE):
        products = np.zeros((numbers, numbers))
        for start in range(0, count, _CHUNK):
            centred = patches[start : start + _CHUNK] - mean
            products += centred.T @ centred
        return np.linalg.eigh(products)[1].T[::-1][:features].copy()
    # Fewer patches than numbers: directions are combinations of the patches.
    centred = patches - mean
    weights = np.linalg.eigh(centred @ centred.T)[1][:, ::-1][:, :features]
    return np.linalg.qr(centred.T @ weights)[0].T.copy()
