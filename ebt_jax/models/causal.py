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
)
from ebt_jax.models.config import ModelConfig
from ebt_jax.models.streams import (
    candidate_blocks,
    context_stream,
    depends_on_landscape,
    run_blocks,
    step_tokens,
    visible_keys,
)
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
