"""Sequences that are encoded once and grow by a token, or a frame, at a time.

Each landscape has keys and values of its own: what a refinement step reads in one is
nowhere copied out of an array that holds all of them.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ebt_jax.interfaces import Caching, Rewinding
from ebt_jax.models import causal, ends, streams
from ebt_jax.models.config import ModelConfig
from ebt_jax.refine import PyTree

PIECE = 256  # queries of a prompt that are attended at a time,
MOST_PIECES = 8  # unless there are more pieces than this


class Cache(NamedTuple):
    """Encoded sequences.

    Attributes:
      keys: a tuple for the landscapes, of length 1 where the context does not depend
        on them; each of all blocks, as in `streams.Stream`. What lies behind the end of
        a sequence is never seen.
      values: like keys.
      lengths: int32 `[batch]`, tokens of each sequence.
      newest: the last token `[batch, 1]`, or frame `[batch, 1, frame_size]`.
      last: its hidden state that a candidate starts from, or the final one in
        Transformer++, `[batch, 1, dim]`.
    """

    keys: tuple[PyTree, ...]
    values: tuple[PyTree, ...]
    lengths: jax.Array
    newest: jax.Array
    last: jax.Array


def caching(config: ModelConfig) -> Caching:
    """All of this, as objectives use it."""
    bound = lambda function: functools.partial(function, config)
    energy = config.kind == "ebt"

    def following(params: PyTree, cache: Cache) -> PyTree:
        if energy:
            return next_context(config, cache)
        return causal.predict_from_hidden(config, params, cache.last)

    return Caching(
        prepare=bound(streams.with_blocks_apart),
        prefill=bound(prefill),
        append=bound(append),
        following=following,
        length=lambda cache: cache.lengths,
        newest=lambda cache: ends.as_batch(config, cache.newest),
        rewinding=Rewinding(
            mark=mark,
            restore=restore,
            lengths=lambda marks: marks.lengths,
            newest=lambda marks: ends.as_batch(config, _by_sequence(marks.newest)),
            following=(
                (lambda params, cache, marks: context_at(config, cache, marks))
                if energy
                else None
            ),
        ),
        rows=rows_of if energy else None,
    )


def prefill(
    config: ModelConfig, params: PyTree, tokens: jax.Array, lengths: jax.Array
) -> Cache:
    """Encodes sequences of several lengths.

    Args:
      config: the model's.
      params: its parameters.
      tokens: int32 `[batch, capacity]`, or frames `[batch, capacity, frame_size]`;
        anything behind the end of a sequence.
      lengths: int32 `[batch]`, at least 1 each.
    """
    x = ends.embed(config, params, tokens)
    positions = jnp.arange(tokens.shape[1])
    piece = PIECE if tokens.shape[1] <= MOST_PIECES * PIECE else 0
    encoded = [
        streams.context_stream(config, params, x, positions, None, step, piece)
        for step in _steps(config, params)
    ]
    last = _last(config, encoded[0])
    keys, values = zip(*((s.keys, s.values) for s in encoded), strict=True)

    def end(x: jax.Array) -> jax.Array:
        index = (lengths - 1).reshape(-1, *(1 for _ in x.shape[1:]))
        return jnp.take_along_axis(x, index, axis=1)

    return Cache(keys, values, lengths, end(tokens), end(last))


def append(
    config: ModelConfig, params: PyTree, cache: Cache, tokens: jax.Array
) -> Cache:
    """Encodes one more token `[batch]`, or frame, of each sequence."""
    x = ends.embed(config, params, tokens[:, None])
    visible = streams.visible_keys(config, cache.lengths[:, None] - 1, None)
    place = cache.lengths[:, None] + streams.step_tokens(config)
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
        blocks = params["blocks"]
        stream = streams.context_blocks(
            config, blocks, x, place, visible, condition, past
        )
        own, last = (stream.keys, stream.values), _last(config, stream)
        grown.append(jax.tree.map(functools.partial(write, own[0][-1]), past, own))
    keys, values = zip(*grown, strict=True)
    return Cache(keys, values, cache.lengths + 1, tokens[:, None], last)


def next_context(config: ModelConfig, cache: Cache) -> causal.Context:
    """The context of a candidate for what follows each sequence."""
    anchor = cache.last if config.anchored else None
    return _context(config, cache, cache.lengths[:, None] - 1, anchor)


class Mark(NamedTuple):
    """Where sequences end: `lengths`, `newest` and `last` of a `Cache`."""

    lengths: jax.Array
    newest: jax.Array
    last: jax.Array


def mark(cache: Cache) -> Mark:
    """Where the sequences end now."""
    return Mark(cache.lengths, cache.newest, cache.last)


def restore(cache: Cache, mark: Mark) -> Cache:
    """The sequences as they were at a mark; what came after it is no longer seen."""
    return cache._replace(**mark._asdict())


def context_at(config: ModelConfig, cache: Cache, marks: Mark) -> causal.Context:
    """The context of a candidate for what follows each of several marks."""
    anchor = _by_sequence(marks.last) if config.anchored else None
    return _context(config, cache, marks.lengths.T - 1, anchor)


def _context(
    config: ModelConfig, cache: Cache, rows: jax.Array, anchor: jax.Array | None
) -> causal.Context:
    """What candidates see that continue the tokens at rows `[batch, seq]`."""
    top = functools.partial(streams.candidate_blocks, config)
    keys, values = tuple(map(top, cache.keys)), tuple(map(top, cache.values))
    ahead = rows + streams.step_tokens(config) + 1
    return causal.Context(keys, values, rows, ahead, None, anchor)


def _last(config: ModelConfig, stream: streams.Stream) -> jax.Array:
    """What of a stream `Cache.last` is taken from, `[batch, seq, dim]`."""
    if config.kind == "transformer_pp":
        return stream.hidden
    return stream.anchor


def rows_of(context: causal.Context, index: jax.Array) -> causal.Context:
    """The context of candidates for some of the sequences, `[some]`."""
    of_keys = lambda x: jnp.take(x, index, axis=x.ndim - 4, mode="clip")
    return context._replace(
        keys=jax.tree.map(of_keys, context.keys),
        values=jax.tree.map(of_keys, context.values),
        rows=context.rows[index],
        positions=context.positions[index],
        anchor=None if context.anchor is None else context.anchor[index],
    )


def _by_sequence(of_marks: jax.Array) -> jax.Array:
    """`[marks, batch, 1, ...]` as `[batch, marks, ...]`."""
    return jnp.moveaxis(of_marks[:, :, 0], 0, 1)


def _steps(config: ModelConfig, params: PyTree) -> list[Any]:
    """The embedding `[dim]` of each landscape, or None for the one there is."""
    if not streams.depends_on_landscape(config):
        return [None]
    table = params["step_embed"]["embedding"]
    return [table[number] for number in range(config.num_landscapes)]
