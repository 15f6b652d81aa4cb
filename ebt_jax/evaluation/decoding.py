"""The loop that makes tokens, on the device.

A token costs one predicted position and one encoded token; the cache stays where it is.
One compiled program serves any number of tokens and any lengths of prompts.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from ebt_jax.evaluation.sampling import Sampling, choose
from ebt_jax.interfaces import Decoder, Objective
from ebt_jax.refine import PyTree
from ebt_jax.thinking import Effort, Thinking

PIECE = 32  # most tokens that one call makes
NONE = -1  # stands for the token of a sequence that has stopped


@functools.partial(jax.jit, static_argnames=("objective", "samples", "context"))
def encode(
    params: PyTree,
    tokens: jax.Array,
    lengths: jax.Array,
    objective: Objective,
    samples: int,
    context: int,
) -> PyTree:
    """Encodes sequences once.

    Args:
      params: the parameters.
      tokens: int32 `[batch, width]`, or frames `[batch, width, frame_size]`; anything
        behind the end of a sequence.
      lengths: int32 `[batch]`, at least 1 and at most width.
      objective: whose decoder encodes.
      samples: how often each sequence stands in the cache, in a row.
      context: capacity of the cache, tokens; at least width.

    Returns:
      The cache, of batch * samples sequences.
    """
    prefill = decoder_of(objective).prefill
    cache = prefill(params, tokens, lengths)

    def shapes(batch: int, width: int) -> PyTree:
        of = jax.ShapeDtypeStruct
        sequences = of((batch, width, *tokens.shape[2:]), tokens.dtype)
        return jax.eval_shape(prefill, params, sequences, of((batch,), lengths.dtype))

    # A cache is the model's own affair, but what grows with more sequences is the axis
    # of the batch, and what a longer sequence needs is room behind a shorter one.
    def room(x: jax.Array, larger: jax.ShapeDtypeStruct) -> jax.Array:
        missing = zip(x.shape, larger.shape, strict=True)
        return jnp.pad(x, [(0, m - n) for n, m in missing])

    def repeat(x: jax.Array, larger: jax.ShapeDtypeStruct) -> jax.Array:
        grows = [m > n for n, m in zip(x.shape, larger.shape, strict=True)]
        return jnp.repeat(x, samples, axis=grows.index(True)) if any(grows) else x

    batch = len(tokens)
    cache = jax.tree.map(room, cache, shapes(batch, context))
    if samples > 1:
        cache = jax.tree.map(repeat, cache, shapes(batch + 1, context))
    return cache


@functools.partial(
    jax.jit,
    static_argnames=("objective", "context", "thinking", "sampling", "vocab_size"),
    donate_argnames="cache",
)
def extend(
    *,
    params: PyTree,
    cache: PyTree,
    index: jax.Array,
    length: jax.Array,
    total: jax.Array,
    stopped: jax.Array,
    limit: jax.Array,
    key: jax.Array,
    stop_ids: jax.Array,
    objective: Objective,
    context: int,
    thinking: Thinking,
    sampling: Sampling,
    vocab_size: int | None,
) -> tuple[PyTree, jax.Array, Effort, jax.Array, jax.Array]:
    """Makes tokens until a limit, or until nothing can go on.

    Args:
      params: the parameters.
      cache: the encoded sequences; used up.
      index: what names each sequence, `[batch]`.
      length: tokens of each in the cache, `[batch]`.
      total: tokens of each that there ever were, `[batch]`.
      stopped: which sequences have ended, bool `[batch]`.
      limit: how many tokens to make of each; at most `PIECE` are made.
      key: the seed.
      stop_ids: tokens that end a sequence, `[any number]`.
      objective: whose decoder predicts.
      context: capacity of the cache. When a running sequence outgrows it, the cache is
        lost and the loop ends.
      thinking: how to predict.
      sampling: how to choose.
      vocab_size: only tokens below this are chosen; None for all.

    Returns:
      The cache, tokens `[batch, PIECE]` with `NONE` from where a sequence has stopped,
      what each took, `[batch, PIECE]`, `stopped`, and how many columns were made.
    """
    decoder = decoder_of(objective)
    predict_key, sample_key = jax.random.split(key)
    fold = jax.vmap(jax.random.fold_in)
    keys = fold(jnp.broadcast_to(sample_key, index.shape), index)
    columns = jnp.zeros((len(index), PIECE), jnp.int32)

    def goes_on(carry):
        _, _, _, stopped, made = carry
        lost = ~stopped & (length + made > context)
        return (made < jnp.minimum(limit, PIECE)) & ~stopped.all() & ~lost.any()

    def body(carry):
        cache, tokens, effort, stopped, made = carry
        thought = decoder.predict(params, cache, index, predict_key, thinking)
        logits = thought.candidate[:, :vocab_size]
        chosen = choose(logits, fold(keys, total + made), sampling)
        stopped |= (chosen[:, None] == stop_ids[None, :]).any(axis=1)
        tokens = tokens.at[:, made].set(jnp.where(stopped, NONE, chosen))
        effort = jax.tree.map(
            lambda all, new: all.at[:, made].set(new), effort, thought.effort
        )
        cache = decoder.append(params, cache, chosen)
        return cache, tokens, effort, stopped, made + 1

    efforts = Effort(columns, columns, columns)
    carry = (cache, columns, efforts, stopped, jnp.int32(0))
    return jax.lax.while_loop(goes_on, body, carry)


def decoder_of(objective: Objective) -> Decoder:
    """The decoder of an objective; a ValueError where there is none."""
    if objective.decoder is None:
        raise ValueError("the objective has no decoder; its model cannot generate")
    return objective.decoder
