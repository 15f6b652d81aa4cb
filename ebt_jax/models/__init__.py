"""Models: Flax at the edge, pure functions of plain parameter dicts beyond it."""

from __future__ import annotations

from ebt_jax.interfaces import EnergyModel, FeedForward
from ebt_jax.models import text, video
from ebt_jax.models.config import SIZES, ModelConfig

__all__ = ["SIZES", "ModelConfig", "build"]


def build(config: ModelConfig) -> EnergyModel | FeedForward:
    """The model of a resolved config.

    Raises:
      ValueError: if the config leaves the landscapes, or what the data decide, at 0.
    """
    space = {"text": text, "video": video}[config.space]
    if config.space == "text" and not config.vocab_size:
        raise ValueError("model.vocab_size is 0; set it to the tokenizer's vocab_size")
    if config.space == "video" and not config.frame_size:
        raise ValueError("model.frame_size is 0; set it to the numbers in a frame")
    if config.kind == "transformer_pp":
        return space.transformer_pp(config)
    if not config.num_landscapes:
        raise ValueError("model.num_landscapes is 0; set it to refine.num_landscapes")
    return space.energy_model(config)
