"""Blocks over a stream of positions: those of a context, or candidates.

The context stream passes all blocks. Candidates pass all of them, too, or the last
ones alone (`model.candidate_layers`); the blocks below those are the trunk. Parameters
of the blocks, and keys and values, are trees `[layers, ...]` that are scanned or
unrolled, or lists for the layers.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ebt_jax.models.attention import Visible, rotation
from ebt_jax.models.blocks import Block, rematerialized
from ebt_jax.models.config import ModelConfig
from ebt_jax.refine import PyTree


def with_blocks_apart(config: ModelConfig, params: PyTree) -> PyTree:
    """The same parameters with a list of blocks, for reading them over and over.

    XLA copies what it slices from an array, here all weights of the blocks for each
    token. Where there are more blocks than are unrolled, nothing changes.
    """
    if config.layers > config.unroll:
        return params
    return {**params, "blocks": _apart(params["blocks"], config.layers)}


@functools.partial(jax.jit, static_argnums=1)
def _apart(stacked: PyTree, parts: int) -> list[PyTree]:
    return [jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(parts)]


class Stream(NamedTuple):
    """What the context stream leaves behind.

    Attributes:
      hidden: final hidden states `[batch, seq, dim]`, with one before them of the step
        token where there is one.
      anchor: what candidates start from, `[batch, seq, dim]`: hidden states below the
        blocks that they pass through, or the final ones.
      keys: of all blocks, as in `run_blocks`.
      values: like keys.
    """

    hidden: jax.Array
    anchor: jax.Array
    keys: PyTree
    values: PyTree


def context_stream(
    config: ModelConfig,
    params: PyTree,
    x: jax.Array,
    positions: jax.Array,
    segments: jax.Array | None,
    step: jax.Array | None,
    piece: int = 0,
) -> Stream:
    """All blocks over a context.

    Args:
      config: the model's.
      params: its parameters.
      x: embedded tokens `[batch, seq, dim]`.
      positions: rotary ones, without a step token, `[seq]` or `[batch, seq]`.
      segments: as in `Context`.
      step: the landscape's embedding `[dim]`, or None.
      piece: as in `Block`.
    """
    condition = step
    rows = jnp.arange(x.shape[1])
    if step is not None and config.conditioning == "time_embed":
        condition = None
        token = jnp.broadcast_to(step.astype(x.dtype), (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([token, x], axis=1)
        first = jnp.zeros_like(positions[..., :1])
        positions = jnp.concatenate([first, positions + 1], axis=-1)
        rows = jnp.concatenate([jnp.array([-1]), rows])  # sees itself, key 0
    visible = visible_keys(config, rows, segments)
    blocks = params["blocks"]
    return context_blocks(config, blocks, x, positions, visible, condition, piece=piece)


def context_blocks(
    config: ModelConfig,
    blocks: PyTree,
    x: jax.Array,
    positions: jax.Array,
    visible: Visible,
    condition: jax.Array | None,
    past: tuple[PyTree, PyTree] | None = None,
    piece: int = 0,
) -> Stream:
    """All blocks over tokens of a context. Arguments as of `run_blocks`."""
    run = functools.partial(
        run_blocks,
        config,
        positions=positions,
        visible=visible,
        condition=condition,
        piece=piece,
    )
    if config.blocks_of_candidates == config.layers:
        hidden, (keys, values) = run(blocks, x, past=past)
    else:
        split = functools.partial(_split, config)
        (trunk, top), (below, above) = split(blocks), (None, None)
        if past is not None:
            below, above = zip(*map(split, past), strict=True)
        x, trunk_past = run(trunk, x, past=below)
        hidden, top_past = run(top, x, past=above)
        keys, values = map(_join, trunk_past, top_past)
    anchor = hidden if config.candidate_input == "final" else x
    return Stream(hidden, anchor, keys, values)


def candidate_blocks(config: ModelConfig, of_blocks: PyTree) -> PyTree:
    """Of a tree `[layers, ...]`, or a list for the layers, what candidates meet."""
    if config.blocks_of_candidates == config.layers:
        return of_blocks
    return _split(config, of_blocks)[1]


def _split(config: ModelConfig, of_blocks: PyTree) -> tuple[PyTree, PyTree]:
    """Parts of the trunk and of the blocks that candidates pass through."""
    trunk = config.layers - config.blocks_of_candidates
    if isinstance(of_blocks, list):
        return of_blocks[:trunk], of_blocks[trunk:]
    part = lambda index: jax.tree.map(lambda a: a[index], of_blocks)
    return part(slice(trunk)), part(slice(trunk, None))


def _join(trunk: PyTree, top: PyTree) -> PyTree:
    """The inverse of `_split`."""
    if isinstance(trunk, list):
        return trunk + top
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), trunk, top)


def run_blocks(
    config: ModelConfig,
    blocks: PyTree,
    x: jax.Array,
    positions: jax.Array,
    visible: Visible,
    condition: jax.Array | None,
    past: tuple[PyTree, PyTree] | None = None,
    piece: int = 0,
) -> tuple[jax.Array, tuple[PyTree, PyTree]]:
    """Blocks over `[batch, seq, dim]`, one after the other.

    They are scanned, so that compile time does not grow with their number; few are
    unrolled, which spares slicing weights and stacking residuals.

    Args:
      config: the model's.
      blocks: parameters of some of its blocks, `[blocks, ...]` or a list.
      x: `[batch, seq, dim]`.
      positions: rotary ones, `[seq]` or `[batch, seq]`.
      visible: which keys each position of x sees.
      condition: `[dim]` or None.
      past: keys and values of the blocks as in `Context`, each as in `Block`.
      piece: as in `Block`.

    Returns:
      `[batch, seq, dim]`, and keys and values of the blocks, as in `Context`.
    """
    turns = rotation(positions, config.head_dim, x.dtype)

    def layer(x: jax.Array, inputs: Any) -> Any:
        weights, past = inputs
        block = Block(config, piece)
        return block.apply({"params": weights}, x, turns, visible, condition, past)

    scanned = config.layers > config.unroll
    layer = rematerialized(config, layer, scanned)
    if isinstance(blocks, list):  # see `with_blocks_apart`
        pasts = [None] * len(blocks) if past is None else zip(*past, strict=True)
        keys, values = [], []
        for weights, of_layer in zip(blocks, pasts, strict=True):
            x, (key, value) = layer(x, (weights, of_layer))
            keys.append(key)
            values.append(value)
        return x, (keys, values)
    return jax.lax.scan(layer, x, (blocks, past), unroll=not scanned)


def visible_keys(
    config: ModelConfig, rows: jax.Array, segments: jax.Array | None
) -> Visible:
    """Which keys each row sees: tokens 0..row of its segment, and the step token.

    Args:
      config: says whether there is a step token, key 0.
      rows: `[seq]` or `[batch, seq]`; -1 for the step token itself.
      segments: `[batch, seq]` of the tokens, or None.
    """
    extra = step_tokens(config)
    last = jnp.atleast_2d(rows) + extra
    if segments is None:
        return Visible(last)
    of_keys = jnp.pad(segments, ((0, 0), (extra, 0)), constant_values=-1)
    return Visible(last, of_keys[:, rows + extra], of_keys)


def step_tokens(config: ModelConfig) -> int:
    """How many keys come before that of the first token: 1 or 0."""
    return int(config.kind == "ebt" and config.conditioning == "time_embed")


def depends_on_landscape(config: ModelConfig) -> bool:
    """Whether there is a context for each landscape, or one for all."""
    return config.kind == "ebt" and config.conditioning != "default"
