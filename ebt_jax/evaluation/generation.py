"""Text from a trained objective, one token after the other.

Prompts of any lengths are encoded once and continued by the loop in `decoding.py`; what
is here looks in only to hand on what was made and to make room in a full context. What
one prompt becomes does not depend on the others: its draws are a function of (seed, its
index, position).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax
import numpy as np

from ebt_jax.errors import UserError
from ebt_jax.evaluation.decoding import NONE, PIECE, decoder_of, encode, extend
from ebt_jax.evaluation.sampling import Sampling, check_sampling
from ebt_jax.interfaces import Objective
from ebt_jax.refine import PyTree
from ebt_jax.thinking import AS_TRAINED, Effort, Thinking, check_thinking

STREAMED_PIECE = 4  # tokens made at a time where somebody waits for them
SHORTEST = 64  # tokens to which shorter prompts are filled up; then powers of two


class Codec(Protocol):
    """What generation needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        ...

    def encode(self, text: str, /) -> np.ndarray:
        """Token ids `[tokens]` of a text."""
        ...

    def decode(self, ids: Sequence[int], /) -> str:
        """The text of token ids."""
        ...


class Continued(NamedTuple):
    """How a sequence of tokens goes on.

    Attributes:
      tokens: the new ones, int32 `[at most new_tokens]`, no stop token.
      effort: what each took, int32; nothing for a feed-forward model.
    """

    tokens: np.ndarray
    effort: Effort

    @property
    def num_steps(self) -> np.ndarray:
        """Refinement steps of each token, int32; 0 for a feed-forward model."""
        return np.asarray(self.effort.num_steps)


class Continuation(NamedTuple):
    """How a text goes on.

    Attributes:
      prompt: what is continued.
      sample: 0 for the prompt's first continuation, 1 for its second, ...
      text: the prompt with its continuation, without the stop token.
      tokens: see `Continued`.
      effort: see `Continued`.
    """

    prompt: str
    sample: int
    text: str
    tokens: np.ndarray
    effort: Effort

    @property
    def num_steps(self) -> np.ndarray:
        """Refinement steps of each token, int32; 0 for a feed-forward model."""
        return np.asarray(self.effort.num_steps)


