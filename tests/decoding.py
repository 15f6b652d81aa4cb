"""A decoder to compare cached ones with."""

import jax.numpy as jnp

from ebt_jax.interfaces import Decoder
from ebt_jax.thinking import Effort, Thought


def recomputing(predict):
    """A decoder without a cache: every token's prediction starts from the beginning."""

    def predict_next(params, cache, index, key, thinking):
        tokens, lengths = cache
        batch = {
            "tokens": tokens,
            "targets": jnp.zeros_like(tokens),
            "weights": jnp.ones(tokens.shape),
            "index": index,
        }
        logits = predict(params, batch, key, thinking)
        steps = jnp.full(lengths.shape, thinking.num_steps)
        effort = Effort(steps, steps, 0 * steps)
        spread = jnp.zeros(lengths.shape)
        return Thought(logits[jnp.arange(len(lengths)), lengths - 1], effort, spread)

    def append(params, cache, new):
        tokens, lengths = cache
        return tokens.at[jnp.arange(len(lengths)), lengths].set(new), lengths + 1

    prepare = lambda params: params
    return Decoder(prepare, lambda params, *cache: cache, predict_next, append)
