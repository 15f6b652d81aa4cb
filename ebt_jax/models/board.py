"""Boards of Sudoku as a space to predict in: a distribution over digits for each cell.

A board is one prediction. Its cells all see each other, in the blocks of the causal
models without a mask, and what a cell starts from tells its row, column and box and the
digit that is given there, if any. Three networks have that in common:

    ebt             a candidate is embedded, p W, and added; the energy of a board is
                    the mean over its cells of a linear map of what the blocks make of
                    them. The gradient by one cell's distribution depends on those of
                    all others: what one cell is concludes what another is, step by step
    transformer_pp  one pass, and a linear map to digits
    recurrent       the same pass several times, each from what the one before made of
                    the cells and, again, from what is given (as Palm et al. 2018 do)

The stored candidate z `[batch, cells, digits]` holds logits, energies are taken at
p = softmax(z), where given cells are what they are. Only empty cells are scored.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ebt_jax.data.sudoku import Rules, make_rules
from ebt_jax.interfaces import Batch, EnergyModel, FeedForward, Recurrent
from ebt_jax.models.attention import Visible, rotation
from ebt_jax.models.blocks import (
    Block,
    Norm,
    apply,
    dense,
    embedding,
    init_of,
)
from ebt_jax.models.config import ModelConfig
from ebt_jax.models.streams import run_blocks
from ebt_jax.randomness import normal
from ebt_jax.refine import PyTree

PLACES = ("row_embed", "column_embed", "box_embed")


class Context(NamedTuple):
    """What candidates are judged by.

    Attributes:
      cells: what is given of each cell, embedded, `[batch, cells, dim]`.
      known: one-hot digits of given cells, else 0, `[batch, cells, digits]`.
    """

    cells: jax.Array
    known: jax.Array


def energy_model(config: ModelConfig) -> EnergyModel:
    """The energy network over boards."""

    def encode_context(params: PyTree, batch: Batch) -> Context:
        known = jax.nn.one_hot(batch["puzzle"] - 1, config.vocab_size)
        return Context(embed_cells(config, params, batch["puzzle"]), known)

    def energy(
        params: PyTree, context: Context, candidate: jax.Array, landscape: jax.Array
    ) -> jax.Array:
        given = context.known.sum(axis=-1, keepdims=True)
        p = (1 - given) * candidate + context.known
        table = params["candidate_embed"]["embedding"]
        x = context.cells + (p.astype(context.cells.dtype) @ table)
        if config.conditioning == "time_embed":
            step = params["step_embed"]["embedding"][landscape]
            x = x + step.reshape(1, 1, -1)
        x = hidden_cells(config, params, x)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return (x @ params["energy"]["kernel"][:, 0]).mean(axis=-1)

    def initial_candidate(key: jax.Array, batch: Batch) -> jax.Array:
        shape = (*batch["puzzle"].shape, config.vocab_size)
        return normal(key, shape, jnp.float32)

    return EnergyModel(
        init=functools.partial(init, config),
        encode_context=encode_context,
        energy=energy,
        initial_candidate=initial_candidate,
        normalize=jax.nn.softmax,
        loss=cross_entropy,
        target=lambda batch: jax.nn.one_hot(batch["solution"] - 1, config.vocab_size),
        measures=functools.partial(measures, config),
    )


def transformer_pp(config: ModelConfig) -> FeedForward:
    """One pass over what is given."""

    def predict(params: PyTree, batch: Batch) -> jax.Array:
        x = embed_cells(config, params, batch["puzzle"])
        return output(config, params, hidden_cells(config, params, x))

    return FeedForward(
        init=functools.partial(init, config),
        predict=predict,
        loss=cross_entropy,
        measures=functools.partial(measures, config),
    )


def recurrent(config: ModelConfig) -> Recurrent:
    """Several passes with the same weights."""

    def iterate(params: PyTree, batch: Batch, count: int) -> jax.Array:
        cells = embed_cells(config, params, batch["puzzle"])

        def again(x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            x = hidden_cells(config, params, cells + x)
            return x, output(config, params, x)

        return jax.lax.scan(again, jnp.zeros_like(cells), length=count)[1]

    return Recurrent(
        init=functools.partial(init, config),
        iterate=iterate,
        iterations=config.iterations,
        loss=cross_entropy,
        measures=functools.partial(measures, config),
    )


def init(config: ModelConfig, key: jax.Array) -> PyTree:
    """Parameters; blocks are stacked `[layers, ...]`.

    Embeddings of candidates are N(0, 1), and so is the sum of a cell's embeddings, of
    which each has the fourth part of the variance: a certain candidate is as much as
    what is given.
    """
    keys = iter(jax.random.split(key, 8))
    digits, x = config.vocab_size, jnp.zeros((1, 1, config.width))
    turns, visible = rotation(jnp.zeros((1,)), config.head_dim, x.dtype), _all(1)

    def table(entries: int, scale: float) -> PyTree:
        made = init_of(embedding(config, entries), next(keys), jnp.int32([0]))
        return jax.tree.map(lambda values: scale * values, made)

    def block(key: jax.Array) -> PyTree:
        return init_of(Block(config), key, x, turns, visible, None)

    params = {
        "embed": table(digits + 1, 0.5),
        **{name: table(digits, 0.5) for name in PLACES},
        "blocks": jax.vmap(block)(jax.random.split(next(keys), config.layers)),
        "final_norm": init_of(_final_norm(config), next(keys), x),
    }
    if config.kind != "ebt":
        return params | {"output": init_of(dense(config, digits), next(keys), x)}
    params["candidate_embed"] = table(digits, 1.0)
    params["energy"] = init_of(dense(config, 1), next(keys), x)
    if config.conditioning == "time_embed":
        step = embedding(config, config.num_landscapes)
        params["step_embed"] = init_of(step, jax.random.fold_in(key, 0), jnp.int32([0]))
    return params


def embed_cells(config: ModelConfig, params: PyTree, puzzle: jax.Array) -> jax.Array:
    """What cells start from, `[batch, cells, dim]`, by `puzzle` `[batch, cells]`."""
    rules = rules_of(config)
    x = apply(embedding(config, rules.digits + 1), params, "embed", puzzle)
    for name, units in zip(PLACES, rules.unit_of % rules.digits, strict=True):
        place = apply(embedding(config, rules.digits), params, name, units)
        x = x + place[None]
    return x


def hidden_cells(config: ModelConfig, params: PyTree, x: jax.Array) -> jax.Array:
    """Cells `[batch, cells, dim]` after all blocks, normalised."""
    count = x.shape[1]
    places = jnp.zeros((count,))  # of rotary positions: embeddings tell where a cell is
    x, _ = run_blocks(config, params["blocks"], x, places, _all(count), None)
    return apply(_final_norm(config), params, "final_norm", x)


def output(config: ModelConfig, params: PyTree, x: jax.Array) -> jax.Array:
    """Logits `[batch, cells, digits]` of normalised cells, float32."""
    x = apply(dense(config, config.vocab_size), params, "output", x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def cross_entropy(
    logits: jax.Array, batch: Batch, smoothing: float | jax.Array = 0.0
) -> jax.Array:
    """Negative log-likelihood in nats, `[batch]`, a mean over a board's empty cells.

    Args:
      logits: `[batch, cells, digits]`.
      batch: `puzzle` and `solution` `[batch, cells]`.
      smoothing: mass that is spread evenly over the digits.
    """
    log_prob = jax.nn.log_softmax(logits)
    index = batch["solution"][..., None] - 1
    nll = -jnp.take_along_axis(log_prob, index, axis=-1)[..., 0]
    nll = (1 - smoothing) * nll - smoothing * log_prob.mean(axis=-1)
    return mean_of_empty(nll, batch)


def measures(
    config: ModelConfig, logits: jax.Array, batch: Batch
) -> dict[str, jax.Array]:
    """`cell_accuracy` of empty cells, and whether a board is right; `[batch]` each.

    `solved` says that all its cells are those of the solution, `valid` that, as the
    digits given and the likeliest ones stand there, they keep to the rules; as there is
    one solution, that is the same.
    """
    filled = answers(logits, batch)
    right = filled == batch["solution"]
    stands = jax.nn.one_hot(filled - 1, config.vocab_size)
    times = stands[:, rules_of(config).units].sum(axis=2)
    return {
        "cell_accuracy": mean_of_empty(right.astype(jnp.float32), batch),
        "solved": right.all(axis=-1).astype(jnp.float32),
        "valid": (times == 1).all(axis=(1, 2)).astype(jnp.float32),
    }


def answers(logits: jax.Array, batch: Batch) -> jax.Array:
    """The digits given, and the likeliest ones elsewhere, int32 `[batch, cells]`."""
    return jnp.where(batch["puzzle"] > 0, batch["puzzle"], logits.argmax(-1) + 1)


def mean_of_empty(values: jax.Array, batch: Batch) -> jax.Array:
    """Means `[batch]` over the empty cells of values `[batch, cells]`."""
    empty = (batch["puzzle"] == 0).astype(values.dtype)
    return (empty * values).sum(axis=-1) / jnp.maximum(empty.sum(axis=-1), 1)


def rules_of(config: ModelConfig) -> Rules:
    """The rules of the boards of a resolved config."""
    return make_rules(config.box_rows, config.box_columns)


def _all(count: int) -> Visible:
    """Every cell sees all of them."""
    return Visible(jnp.full((1, count), count - 1))


def _final_norm(config: ModelConfig) -> Norm:
    return Norm(config.norm, config.dyt_alpha)
