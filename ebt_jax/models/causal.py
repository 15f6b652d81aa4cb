"""Causal models of token sequences: the energy network and Transformer++.

Counting from 0, token j sits at rotary position j. Candidate j stands for token j+1:
it sits at position j+1, attends tokens 0..j and itself, with the weights that tokens
use. A step token takes position 0 and moves everything else up by one. No token ever
sees a candidate, so the context is encoded once for each landscape and its keys and
values serve every refinement step, and gradients with respect to a candidate run
through the candidate stream alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ebt_jax.models.blocks import (
    Block,
    Norm,
    dense,
    embedding,
    modulation,
    xavier_normal,
)
from ebt_jax.models.config import ModelConfig
from ebt_jax.objectives import Batch
from ebt_jax.refine import PyTree


class Context(NamedTuple):
    """What candidates see of a sequence.

    Attributes:
      keys: `[layers, batch, keys, heads, head_dim]`, after a leading `[landscapes]`
        where the context depends on the landscape; keys counts the step token.
      values: like keys.
      positions: rotary position of each candidate, `[seq]` or `[batch, seq]`.
      segments: int32 `[batch, seq]` of packed sequences, or None.
      anchor: embeddings of the tokens that candidates continue, `[batch, seq, dim]`, or
        None.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    segments: jax.Array | None
    anchor: jax.Array | None


def init(config: ModelConfig, key: jax.Array) -> PyTree:
    """Parameters; blocks are stacked `[layers, ...]`."""
    keys = iter(jax.random.split(key, 8))
    x, vector = jnp.zeros((1, 1, config.width)), jnp.zeros((config.width,))
    positions, mask = jnp.zeros((1,)), jnp.ones((1, 1), bool)
    conditioned = config.conditioning in ("adaln", "adaln_zero")
    energy = config.kind == "ebt"
    condition = vector if energy and conditioned else None

    def block(key: jax.Array) -> PyTree:
        return _init(
            Block(config), key, x, positions, mask, condition, method="context"
        )

    params = {
        "embed": _init(
            embedding(config, config.vocab_size), next(keys), jnp.int32([0])
        ),
        "blocks": jax.vmap(block)(jax.random.split(next(keys), config.layers)),
        "final_norm": _init(_final_norm(config), next(keys), x),
    }
    if not energy:
        params["output"] = _init(dense(config, config.vocab_size), next(keys), x)
        return params
    params["energy"] = _init(dense(config, 1), next(keys), x)
    if not config.tied_embedding:
        shape = (config.vocab_size, config.width)
        params["candidate_embed"] = {"kernel": xavier_normal(next(keys), shape)}
    if config.conditioning != "default":
        table = embedding(config, config.num_landscapes)
        params["step_embed"] = _init(table, next(keys), jnp.int32([0]))
    if conditioned:
        params["final_modulation"] = _init(modulation(config, 2), next(keys), vector)
    return params


def encode_context(config: ModelConfig, params: PyTree, batch: Batch) -> Context:
    """Runs the context stream over `batch["tokens"]` `[batch, seq]`.

    `batch["segments"]` and `batch["positions"]` `[batch, seq]`, where there are any,
    keep packed documents apart.
    """
    x = _embed(config, params, batch["tokens"])
    positions, segments = _layout(batch)
    anchor = x if config.candidate_input == "anchored" else None
    stream = functools.partial(_context_stream, config, params, x, positions, segments)
    if config.conditioning == "default":
        _, (keys, values) = stream(None)
    else:
        _, (keys, values) = jax.vmap(stream)(params["step_embed"]["embedding"])
    ahead = 2 if config.conditioning == "time_embed" else 1
    return Context(keys, values, positions + ahead, segments, anchor)


