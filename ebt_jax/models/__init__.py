"""Models: Flax at the edge, pure functions of plain parameter dicts beyond it."""

from __future__ import annotations

from ebt_jax.interfaces import EnergyModel, FeedForward
from ebt_jax.models import text
from ebt_jax.models.config import SIZES, ModelConfig

__all__ = ["SIZES", "ModelConfig", "build"]


def build(config: ModelConfig) -> EnergyModel | FeedForward:
    """The model of a resolved config.

    Raises:
      ValueError: if the config leaves the vocabulary or the landscapes at 0.
    """
    if not config.vocab_size:
        raise ValueError("model.vocab_size is 0; set it to the tokenizer's vocab_size")
    if config.kind == "transformer_pp":
        return text.transformer_pp(config)
    if not config.num_landscapes:
        raise ValueError("model.num_landscapes is 0; set it to refine.num_landscapes")
    return text.energy_model(config)
