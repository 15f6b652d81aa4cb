"""From a config to its objective."""

from __future__ import annotations

from ebt_jax import models
from ebt_jax.interfaces import FeedForward, Objective
from ebt_jax.objectives import feed_forward, refined
from ebt_jax.training.config import Config


def build_objective(config: Config) -> Objective:
    """The objective of a resolved config: refined candidates, or one forward pass."""
    model = models.build(config.model)
    if isinstance(model, FeedForward):
        return feed_forward(model, config.objective)
    return refined(model, config.refine, config.objective)
