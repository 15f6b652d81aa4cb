"""A model that takes a moment."""

from ebt_jax.models.config import ModelConfig

VOCAB = 11
QUICK = {"xla_backend_optimization_level": 0}  # compiler option; halves that time


def tiny(**fields):
    """Its config, with `fields` changed."""
    return ModelConfig(
        **{
            "num_layers": 2,
            "num_heads": 2,
            "dim": 8,
            "vocab_size": VOCAB,
            "num_landscapes": 2,
            **fields,
        }
    )
