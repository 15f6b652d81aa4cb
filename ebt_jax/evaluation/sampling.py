"""Choosing a token from its logits."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ebt_jax.errors import UserError


class Sampling(NamedTuple):
    """How a token is chosen from its logits. Static: part of the compiled program.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      top_k: only the k most likely tokens can be drawn; 0 for all.
      top_p: only the most likely tokens that together reach this probability can be
        drawn, at least one; 1 for all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


def choose(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """Chooses tokens.

    Args:
      logits: `[batch, vocab]`; filtered and drawn from in float32.
      keys: one PRNG key for each row, `[batch]`.
      sampling: how. Top-p counts what top-k leaves, at the given temperature.

    Returns:
      Tokens, int32 `[batch]`.
    """
    logits = logits.astype(jnp.float32)
    if sampling.temperature == 0:
        return _argmax(logits)
    vocab = logits.shape[-1]
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (vocab,)))(keys)
    scaled = logits / sampling.temperature
    if not sampling.top_k and sampling.top_p == 1:
        return _argmax(scaled + noise)  # spares a sort
    ranked, tokens = jax.lax.top_k(scaled, min(sampling.top_k or vocab, vocab))
    # Noise belongs to the token, not to its rank: a near tie cannot change the draw.
    noisy = ranked + jnp.take_along_axis(noise, tokens, axis=-1)
    if sampling.top_p < 1:
        # A token stays while those before it have not reached top_p; the first does.
        shares = jax.nn.softmax(ranked)
        kept = jnp.cumsum(shares, axis=-1) - shares < sampling.top_p
        noisy = jnp.where(kept, noisy, -jnp.inf)
    best = jnp.argmax(noisy, axis=-1)
    return jnp.take_along_axis(tokens, best[:, None], axis=-1)[:, 0].astype(jnp.int32)


def _argmax(x: jax.Array) -> jax.Array:
    """The first largest entry of each row, int32 `[batch]`; the last among NaN.

    Several times as fast as `jnp.argmax` on a CPU, which compares pairs one by one.
    """
    places = jnp.arange(x.shape[-1], dtype=jnp.int32)[None]
    largest = x == x.max(axis=-1, keepdims=True)
    return jnp.where(largest, places, x.shape[-1] - 1).min(axis=-1)


def check_sampling(sampling: Sampling) -> None:
    """Raises a UserError for a setting out of its range."""
    if not sampling.temperature >= 0:
        raise UserError(
            f"temperature is {sampling.temperature}, but cannot be negative; 0 always "
            "takes the most likely token"
        )
    if sampling.top_k < 0:
        raise UserError(
            f"top_k is {sampling.top_k}, but cannot be negative; 0 allows every token"
        )
    if not 0 < sampling.top_p <= 1:
        raise UserError(
            f"top_p is {sampling.top_p}, but has to be above 0 and at most 1; 1 allows "
            "every token"
        )
