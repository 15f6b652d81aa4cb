"""Where sequences enter the blocks of a causal model, and where they leave them.

Text: tokens are embedded by a table, candidates, which are distributions, by a matrix
W or by that table. The baseline ends in logits.

Video: frames are embedded by a projection with a bias, candidates, which are frames, by
the same one. The baseline ends in a linear map, its `readout`, and a projection back.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ebt_jax.interfaces import Batch
from ebt_jax.models.blocks import (
    apply,
    dense,
    embedding,
    init_of,
    projection,
    xavier_normal,
)
from ebt_jax.models.config import ModelConfig
from ebt_jax.refine import PyTree


def sequences(config: ModelConfig, batch: Batch) -> jax.Array:
    """What a context is made of: tokens `[batch, seq]`, or frames `[batch, seq, n]`."""
    return batch["frames" if config.space == "video" else "tokens"]


def as_batch(config: ModelConfig, inputs: jax.Array) -> Batch:
    """The inverse of `sequences`."""
    return {"frames" if config.space == "video" else "tokens": inputs}


def init_input(config: ModelConfig, key: jax.Array) -> PyTree:
    """Parameters of `embed`."""
    if config.space == "video":
        frame = jnp.zeros((config.frame_size,))
        return {"frame_embed": init_of(projection(config, config.width), key, frame)}
    table = embedding(config, config.vocab_size)
    return {"embed": init_of(table, key, jnp.int32([0]))}


def has_candidate_table(config: ModelConfig) -> bool:
    """Whether candidates are embedded by a matrix of their own."""
    return config.space == "text" and not config.tied_embedding


def init_candidate_table(config: ModelConfig, key: jax.Array) -> PyTree:
    """That matrix."""
    shape = (config.vocab_size, config.width)
    return {"candidate_embed": {"kernel": xavier_normal(key, shape)}}


def init_output(config: ModelConfig, key: jax.Array) -> PyTree:
    """Parameters of `output`."""
    x = jnp.zeros((config.width,))
    if config.space == "video":
        first, second = jax.random.split(key)
        return {
            "readout": init_of(dense(config, config.width), first, x),
            "frame_output": init_of(projection(config, config.frame_size), second, x),
        }
    return {"output": init_of(dense(config, config.vocab_size), key, x)}


def embed(config: ModelConfig, params: PyTree, inputs: jax.Array) -> jax.Array:
    """Embeddings `[batch, seq, dim]` of tokens or frames, see `sequences`."""
    if config.space == "video":
        return apply(projection(config, config.width), params, "frame_embed", inputs)
    return apply(embedding(config, config.vocab_size), params, "embed", inputs)


def embed_candidate(
    config: ModelConfig, params: PyTree, candidate: jax.Array
) -> jax.Array:
    """Embeddings `[batch, seq, dim]` of candidates `[batch, seq, entries]`."""
    if config.space == "video":
        return embed(config, params, candidate)
    table = candidate_table(config, params)
    dtype = jnp.bfloat16 if config.dtype == "bfloat16" else table.dtype
    return jnp.einsum("bsv,vd->bsd", candidate.astype(dtype), table.astype(dtype))


def candidate_table(config: ModelConfig, params: PyTree) -> jax.Array:
    """The matrix `[vocab, dim]` that embeds candidates of text."""
    if config.tied_embedding:
        return params["embed"]["embedding"]
    return params["candidate_embed"]["kernel"]


def scores(config: ModelConfig, params: PyTree, x: jax.Array) -> jax.Array:
    """Logits `[batch, seq, vocab]` of x `[batch, seq, dim]` by `candidate_table`."""
    table = candidate_table(config, params).astype(x.dtype)
    precise = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum("bsd,vd->bsv", x, table, preferred_element_type=precise)


def output(config: ModelConfig, params: PyTree, x: jax.Array) -> jax.Array:
    """The baseline's prediction of normalised hidden states `[batch, seq, dim]`.

    Returns:
      Logits `[batch, seq, vocab]` or frames `[batch, seq, frame_size]`, float32.
    """
    if config.space == "video":
        x = apply(dense(config, config.width), params, "readout", x)
        x = apply(projection(config, config.frame_size), params, "frame_output", x)
    else:
        x = apply(dense(config, config.vocab_size), params, "output", x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
