"""Answers that a model generates, token by token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from ebt_jax.data.tokenizers import Tokenizer
from ebt_jax.evaluation.generation import generate_ids
from ebt_jax.evaluation.sampling import Sampling
from ebt_jax.evaluation.tasks.catalogue import Speaking
from ebt_jax.evaluation.tasks.rows import Pair, draw_index
from ebt_jax.interfaces import Objective
from ebt_jax.refine import PyTree
from ebt_jax.thinking import Thinking


def speak(
    objective: Objective,
    params: PyTree,
    tokenizer: Tokenizer,
    pairs: Sequence[Pair],
    names: Sequence[str],
    speaking: Speaking,
    *,
    context: int,
    batch_size: int,
    seed: int,
    thinking: Thinking,
    on_done: Callable[[int], object] = lambda count: None,
) -> list[str]:
    """Answers prompts, always with the likeliest token.

    Args:
      objective: what predicts.
      params: its parameters.
      tokenizer: of the prompts.
      pairs: prompts, and right answers, which say how many tokens text takes.
      names: of the items; draws depend on them.
      speaking: how long an answer may be.
      context: tokens that the model sees. A longer prompt loses its left, and makes
        room for the answer, up to half the context; in a full context the older half
        is forgotten.
      batch_size: prompts at once.
      seed: of initial candidates and noise.
      thinking: how much a prediction is refined.
      on_done: called with the number of prompts that have been answered.

    Returns:
      The text of each answer.
    """
    new = most_tokens(tokenizer, pairs, speaking)
    room = prompt_room(context, new)
    said = []
    for start in range(0, len(pairs), batch_size):
        group = pairs[start : start + batch_size]
        made = generate_ids(
            objective,
            params,
            [pair.prompt[-room:] for pair in group],
            context=context,
            new_tokens=new,
            sampling=Sampling(temperature=0.0),
            thinking=thinking,
            seed=seed,
            stop_ids=_ends(tokenizer, speaking.one_line),
            vocab_size=tokenizer.vocab_size,
            indices=[draw_index(name, 0) for name in names[start : start + batch_size]],
        )
        said += [tokenizer.decode(continued.tokens) for continued in made]
        on_done(len(group))
    return [_trimmed(text, speaking.one_line) for text in said]


def most_tokens(tokenizer: Tokenizer, pairs: Sequence[Pair], speaking: Speaking) -> int:
    """Tokens that `speaking.longest` bytes take, as dense as in the right answers."""
    if not speaking.longest:
        return max(len(pair.answer) for pair in pairs)
    tokens = np.concatenate([pair.answer for pair in pairs])
    size = max(int(tokenizer.token_bytes()[tokens].sum()), 1)
    return max(1, math.ceil(speaking.longest * len(tokens) / size))


def prompt_room(context: int, new: int) -> int:
    """Tokens that are left of a prompt."""
    return max(1, context // 2, context - new)


def _ends(tokenizer: Tokenizer, one_line: bool) -> list[int]:
    """Tokens that end an answer."""
    ends = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    if one_line:
        ids = range(tokenizer.vocab_size)
        ends += [i for i in ids if i not in ends and "\n" in tokenizer.decode([i])]
    return ends


def _trimmed(text: str, one_line: bool) -> str:
    """What was said before the model asked itself the next question."""
    text = text.partition("\nQuestion:")[0].strip()
    return text.partition("\n")[0].strip() if one_line else text
