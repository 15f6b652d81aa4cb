"""Text from a trained objective, one token after the other.

Prompts of any lengths are encoded once, into a cache of constant shape; each new token
costs one predicted position and one encoded token. What one prompt becomes does not
depend on the others: its draws are a function of (seed, its index, position).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ebt_jax.errors import UserError
from ebt_jax.objectives import Decoder, Objective
from ebt_jax.refine import PyTree


class Codec(Protocol):
    """What generation needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        ...

    def encode(self, text: str, /) -> np.ndarray:
        """Token ids `[tokens]` of a text."""
        ...

    def decode(self, ids: np.ndarray, /) -> str:
        """The text of token ids `[tokens]`."""
        ...


class Sampling(NamedTuple):
    """How a token is chosen from its logits. Static: part of the compiled program.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      top_k: only the k most likely tokens can be drawn; 0 for all.
      top_p: only the most likely tokens that together reach this probability can be
        drawn, at least one; 1 for all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


def generate(
    objective: Objective,
    params: PyTree,
    tokenizer: Codec,
    prompts: Sequence[str],
    *,
    context: int,
    new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    num_steps: int = 0,
    stop_token: int | str | None = None,
) -> list[str]:
    """Continues texts.

    When the context is full, its older half is forgotten and the rest is encoded anew,
    at positions that start from 0 again.

    Args:
      objective: predicts logits `[batch, seq, vocab]`.
      params: its parameters.
      tokenizer: the one of the training data.
      prompts: texts to continue, each of at least one token.
      context: tokens that the model sees.
      new_tokens: how many tokens to add, at most.
      temperature: see `Sampling`.
      top_k: see `Sampling`.
      top_p: see `Sampling`.
      seed: of initial candidates, noise and sampling.
      num_steps: refinement steps per token; 0 for the trained number.
      stop_token: a token, or the text of one, that ends a continuation.

    Returns:
      Each prompt with its continuation, without the stop token.

    Raises:
      UserError: for a prompt without tokens or longer than the context, a sampling
        setting out of its range, or a stop token that is not one token.
    """
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    for prompt, tokens in zip(prompts, ids, strict=True):
        if not len(tokens):
            raise UserError(
                f"the prompt {prompt!r} has no tokens, but a continuation starts from "
                "at least one; a newline will do"
            )
    added = generate_ids(
        objective,
        params,
        ids,
        context=context,
        new_tokens=new_tokens,
        sampling=Sampling(temperature, top_k, top_p),
        seed=seed,
        num_steps=num_steps,
        stop_id=_stop_id(tokenizer, stop_token),
        vocab_size=tokenizer.vocab_size,
    )
    # Decoded together: a character may have begun in the prompt.
    return [
        tokenizer.decode(np.concatenate([prompt, new]))
        for prompt, new in zip(ids, added, strict=True)
    ]


def generate_ids(
    objective: Objective,
    params: PyTree,
    prompts: Sequence[np.ndarray],
    *,
    context: int,
    new_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    num_steps: int = 0,
    stop_id: int | None = None,
    vocab_size: int | None = None,
    indices: Sequence[int] | None = None,
) -> list[np.ndarray]:
    """Continues sequences of token ids.

    Args:
      objective: predicts logits `[batch, seq, vocab]`.
      params: its parameters.
      prompts: token ids, `[tokens]` each.
      context: tokens that the model sees; when it is full, as in `generate`.
      new_tokens: how many tokens to add, at most.
      sampling: how tokens are chosen.
      seed: of initial candidates, noise and sampling.
      num_steps: refinement steps per token; 0 for the trained number.
      stop_id: the token that ends a continuation.
      vocab_size: only tokens below this are chosen; None for all the model has.
      indices: a number that names each prompt; default 0, 1, ... A prompt's draws
        depend on its number and not on the rest of the batch.

    Returns:
      The new tokens of each prompt, int32 `[at most new_tokens]`, no stop token.

    Raises:
      UserError: for an empty or too long prompt, or a setting out of its range.
    """
    _check(prompts, context, new_tokens, sampling)
    if not prompts:
        return []
    windows = [list(prompt) for prompt in prompts]
    names = np.arange(len(prompts)) if indices is None else np.asarray(indices)
    names = names.astype(np.int32)
    key = jax.random.key(seed)
    stopped = np.zeros(len(prompts), bool)
    columns = []
    cache = _prefill(params, windows, context, objective)
    for made in range(new_tokens):
        total = np.array([len(prompt) + made for prompt in prompts], np.int32)
        chosen = np.asarray(
            _next_token(
                params,
                cache,
                names,
                total,
                key,
                objective,
                num_steps,
                sampling,
                vocab_size,
            )
        )
        if stop_id is not None:
            stopped |= chosen == stop_id
        columns.append(np.where(stopped, -1, chosen))
        if stopped.all() or made == new_tokens - 1:
            break
        full = any(len(window) == context for window in windows)
        for window, token in zip(windows, chosen, strict=True):
            if len(window) == context:
                del window[: (context + 1) // 2]
            window.append(int(token))
        if full:
            cache = _prefill(params, windows, context, objective)
        else:
            cache = _append(params, cache, chosen, objective)
    added = np.stack(columns, axis=1)
    return [row[row >= 0] for row in added]


def _prefill(
    params: PyTree, windows: list[list[int]], context: int, objective: Objective
) -> PyTree:
    tokens = np.zeros((len(windows), context), np.int32)
    for row, window in zip(tokens, windows, strict=True):
        row[: len(window)] = window
    lengths = np.array([len(window) for window in windows], np.int32)
    return _encode(params, tokens, lengths, objective)


def _decoder(objective: Objective) -> Decoder:
    if objective.decoder is None:
        raise ValueError("the objective has no decoder; its model cannot generate")
    return objective.decoder


@functools.partial(jax.jit, static_argnames="objective")
def _encode(
    params: PyTree, tokens: jax.Array, lengths: jax.Array, objective: Objective
) -> PyTree:
    return _decoder(objective).prefill(params, tokens, lengths)


@functools.partial(jax.jit, static_argnames="objective", donate_argnames="cache")
def _append(
    params: PyTree, cache: PyTree, tokens: jax.Array, objective: Objective
) -> PyTree:
    return _decoder(objective).append(params, cache, tokens)


@functools.partial(
    jax.jit, static_argnames=("objective", "num_steps", "sampling", "vocab_size")
)
def _next_token(
    params: PyTree,
    cache: PyTree,
    index: jax.Array,
    total: jax.Array,
    key: jax.Array,
    objective: Objective,
    num_steps: int,
    sampling: Sampling,
    vocab_size: int | None,
) -> jax.Array:
    """The token after each sequence, which has `total` tokens so far; `[batch]`."""
    predict_key, sample_key = jax.random.split(key)
    predict = _decoder(objective).predict
    logits = predict(params, cache, index, predict_key, num_steps)
    fold = jax.vmap(jax.random.fold_in)
    keys = fold(fold(jnp.broadcast_to(sample_key, index.shape), index), total)
    return choose(logits[:, :vocab_size], keys, sampling)


def choose(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """Chooses tokens.

    Args:
      logits: `[batch, vocab]`; filtered and drawn from in float32.
      keys: one PRNG key for each row, `[batch]`.
      sampling: how. Top-p counts what top-k leaves, at the given temperature.

    Returns:
      Tokens, int32 `[batch]`.
    """
    logits = logits.astype(jnp.float32)
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    vocab = logits.shape[-1]
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (vocab,)))(keys)
    ranked, tokens = jax.lax.top_k(
        logits / sampling.temperature, min(sampling.top_k or vocab, vocab)
    )
    # Noise belongs to the token, not to its rank: a near tie cannot change the draw.
    noisy = ranked + jnp.take_along_axis(noise, tokens, axis=-1)
    if sampling.top_p < 1:
        # A token stays while those before it have not reached top_p; the first does.
        shares = jax.nn.softmax(ranked)
        kept = jnp.cumsum(shares, axis=-1) - shares < sampling.top_p
        noisy = jnp.where(kept, noisy, -jnp.inf)
    best = jnp.argmax(noisy, axis=-1)
    return jnp.take_along_axis(tokens, best[:, None], axis=-1)[:, 0].astype(jnp.int32)


def _check(
    prompts: Sequence[np.ndarray], context: int, new_tokens: int, sampling: Sampling
) -> None:
    for number, prompt in enumerate(prompts, 1):
        if not len(prompt):
            raise UserError(f"prompt {number} is empty, but needs at least one token")
        if len(prompt) > context:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens, but the model's context "
                f"has {context}; shorten the prompt"
            )
    if new_tokens < 1:
        raise UserError(f"new_tokens is {new_tokens}, but has to be at least 1")
    if not sampling.temperature >= 0:
        raise UserError(
            f"temperature is {sampling.temperature}, but cannot be negative; 0 always "
            "takes the most likely token"
        )
    if sampling.top_k < 0:
        raise UserError(
            f"top_k is {sampling.top_k}, but cannot be negative; 0 allows every token"
        )
    if not 0 < sampling.top_p <= 1:
        raise UserError(
            f"top_p is {sampling.top_p}, but has to be above 0 and at most 1; 1 allows "
            "every token"
        )


def _stop_id(tokenizer: Codec, stop: int | str | None) -> int | None:
    if stop is None:
        return None
    if isinstance(stop, str):
        ids = tokenizer.encode(stop)
        if len(ids) != 1:
            raise UserError(
                f"the stop token {stop!r} is {len(ids)} tokens, but has to be one"
            )
        return int(ids[0])
    if not 0 <= stop < tokenizer.vocab_size:
        raise UserError(
            f"the stop token is {stop}, but tokens go from 0 to "
            f"{tokenizer.vocab_size - 1}"
        )
    return stop
