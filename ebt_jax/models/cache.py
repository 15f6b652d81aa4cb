"""Sequences that are encoded once and grow by a token at a time.

Each landscape has keys and values of its own: what a refinement step reads in one is
nowhere copied out of an array that holds all of them.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ebt_jax.models import causal
from ebt_jax.models.config import ModelConfig
from ebt_jax.refine import PyTree

PIECE = 256  # queries of a prompt that are attended at a time,
MOST_PIECES = 8  # unless there are more pieces than this


class Cache(NamedTuple):
    """Encoded sequences.

    Attributes:
      keys: a tuple for the landscapes, of length 1 where the context does not depend
        on them; each as one landscape's in `causal.Context`. What lies behind the end
        of a sequence is never seen.
      values: like keys.
      lengths: int32 `[batch]`, tokens of each sequence.
      last: the last token's embedding, or its final hidden state in Transformer++,
        `[batch, 1, dim]`.
    """

    keys: tuple[PyTree, ...]
    values: tuple[PyTree, ...]
    lengths: jax.Array
    last: jax.Array


def prefill(
    config: ModelConfig, params: PyTree, tokens: jax.Array, lengths: jax.Array
) -> Cache:
    """Encodes sequences of several lengths.

    Args:
      config: the model's.
      params: its parameters.
      tokens: int32 `[batch, capacity]`; anything behind the end of a sequence.
      lengths: int32 `[batch]`, at least 1 each.
    """
    x = causal.embed(config, params, tokens)
    positions = jnp.arange(tokens.shape[1])
    piece = PIECE if tokens.shape[1] <= MOST_PIECES * PIECE else 0
    streams = [
        causal.context_stream(config, params, x, positions, None, step, piece)
        for step in _steps(config, params)
    ]
    last = streams[0][0] if config.kind == "transformer_pp" else x
    index = (lengths - 1)[:, None, None]
    keys, values = zip(*(past for _, past in streams), strict=True)
    return Cache(keys, values, lengths, jnp.take_along_axis(last, index, axis=1))


def append(
    config: ModelConfig, params: PyTree, cache: Cache, tokens: jax.Array
) -> Cache:
    """Encodes one more token, int32 `[batch]`, of each sequence."""
    x = causal.embed(config, params, tokens[:, None])
    visible = causal.visible_keys(config, cache.lengths[:, None] - 1, None)
    place = cache.lengths[:, None] + causal.step_tokens(config)
    sequences = jnp.arange(tokens.shape[0])

    def write(after: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
        """Puts keys `[..., batch, heads, 1, head_dim]` behind those of a sequence.

        They wait for `after`, which is of the last block: all others have read the old
        ones by then. Without that XLA writes to a copy; it cannot know 0 * after to be
        0, and it ignores barriers here.
        """
        new = new + jnp.broadcast_to(0 * after, new.shape)
        axis = old.ndim - 4
        index = (slice(None),) * axis + (sequences, slice(None), place[:, 0])
        return old.at[index].set(jnp.moveaxis(new[..., 0, :], axis, 0))

    last, grown = x, []
    pasts = zip(cache.keys, cache.values, strict=True)
    for step, past in zip(_steps(config, params), pasts, strict=True):
        condition = None if config.conditioning == "time_embed" else step
        hidden, own = causal.run_blocks(
            config, params, x, place, visible, condition, past
        )
        last = hidden if config.kind == "transformer_pp" else x
        grown.append(jax.tree.map(functools.partial(write, own[0][-1]), past, own))
    keys, values = zip(*grown, strict=True)
    return Cache(keys, values, cache.lengths + 1, last)


def next_context(config: ModelConfig, cache: Cache, samples: int = 1) -> causal.Context:
    """The context of so many candidates for each sequence, all for its next token."""
    rows = jnp.broadcast_to(cache.lengths[:, None] - 1, (len(cache.lengths), samples))
    anchor = cache.last if config.candidate_input == "anchored" else None
    ahead = rows + causal.step_tokens(config) + 1
    return causal.Context(cache.keys, cache.values, rows, ahead, None, anchor)


class Mark(NamedTuple):
    """Where sequences end: `lengths` and `last` of a `Cache`."""

    lengths: jax.Array
    last: jax.Array


def mark(cache: Cache) -> Mark:
    """Where the sequences end now."""
    return Mark(cache.lengths, cache.last)


def restore(cache: Cache, mark: Mark) -> Cache:
    """The sequences as they were at a mark; what came after it is no longer seen."""
    return cache._replace(lengths=mark.lengths, last=mark.last)


def context_at(config: ModelConfig, cache: Cache, marks: Mark) -> causal.Context:
    """The context of a candidate for the token after each of several marks."""
    rows = marks.lengths.T - 1
    anchor = None
    if config.candidate_input == "anchored":
        anchor = jnp.moveaxis(marks.last[:, :, 0], 0, 1)
    ahead = rows + causal.step_tokens(config) + 1
    return causal.Context(cache.keys, cache.values, rows, ahead, None, anchor)


def next_logits(config: ModelConfig, params: PyTree, cache: Cache) -> jax.Array:
    """Transformer++: logits of the next token, `[batch, 1, vocab]`."""
    return causal.output_logits(config, params, cache.last)


def _steps(config: ModelConfig, params: PyTree) -> list[Any]:
    """The embedding `[dim]` of each landscape, or None for the one there is."""
    if not causal.depends_on_landscape(config):
        return [None]
    table = params["step_embed"]["embedding"]
    return [table[number] for number in range(config.num_landscapes)]
