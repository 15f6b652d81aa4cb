"""From a config to its objective."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ebt_jax import models
from ebt_jax.diffusion_objective import denoising
from ebt_jax.errors import UserError
from ebt_jax.interfaces import Batch, Denoiser, FeedForward, Objective, Recurrent
from ebt_jax.iterated_objective import iterated
from ebt_jax.objectives import feed_forward, refined
from ebt_jax.refine import PyTree
from ebt_jax.training.config import Config


def build_objective(
    config: Config,
    measures: Callable[[PyTree, Batch], dict[str, jax.Array]] | None = None,
) -> Objective:
    """The objective of a resolved config.

    Refined candidates, one forward pass, or the passes of a diffusion model.

    Args:
      config: what to build.
      measures: what is measured of predictions in place of the model's own measures,
        as in `EnergyModel`.

    Raises:
      UserError: for options that what is predicted does not have.
    """
    if config.model.space in ("image", "video") and config.objective.label_smoothing:
        raise UserError(
            f"objective.label_smoothing is {config.objective.label_smoothing}, but "
            f"model.space is {config.model.space!r}, which has no labels; set it to 0"
        )
    if config.model.space != "text" and config.replay.top_k:
        raise UserError(
            f"replay.top_k is {config.replay.top_k}, which keeps the largest entries "
            f"of a distribution, but model.space is {config.model.space!r}; set it to 0"
        )
    if config.model.space in ("image", "board") and config.mesh.seq != 1:
        raise UserError(
            f"mesh.seq is {config.mesh.seq}, but {config.model.unit} are no sequences "
            "that could be split; set it to 1"
        )
    model_config = config.model
    if config.mesh.model != 1:
        # The compiler could not split a product that holds several maps' features.
        model_config = dataclasses.replace(model_config, fused=False)
    model = models.build(model_config, config.diffusion)
    if measures is not None:
        model = model._replace(measures=measures)
    if isinstance(model, Denoiser):
        return denoising(model, config.diffusion)
    if isinstance(model, FeedForward):
        return feed_forward(model, config.objective)
    if isinstance(model, Recurrent):
        return iterated(model, config.objective)
    kept = {n: s for n, s in batch_shapes(config).items() if n != "index"}
    return refined(model, config.refine, config.objective, config.replay, kept)


def batch_shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a training batch.

    Arrays `[batch, seq, ...]`, of images and boards `[batch, ...]`, and `index`
    `[batch]`.
    """
    rows, length = config.train.batch_size, config.data.context
    index = jax.ShapeDtypeStruct((rows,), jnp.int32)
    if config.model.space == "image":
        side, model = config.model.image_size, config.model
        size = (rows, side, side, model.channels)
        shapes = {
            "image": jax.ShapeDtypeStruct(size, jnp.float32),
            "weights": jax.ShapeDtypeStruct((rows,), jnp.float32),
        }
        if model.condition == "caption":
            size = (rows, model.condition_size)
            shapes["caption"] = jax.ShapeDtypeStruct(size, jnp.float32)
        return {**shapes, "index": index}
    if config.model.space == "board":
        cells = jax.ShapeDtypeStruct((rows, config.model.vocab_size**2), jnp.int32)
        weights = jax.ShapeDtypeStruct((rows,), jnp.float32)
        return {"puzzle": cells, "solution": cells, "weights": weights, "index": index}
    if config.model.space == "video":
        size = (rows, length, config.model.frame_size)
        frames = jax.ShapeDtypeStruct(size, jnp.float32)
        weights = jax.ShapeDtypeStruct((rows, length), jnp.float32)
        return {"frames": frames, "targets": frames, "weights": weights, "index": index}
    dtypes: dict[str, Any] = {"tokens": jnp.int32, "targets": jnp.int32}
    if config.data.packing == "first_fit":
        dtypes |= {"segments": jnp.int32, "positions": jnp.int32}
    dtypes |= {"weights": jnp.float32}
    shapes = {n: jax.ShapeDtypeStruct((rows, length), d) for n, d in dtypes.items()}
    return {**shapes, "index": index}
