"""From a config to its objective."""

from __future__ import annotations

import dataclasses

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
    return refined(model, config.refine, config.objective)
