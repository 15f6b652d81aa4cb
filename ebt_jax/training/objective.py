"""From a config to its objective."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ebt_jax import models
from ebt_jax.interfaces import FeedForward, Objective
from ebt_jax.objectives import feed_forward, refined
from ebt_jax.training.config import Config


def build_objective(config: Config) -> Objective:
    """The objective of a resolved config: refined candidates, or one forward pass."""
    model_config = config.model
    if config.mesh.model != 1:
        # The compiler could not split a product that holds several maps' features.
        model_config = dataclasses.replace(model_config, fused=False)
    model = models.build(model_config)
    if isinstance(model, FeedForward):
        return feed_forward(model, config.objective)
    kept = {n: s for n, s in batch_shapes(config).items() if n != "index"}
    return refined(model, config.refine, config.objective, config.replay, kept)


def batch_shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a training batch: arrays `[batch, seq, ...]`, and `index` `[batch]`."""
    rows, length = config.train.batch_size, config.data.context
    index = jax.ShapeDtypeStruct((rows,), jnp.int32)
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
