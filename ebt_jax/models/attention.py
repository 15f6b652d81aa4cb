"""Softmax attention that can be differentiated any number of times.

A meta-gradient differentiates attention twice, which fused kernels do not support.
Keys may lie in the past of a query or be its own; a candidate sees itself besides the
context, and no other candidate (paper, appendix C.3).

Arrays are `[batch, heads, seq, head_dim]`: what one product of matrices reads lies
together, for training as for a cache that is read once for each token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

ROTARY_BASE = 10000.0
UNSEEN = -1e30  # below every score, yet finite: differences of it are 0


class Visible(NamedTuple):
    """Which keys each query sees: all up to its last one that are of its segment.

    Attributes:
      last: int32 `[batch or 1, seq]`, index of the last key; -1 for none.
      segments: int32 `[batch, seq]` of the queries, or None.
      of_keys: int32 `[batch, keys]`, the keys' segments, -1 for a key that all see; or
        None.
    """

    last: jax.Array
    segments: jax.Array | None = None
    of_keys: jax.Array | None = None

    def mask(self, keys: jax.Array) -> jax.Array:
        """Whether keys of these indices `[keys]` are seen.

        `of_keys` has to be theirs. Returns bool `[batch or 1, 1, seq, keys]`.
        """
        mask = keys[None, None] <= self.last[..., None]
        if self.segments is not None and self.of_keys is not None:
            theirs = self.of_keys[:, None, :]
            mask &= (self.segments[..., None] == theirs) | (theirs < 0)
        return mask[:, None]


def rotation(positions: jax.Array, head_dim: int, dtype: Any) -> jax.Array:
    """Cosines and sines of the rotary angles (Su et al. 2021).

    Args:
      positions: `[seq]` or `[batch, seq]`.
      head_dim: even.
      dtype: of the activations; angles are computed in float32 or better.

    Returns:
      `[2, batch or 1, 1, seq, head_dim / 2]`.
    """
    half = head_dim // 2
    dtype = jnp.promote_types(dtype, jnp.float32)
    frequency = ROTARY_BASE ** (-jnp.arange(half, dtype=dtype) / half)
    places = jnp.atleast_2d(positions).astype(dtype)
    angle = jnp.einsum("bs,f->bsf", places, frequency)[:, None]
    # Without a barrier XLA computes them anew wherever they are read, for every head.
    return jax.lax.optimization_barrier(jnp.stack([jnp.cos(angle), jnp.sin(angle)]))


def rotate(x: jax.Array, rotation: jax.Array) -> jax.Array:
    """Rotary position embedding of x `[batch, heads, seq, head_dim]`.

    A pair is feature j of the first half and feature j of the second. The published
    code pairs neighbours; that is the same model with the columns of the query and key
    kernels in another order, and twice as slow to compute.
    """
    cos, sin = rotation
    a, b = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return turned.astype(x.dtype)


def attend(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    visible: Visible,
    own: tuple[jax.Array, jax.Array] | None = None,
    block: int = 0,
) -> jax.Array:
    """Softmax attention in float32, over visible keys and each query's own key.

    Args:
      query: `[batch, heads, seq, head_dim]`.
      keys: `[batch, heads, keys, head_dim]`.
      values: like keys.
      visible: which keys each query sees.
      own: key and value `[batch, heads, seq, head_dim]` that query j alone sees.
      block: where there are more queries than this, so many queries and keys at a
        time, so that memory grows linearly with their number; 0 for all at once.

    Returns:
      `[batch, heads, seq, head_dim]`.
    """
    precise = jnp.promote_types(query.dtype, jnp.float32)
    query = query * query.shape[-1] ** -0.5
    start = None
    if own is not None:
        score = jnp.sum(query.astype(precise) * own[0].astype(precise), -1)
        start = score, own[1].astype(precise)
    if block and query.shape[2] > block:
        out = _blockwise(query, keys, values, visible, start, block)
    else:
        mask = visible.mask(jnp.arange(keys.shape[2]))
        scores = _scores(query, keys, mask)
        top = scores.max(axis=-1)
        if start is not None:
            top = jnp.maximum(top, start[0])
        top = jax.lax.stop_gradient(top)
        weights = jnp.exp(scores - top[..., None])
        total, out = weights.sum(axis=-1), _weighted(weights, values)
        if start is not None:
            weight = jnp.exp(start[0] - top)
            total, out = total + weight, out + weight[..., None] * start[1]
        out = out / total[..., None]
    return out.astype(query.dtype)


def attend_in_pieces(
    query: jax.Array, keys: jax.Array, values: jax.Array, visible: Visible, piece: int
) -> jax.Array:
    """The same where no query sees a key behind its own place; for forward passes.

    A piece of the queries is scored against the keys up to its end alone, nearly half
    of all. Every piece is compiled, and derivatives keep all scores: for a few pieces.

    Args:
      query: `[batch, heads, seq, head_dim]`.
      keys: like query.
      values: like query.
      visible: which keys each query sees, none with a larger index than its own.
      piece: how many queries at a time.

    Returns:
      `[batch, heads, seq, head_dim]`.
    """
    attended = []
    for begin in range(0, query.shape[2], piece):
        end = begin + piece
        seen = Visible(visible.last[:, begin:end])
        if visible.segments is not None and visible.of_keys is not None:
            seen = Visible(
                seen.last, visible.segments[:, begin:end], visible.of_keys[:, :end]
            )
        attended.append(
            attend(query[:, :, begin:end], keys[:, :, :end], values[:, :, :end], seen)
        )
    return jnp.concatenate(attended, axis=2)


def _blockwise(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    visible: Visible,
    start: tuple[jax.Array, jax.Array] | None,
    block: int,
) -> jax.Array:
    """Online softmax (Milakov & Gimelshein 2018) over blocks of keys.

    What a block computes is computed again when it is differentiated, so that no array
    `[seq, keys]` is kept, at any order. Blocks that no query sees are passed over.
    """
    length, count = query.shape[2], keys.shape[2]
    # Blocks of one size, no larger than asked for, with little to fill up.
    rows = -(-length // -(-length // block))
    columns = -(-count // -(-count // block))
    precise = jnp.promote_types(query.dtype, jnp.float32)
    if start is None:
        nothing = jnp.full(query.shape[:3], UNSEEN, precise)
        start = nothing, jnp.zeros((*query.shape[:3], values.shape[3]), precise)
        weight = jnp.zeros_like(nothing)
    else:
        weight = jnp.ones_like(start[0])
    of_queries = {
        "query": _split(query, 2, rows),
        "start": (
            _split(start[0], 2, rows),
            _split(weight, 2, rows),
            _split(start[1], 2, rows),
        ),
        "last": _split(visible.last, 1, rows, fill=-1),
        "segments": _split(visible.segments, 1, rows),
    }
    of_keys = {
        "keys": _split(keys, 2, columns),
        "values": _split(values, 2, columns),
        "segments": _split(visible.of_keys, 1, columns),
        "index": jnp.arange(-(-count // columns) * columns).reshape(-1, columns),
    }

    @jax.checkpoint
    def for_queries(queries: dict[str, Any]) -> jax.Array:
        seen = Visible(queries["last"], queries["segments"])

        @jax.checkpoint
        def look(carry: Any, part: dict[str, Any]) -> Any:
            top, total, out = carry
            mask = seen._replace(of_keys=part["segments"]).mask(part["index"])
            scores = _scores(queries["query"], part["keys"], mask)
            new = jax.lax.stop_gradient(jnp.maximum(top, scores.max(axis=-1)))
            weights = jnp.exp(scores - new[..., None])
            shrink = jnp.exp(top - new)
            total = shrink * total + weights.sum(axis=-1)
            out = shrink[..., None] * out + _weighted(weights, part["values"])
            return new, total, out

        def step(carry: Any, part: dict[str, Any]) -> tuple[Any, None]:
            some = part["index"][0] <= seen.last.max()
            return jax.lax.cond(some, look, lambda same, _: same, carry, part), None

        (_, total, out), _ = jax.lax.scan(step, queries["start"], of_keys)
        return out / jnp.where(total > 0, total, 1.0)[..., None]

    out = jnp.moveaxis(jax.lax.map(for_queries, of_queries), 0, 2)
    return out.reshape(*out.shape[:2], -1, out.shape[-1])[:, :, :length]


def _split(x: jax.Array | None, axis: int, block: int, fill: int = 0) -> Any:
    """Blocks of an axis, the last one filled up, as a new leading axis."""
    if x is None:
        return None
    parts = -(-x.shape[axis] // block)
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, parts * block - x.shape[axis])
    x = jnp.pad(x, widths, constant_values=fill)
    x = x.reshape(*x.shape[:axis], parts, block, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _scores(query: jax.Array, keys: jax.Array, mask: jax.Array) -> jax.Array:
    scores = jnp.einsum(
        "bhqd,bhkd->bhqk",
        query,
        keys,
        preferred_element_type=jnp.promote_types(query.dtype, jnp.float32),
    )
    return jnp.where(mask, scores, -jnp.inf)


def _weighted(weights: jax.Array, values: jax.Array) -> jax.Array:
    return jnp.einsum(
        "bhqk,bhkd->bhqd",
        weights.astype(values.dtype),
        values,
        preferred_element_type=weights.dtype,
    )
