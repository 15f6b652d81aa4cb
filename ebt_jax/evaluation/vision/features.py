"""Features of pictures: those of a model's own patches, and those of an extractor."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ebt_jax.errors import UserError
from ebt_jax.interfaces import Batch
from ebt_jax.models import image
from ebt_jax.models.config import ModelConfig
from ebt_jax.models.encoders import dinov2, weights
from ebt_jax.refine import PyTree

MOST_PATCHES = 16  # of a picture's side for the extractor: 224 pixels in patches of 14


def labelled_features(
    model: ModelConfig, params: PyTree, batches: Iterable[Mapping[str, ArrayLike]]
) -> tuple[np.ndarray, np.ndarray]:
    """Patch tokens after the last block, averaged, of clean images.

    Args:
      model: of images, resolved.
      params: its parameters.
      batches: `image`, `label`, `weights`, and `caption` where that is the condition.

    Returns:
      Features `[images, dim]` and labels `[images]`, of those that count.

    Raises:
      UserError: if the data has no labels.
    """
    features, labels = [], []
    for batch in batches:
        if "label" not in batch:
            raise UserError(
                "a probe tells labels, but the data has none; give pictures in a "
                "folder for each class, or 'digits'"
            )
        counts = np.asarray(batch["weights"]) > 0
        inputs = {name: jnp.asarray(values) for name, values in batch.items()}
        features.append(np.asarray(_pooled(model, params, inputs))[counts])
        labels.append(np.asarray(batch["label"])[counts])
    return np.concatenate(features), np.concatenate(labels)


def extractor(path: str) -> Callable[[np.ndarray], np.ndarray]:
    """What DINOv2 says of pictures: uint8 `[batch, h, w, 3] -> [batch, width]`.

    Pictures are resized to 224 x 224 pixels (16 patches; fewer where the weights were
    trained on fewer). Features are those of the class token.

    Args:
      path: of its weights, of any size; see `dinov2.load_dinov2`.

    Raises:
      UserError: if they cannot be read, or are not DINOv2's.
    """
    encoder = dinov2.from_weights(weights.read(path, "DINOv2"))
    side = encoder.config.patch * min(encoder.config.grid, MOST_PATCHES)

    @jax.jit
    def of(params: PyTree, pictures: jax.Array) -> jax.Array:
        values = pictures.astype(jnp.float32) / 127.5 - 1
        shape = (len(values), side, side, values.shape[-1])
        resized = jax.image.resize(values, shape, "cubic")
        normal = dinov2.imagenet_normalised(jnp.clip(resized, -1, 1))
        return encoder.encode(params, normal).image

    return lambda pictures: np.asarray(of(encoder.params, jnp.asarray(pictures)))


@functools.partial(jax.jit, static_argnums=0)
def _pooled(model: ModelConfig, params: PyTree, batch: Batch) -> jax.Array:
    """Means over patches, `[images, dim]`."""
    patches = image.features(model, params, batch, batch["image"])
    return patches.astype(jnp.float32).mean(axis=1)