def generate(
    objective: Objective,
    params: PyTree,
    tokenizer: Codec,
    prompts: Sequence[str],
    *,
    context: int,
    new_tokens: int,
    sampling: Sampling,
    thinking: Thinking = AS_TRAINED,
    samples: int = 1,
    seed: int = 0,
    stop_tokens: Sequence[int | str] = (),
    on_text: Callable[[int, str], None] | None = None,
    make: Callable[..., list[Continued]] | None = None,
) -> list[Continuation]:
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
      sampling: how tokens are chosen.
      thinking: how the prediction of each is refined.
      samples: continuations of each prompt.
      seed: of initial candidates, noise and sampling.
      stop_tokens: tokens, or texts of one token, that end a continuation.
      on_text: called with the place of a continuation in the result and the next piece
        of its text, prompt included, as soon as a few tokens are there. Bytes of an
        unfinished character wait for the others.
      make: what continues token ids, `speculation.with_draft` for one; None for
        `generate_ids`, whose arguments it has to take.

    Returns:
      All continuations of the first prompt, then all of the second, ...

    Raises:
      UserError: for a prompt without tokens or longer than the context, a setting out
        of its range, or a stop token that is not one token.
    """
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    for prompt, tokens in zip(prompts, ids, strict=True):
        if not len(tokens):
            raise UserError(
                f"the prompt {prompt!r} has no tokens, but a continuation starts from "
                "at least one; a newline will do"
            )
    # Decoded together: a character may have begun in the prompt.
    whole = [list(tokens) for tokens in ids for _ in range(samples)]
    shown = [""] * len(whole)

    def show(row: int, text: str) -> None:
        if on_text is not None and len(text) > len(shown[row]):
            on_text(row, text[len(shown[row]) :])
            shown[row] = text

    def on_tokens(row: int, tokens: np.ndarray) -> None:
        whole[row].extend(tokens)
        # An unfinished character decodes to U+FFFD.
        show(row, tokenizer.decode(whole[row]).rstrip("\N{REPLACEMENT CHARACTER}"))

    continued = (generate_ids if make is None else make)(
        objective,
        params,
        ids,
        context=context,
        new_tokens=new_tokens,
        sampling=sampling,
        thinking=thinking,
        samples=samples,
        seed=seed,
        stop_ids=[_stop_id(tokenizer, stop) for stop in stop_tokens],
        vocab_size=tokenizer.vocab_size,
        on_tokens=None if on_text is None else on_tokens,
    )
    made = []
    for row, new in enumerate(continued):
        prompt, sample = divmod(row, samples)
        text = tokenizer.decode([*ids[prompt], *new.tokens])
        show(row, text)
        made.append(Continuation(prompts[prompt], sample, text, *new))
    return made


def generate_ids(
    objective: Objective,
    params: PyTree,
    prompts: Sequence[np.ndarray],
    *,
    context: int,
    new_tokens: int,
    sampling: Sampling,
    thinking: Thinking = AS_TRAINED,
    samples: int = 1,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
    vocab_size: int | None = None,
    indices: Sequence[int] | None = None,
    on_tokens: Callable[[int, np.ndarray], None] | None = None,
) -> list[Continued]:
    """Continues sequences of token ids.

    Args:
      objective: predicts logits `[batch, seq, vocab]`.
      params: its parameters.
      prompts: token ids, `[tokens]` each.
      context: tokens that the model sees; when it is full, as in `generate`.
      new_tokens: how many tokens to add, at most.
      sampling: how tokens are chosen.
      thinking: how the prediction of each is refined.
      samples: continuations of each prompt.
      seed: of initial candidates, noise and sampling.
      stop_ids: tokens that end a continuation.
      vocab_size: only tokens below this are chosen; None for all the model has.
      indices: a number that names each prompt; default 0, 1, ... The draws of its
        continuation m depend on number * samples + m and not on the rest of the batch.
      on_tokens: called with the place of a continuation in the result and its next
        tokens, as soon as a few are there; first with none, before anything is
        computed.

    Returns:
      All continuations of the first prompt, then all of the second, ...

    Raises:
      UserError: for an empty or too long prompt, or a setting out of its range.
    """
    check_prompts(prompts, context, new_tokens, samples)
    check_sampling(sampling)
    check_thinking(thinking)
    if not prompts:
        return []
    numbers = np.arange(len(prompts)) if indices is None else np.asarray(indices)
    index = (numbers[:, None] * samples + np.arange(samples)).reshape(-1)
    windows = [[int(token) for token in prompt] for prompt in prompts]
    params = decoder_of(objective).prepare(params)
    step = functools.partial(
        extend,
        params=params,
        index=index.astype(np.int32),
        key=jax.random.key(seed),
        stop_ids=np.array(stop_ids, np.int32),
        objective=objective,
        context=context,
        thinking=thinking,
        sampling=sampling,
        vocab_size=vocab_size,
    )
    if on_tokens is not None:
        for row in range(len(index)):
            on_tokens(row, np.zeros(0, np.int32))
    cache = prefill(params, windows, context, objective, samples)
    windows = [list(window) for window in windows for _ in range(samples)]
    total = np.array([len(window) for window in windows], np.int32)
    stopped = np.zeros(len(windows), bool)
    pieces = []
    made = 0
    while True:
        limit = min(PIECE if on_tokens is None else STREAMED_PIECE, new_tokens - made)
        length = np.array([len(window) for window in windows], np.int32)
        cache, *piece = step(
            cache=cache,
            length=length,
            total=total + np.int32(made),
            stopped=stopped,
            limit=np.int32(limit),
        )
        tokens, effort, stopped, count = jax.device_get(piece)
        made += int(count)
        pieces.append((tokens[:, :count], *(x[:, :count] for x in effort)))
        for row, window in enumerate(windows):
            new = tokens[row, :count]
            new = new[new != NONE]
            window.extend(new.tolist())
            if on_tokens is not None and len(new):
                on_tokens(row, new)
        if made == new_tokens or stopped.all():
            break
        full = [window for window in windows if len(window) > context]
        for window in full:
            del window[: (context + 1) // 2]
        if full:
            cache = prefill(params, windows, context, objective, samples=1)
    tokens, *effort = (
        np.concatenate(part, axis=1) for part in zip(*pieces, strict=True)
    )
    return [
        Continued(row[row != NONE], Effort(*(x[row != NONE] for x in of_row)))
        for row, *of_row in zip(tokens, *effort, strict=True)
    ]


def prefill(
    params: PyTree,
    windows: list[list[int]],
    context: int,
    objective: Objective,
    samples: int,
) -> PyTree:
    # Of few widths, since each is compiled.
    longest = max(map(len, windows))
    width = min(context, max(SHORTEST, 1 << (longest - 1).bit_length()))
    tokens = np.zeros((len(windows), width), np.int32)
    for row, window in zip(tokens, windows, strict=True):
        row[: len(window)] = window
    lengths = np.array([len(window) for window in windows], np.int32)
    return encode(params, tokens, lengths, objective, samples, context)


def check_prompts(
    prompts: Sequence[np.ndarray], context: int, new_tokens: int, samples: int
) -> None:
    for number, prompt in enumerate(prompts, 1):
        if not len(prompt):
            raise UserError(f"prompt {number} is empty, but needs at least one token")
        if len(prompt) > context:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens, but the model's context "
                f"has {context}; shorten the prompt"
            )
    for name, value in (("new_tokens", new_tokens), ("samples", samples)):
        if value < 1:
            raise UserError(f"{name} is {value}, but has to be at least 1")


def _stop_id(tokenizer: Codec, stop: int | str) -> int:
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