def energy(
    config: ModelConfig,
    params: PyTree,
    context: Context,
    candidate: jax.Array,
    landscape: jax.Array,
) -> jax.Array:
    """Energies `[batch, seq]` of candidates `[batch, seq, vocab]` on the simplex."""
    table = params["embed"]["embedding"]
    if not config.tied_embedding:
        table = params["candidate_embed"]["kernel"]
    dtype = context.keys.dtype
    x = jnp.einsum("bsv,vd->bsd", candidate.astype(dtype), table.astype(dtype))
    if context.anchor is not None:
        x = x + context.anchor
    past, condition = (context.keys, context.values), None
    if config.conditioning != "default":
        past = jax.tree.map(lambda a: a[landscape], past)
    if config.conditioning in ("adaln", "adaln_zero"):
        condition = params["step_embed"]["embedding"][landscape]
    seq, keys = x.shape[1], past[0].shape[2]
    mask = _causal_mask(seq, keys, context.segments)

    def layer(x: jax.Array, inputs: Any) -> tuple[jax.Array, None]:
        weights, past = inputs
        out: Any = Block(config).apply(
            {"params": weights},
            x,
            context.positions,
            mask,
            condition,
            past,
            method="candidate",
        )
        return out, None

    x, _ = jax.lax.scan(_remat(config, layer), x, (params["blocks"], past))
    x = _apply(_final_norm(config), params, "final_norm", x)
    if condition is not None:
        parts = _apply(
            modulation(config, 2), params, "final_modulation", jax.nn.silu(condition)
        )
        shift, scale = jnp.split(parts.reshape(1, 1, -1), 2, axis=-1)
        x = x * (1 + scale) + shift
    head = params["energy"]["kernel"]
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)) @ head[:, 0]


def logits(config: ModelConfig, params: PyTree, batch: Batch) -> jax.Array:
    """Transformer++: next-token logits `[batch, seq, vocab]`, float32."""
    x = _embed(config, params, batch["tokens"])
    positions, segments = _layout(batch)
    x, _ = _context_stream(config, params, x, positions, segments, None)
    x = _apply(_final_norm(config), params, "final_norm", x)
    x = _apply(dense(config, config.vocab_size), params, "output", x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _context_stream(
    config: ModelConfig,
    params: PyTree,
    x: jax.Array,
    positions: jax.Array,
    segments: jax.Array | None,
    step: jax.Array | None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """All blocks over x `[batch, seq, dim]`; `step` `[dim]` embeds the landscape."""
    condition = None
    if step is not None and config.conditioning == "time_embed":
        token = jnp.broadcast_to(step.astype(x.dtype), (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([token, x], axis=1)
        first = jnp.zeros_like(positions[..., :1])
        positions = jnp.concatenate([first, positions + 1], axis=-1)
        mask = _causal_mask(x.shape[1] - 1, x.shape[1], segments)
        first_row = jnp.arange(x.shape[1]) == 0
        first_row = jnp.broadcast_to(first_row, (*mask.shape[:-2], 1, x.shape[1]))
        mask = jnp.concatenate([first_row, mask], axis=-2)
    else:
        condition = step
        mask = _causal_mask(x.shape[1], x.shape[1], segments)

    def layer(x: jax.Array, weights: PyTree) -> tuple[jax.Array, Any]:
        return Block(config).apply(
            {"params": weights}, x, positions, mask, condition, method="context"
        )

    return jax.lax.scan(_remat(config, layer), x, params["blocks"])


def _causal_mask(seq: int, keys: int, segments: jax.Array | None) -> jax.Array:
    """`[..., seq, keys]`: row j sees tokens 0..j of its segment, and a step token."""
    extra = keys - seq
    mask = jnp.arange(keys)[None] <= jnp.arange(seq)[:, None] + extra
    mask = mask[None, None]
    if segments is None:
        return mask
    same = segments[:, :, None] == segments[:, None, :]
    same = jnp.pad(same, ((0, 0), (0, 0), (extra, 0)), constant_values=True)
    return mask & same[:, None]


def _layout(batch: Batch) -> tuple[jax.Array, jax.Array | None]:
    """Rotary positions and segments; both are there for packed sequences alone."""
    if "segments" not in batch:
        return jnp.arange(batch["tokens"].shape[1]), None
    return batch["positions"], batch["segments"]


def _remat(config: ModelConfig, layer: Callable) -> Callable:
    if config.remat == "none":
        return layer
    policies = jax.checkpoint_policies
    keep = {
        "dots": policies.dots_with_no_batch_dims_saveable,
        "full": policies.nothing_saveable,
    }[config.remat]
    return jax.checkpoint(layer, policy=keep, prevent_cse=False)


def _embed(config: ModelConfig, params: PyTree, tokens: jax.Array) -> jax.Array:
    return _apply(embedding(config, config.vocab_size), params, "embed", tokens)


def _final_norm(config: ModelConfig) -> Norm:
    return Norm(config.norm, config.dyt_alpha)


def _init(module: nn.Module, key: jax.Array, *inputs: Any, **options: Any) -> PyTree:
    return module.init(key, *inputs, **options).get("params", {})


def _apply(module: nn.Module, params: PyTree, name: str, *inputs: Any) -> Any:
    return module.apply({"params": params[name]}, *inputs)
