"""Causal models of tokens or frames: the energy network and Transformer++.

Counting from 0, token j sits at rotary position j. Candidate j stands for token j+1:
it sits at position j+1, attends tokens 0..j and itself, with the weights that tokens
use. A step token takes position 0 and moves everything else up by one. No token ever
sees a candidate, so the context is encoded once for each landscape and its keys and
values serve every refinement step, and gradients with respect to a candidate run
through the candidate stream alone.

Not published: candidates may start from the context's hidden state at the token that
they continue, and pass through the last blocks alone (`model.candidate_layers`). The
blocks below those are a trunk, whose cost is that of a feed-forward model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ebt_jax.interfaces import Batch
from ebt_jax.models import ends
from ebt_jax.models.attention import Visible, rotation
from ebt_jax.models.blocks import (
    NORM_EPS,
    Block,
    Norm,
    apply,
    dense,
    embedding,
    init_of,
    modulation,
    rematerialized,
)
from ebt_jax.models.config import ModelConfig
from ebt_jax.refine import PyTree


class Context(NamedTuple):
    """What candidates see of a sequence.

    Attributes:
      keys: `[blocks, batch, heads, keys, head_dim]` of the blocks that candidates pass
        through; where the context depends on the landscape `[landscapes, blocks, ...]`.
        With time_embed, keys counts the step token. Of parameters `with_blocks_apart` a
        list for the blocks. Of a cache a tuple for the landscapes, see `cache.Cache`.
      values: like keys.
      rows: index of the token that each candidate continues, the last one it sees;
        `[seq]` or `[batch, seq]`.
      positions: rotary position of each candidate, `[seq]` or `[batch, seq]`.
      segments: int32 `[batch, seq]` of packed sequences, or None.
      anchor: hidden states of the tokens that candidates continue, at the depth that
        candidates start from, `[batch, seq, dim]`, or None.
      noise: what is added to embedded candidates besides, `[batch, seq, dim]`, or None.
    """

    keys: PyTree
    values: PyTree
    rows: jax.Array
    positions: jax.Array
    segments: jax.Array | None
    anchor: jax.Array | None
    noise: jax.Array | None = None


def init(config: ModelConfig, key: jax.Array) -> PyTree:
    """Parameters; blocks are stacked `[layers, ...]`."""
    keys = iter(jax.random.split(key, 8))
    x, vector = jnp.zeros((1, 1, config.width)), jnp.zeros((config.width,))
    turns = rotation(jnp.zeros((1,)), config.head_dim, x.dtype)
    visible = Visible(jnp.zeros((1, 1), jnp.int32))
    conditioned = config.conditioning in ("adaln", "adaln_zero")
    energy = config.kind == "ebt"
    condition = vector if energy and conditioned else None

    def block(key: jax.Array) -> PyTree:
        return init_of(Block(config), key, x, turns, visible, condition)

    params = {
        **ends.init_input(config, next(keys)),
        "blocks": jax.vmap(block)(jax.random.split(next(keys), config.layers)),
        "final_norm": init_of(_final_norm(config), next(keys), x),
    }
    if not energy:
        return params | ends.init_output(config, next(keys))
    params["energy"] = init_of(dense(config, 1), next(keys), x)
    if ends.has_candidate_table(config):
        params |= ends.init_candidate_table(config, next(keys))
    if config.landscape_scales:
        params["energy_scale"] = jnp.ones(config.num_landscapes)
    if config.conditioning != "default":
        table = embedding(config, config.num_landscapes)
        params["step_embed"] = init_of(table, next(keys), jnp.int32([0]))
    if conditioned:
        params["final_modulation"] = init_of(modulation(config, 2), next(keys), vector)
    return params


def encode_context(config: ModelConfig, params: PyTree, batch: Batch) -> Context:
    """Runs the context stream over a batch's tokens `[batch, seq]` or frames.

    `batch["segments"]` and `batch["positions"]` `[batch, seq]`, where there are any,
    keep packed documents apart.
    """
    x = ends.embed(config, params, ends.sequences(config, batch))
    encode = functools.partial(encode_embedded, config, params, x, batch)
    if depends_on_landscape(config):
        (keys, values), _ = jax.vmap(encode)(jnp.arange(config.num_landscapes))
        anchor = x if config.anchored else None
    else:
        (keys, values), anchor = encode(None)
    rows, positions, segments = _layout(config, batch)
    ahead = positions + step_tokens(config) + 1
    return Context(keys, values, rows, ahead, segments, anchor)


def encode_embedded(
    config: ModelConfig,
    params: PyTree,
    x: jax.Array,
    batch: Batch,
    landscape: jax.Array | None,
) -> tuple[tuple[PyTree, PyTree], jax.Array | None]:
    """Keys and values of one landscape, and the anchor, see `Context`.

    Args:
      config: the model's.
      params: its parameters; none with a row for each entry of the vocabulary.
      x: embedded tokens `[batch, seq, dim]`.
      batch: for its segments and positions.
      landscape: int32 scalar; None where the context does not depend on it.
    """
    _, positions, segments = _layout(config, batch)
    step = None
    if landscape is not None:
        step = params["step_embed"]["embedding"][landscape]
    stream = context_stream(config, params, x, positions, segments, step)
    seen = (
        candidate_blocks(config, stream.keys),
        candidate_blocks(config, stream.values),
    )
    return seen, stream.anchor if config.anchored else None


def energy(
    config: ModelConfig,
    params: PyTree,
    context: Context,
    candidate: jax.Array,
    landscape: jax.Array,
) -> jax.Array:
    """Energies `[batch, seq]` of candidates in energy space, `[batch, seq, ...]`."""
    x = ends.embed_candidate(config, params, candidate)
    if context.anchor is not None:
        x = x + context.anchor
    if context.noise is not None:
        x = x + context.noise.astype(x.dtype)
    past = context.keys, context.values
    places = context.rows, context.positions, context.segments

    def energies(past: Any, landscape: Any, x: jax.Array) -> jax.Array:
        return energy_of_embedded(config, params, past, places, x, landscape)

    if isinstance(context.keys, tuple):
        pasts = list(zip(*past, strict=True))
        if len(pasts) == 1:
            return energies(pasts[0], landscape, x)
        each = [
            functools.partial(energies, p, number) for number, p in enumerate(pasts)
        ]
        return _one_of(each, landscape, x)
    if depends_on_landscape(config):
        past = jax.tree.map(lambda a: a[landscape], past)
    return energies(past, landscape, x)


def _one_of(
    energies: Sequence[Callable[[jax.Array], jax.Array]],
    which: jax.Array,
    x: jax.Array,
) -> jax.Array:
    """Energies `[batch, seq]` of x `[batch, seq, dim]` by one of several functions.

    What the others read is not touched, also when this is differentiated, by x, once:
    the derivative of a `switch` would carry along what each branch may need. As each
    energy depends on its own x alone, its gradient is known before its cotangent.
    """

    def with_gradient(of: Callable, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        energy, back = jax.vjp(of, x)
        return energy, back(jnp.ones_like(energy))[0]

    @jax.custom_vjp
    def chosen(x: jax.Array) -> jax.Array:
        return jax.lax.switch(which, energies, x)

    def forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        branches = [functools.partial(with_gradient, of) for of in energies]
        return jax.lax.switch(which, branches, x)

    def backward(gradient: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
        return (cotangent[..., None].astype(gradient.dtype) * gradient,)

    chosen.defvjp(forward, backward)
    return chosen(x)


def first_guess(config: ModelConfig, params: PyTree, context: Context) -> jax.Array:
    """Logits `[batch, seq, vocab]` read off the hidden states candidates start from.

    What a feed-forward model would predict, with the matrix that embeds candidates as
    its output matrix: an amortised start of the refinement.
    """
    assert context.anchor is not None  # the config says so
    hidden = context.anchor.astype(jnp.promote_types(context.anchor.dtype, jnp.float32))
    square = jnp.mean(jnp.square(hidden), axis=-1, keepdims=True)
    hidden = (hidden * jax.lax.rsqrt(square + NORM_EPS)).astype(context.anchor.dtype)
    return ends.scores(config, params, hidden)


def candidate_places(config: ModelConfig, batch: Batch, index: jax.Array) -> Any:
    """Rows, rotary positions and segments of candidates `[seq]` of every sequence."""
    _, positions, segments = _layout(config, batch)
    return index, positions[..., index] + step_tokens(config) + 1, segments


def energy_of_embedded(
    config: ModelConfig,
    params: PyTree,
    past: tuple[PyTree, PyTree],
    places: tuple[jax.Array, jax.Array, jax.Array | None],
    x: jax.Array,
    landscape: jax.Array,
) -> jax.Array:
    """Energies `[batch, seq]`, by what the candidate stream starts from.

    Args:
      config: the model's.
      params: its parameters; none with a row for each entry of the vocabulary.
      past: of `encode_embedded`.
      places: rows, positions and segments, as in `Context`.
      x: embedded candidates `[batch, seq, dim]`, the anchor added where there is one.
      landscape: int32 scalar.
    """
    rows, positions, segments = places
    condition = None
    if config.conditioning in ("adaln", "adaln_zero"):
        condition = params["step_embed"]["embedding"][landscape]
    visible = visible_keys(config, rows, segments)
    blocks = candidate_blocks(config, params["blocks"])
    x, _ = run_blocks(config, blocks, x, positions, visible, condition, past)
    x = apply(_final_norm(config), params, "final_norm", x)
    if condition is not None:
        parts = apply(
            modulation(config, 2), params, "final_modulation", jax.nn.silu(condition)
        )
        shift, scale = jnp.split(parts.reshape(1, 1, -1), 2, axis=-1)
        x = x * (1 + scale) + shift
    head = params["energy"]["kernel"]
    energies = x.astype(jnp.promote_types(x.dtype, jnp.float32)) @ head[:, 0]
    if config.landscape_scales:
        # A factor of the energy is one of the step size: each step has its own.
        energies = energies * params["energy_scale"][landscape]
    return energies


def predict(config: ModelConfig, params: PyTree, batch: Batch) -> jax.Array:
    """Transformer++: what follows each place, see `ends.output`."""
    x = ends.embed(config, params, ends.sequences(config, batch))
    _, positions, segments = _layout(config, batch)
    stream = context_stream(config, params, x, positions, segments, None)
    return predict_from_hidden(config, params, stream.hidden)


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


def predict_from_hidden(config: ModelConfig, params: PyTree, x: jax.Array) -> jax.Array:
    """Transformer++: predictions of hidden states `[batch, seq, dim]`."""
    x = apply(_final_norm(config), params, "final_norm", x)
    return ends.output(config, params, x)


def _layout(
    config: ModelConfig, batch: Batch
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Rows, rotary positions and segments; the latter two of packed sequences."""
    rows = jnp.arange(ends.sequences(config, batch).shape[1])
    if "segments" not in batch:
        return rows, rows, None
    return rows, batch["positions"], batch["segments"]


def _final_norm(config: ModelConfig) -> Norm:
    return Norm(config.norm, config.dyt_alpha)
