"""Speculative decoding: a cheap model writes ahead, the energy model checks.

The draft proposes some tokens, each its likeliest. The energy model refines what
follows each of them together, in the time of one token: its draws belong to positions
(see `randomness.prediction_keys`), so it finds what it would have found token by token.
Proposals are kept up to the first that it would not have chosen, whose place its own
choice takes; a token is made in any case. So the text is that of greedy decoding, and
the draft decides about nothing but the time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebt_jax.errors import UserError
from ebt_jax.evaluation.decoding import decoder_of
from ebt_jax.evaluation.generation import Continued, check_prompts, prefill
from ebt_jax.evaluation.sampling import Sampling
from ebt_jax.interfaces import Decoder, Objective, Rewinding
from ebt_jax.refine import PyTree
from ebt_jax.thinking import AS_TRAINED, Effort, Thinking, check_thinking


class Draft(NamedTuple):
    """What writes ahead.

    Attributes:
      objective: predicts logits over the same vocabulary, best in one pass.
      params: its parameters.
      tokens: how many it proposes at a time, at least 1.
    """

    objective: Objective
    params: PyTree
    tokens: int = 4


class Speculated(NamedTuple):
    """Continued sequences, and how the draft did.

    Attributes:
      continued: one for each prompt. All tokens that were checked together share what
        that took: it is counted where they begin, with the proposals that were refused.
      rounds: how often the energy model was asked for a prediction's sake, each prompt.
      proposed: tokens that the draft proposed, each prompt.
      accepted: how many of them the energy model would have chosen.
    """

    continued: list[Continued]
    rounds: np.ndarray
    proposed: np.ndarray
    accepted: np.ndarray


def speculate_ids(
    objective: Objective,
    params: PyTree,
    draft: Draft,
    prompts: Sequence[np.ndarray],
    *,
    context: int,
    new_tokens: int,
    thinking: Thinking = AS_TRAINED,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
    vocab_size: int | None = None,
    on_tokens: Callable[[int, np.ndarray], None] | None = None,
) -> Speculated:
    """What `generate_ids` makes at temperature 0, sooner where the draft is good.

    Args:
      objective: an energy model's.
      params: its parameters.
      draft: what writes ahead.
      prompts: as in `generate_ids`.
      context: as in `generate_ids`; the draft sees the same tokens.
      new_tokens: as in `generate_ids`.
      thinking: as in `generate_ids`.
      seed: as in `generate_ids`.
      stop_ids: as in `generate_ids`.
      vocab_size: as in `generate_ids`.
      on_tokens: as in `generate_ids`.

    Raises:
      UserError: for an empty or too long prompt, a setting out of its range, or models
        that cannot do it.
    """
    check_prompts(prompts, context, new_tokens, 1)
    check_thinking(thinking)
    if draft.tokens < 1:
        raise UserError(
            f"the draft proposes {draft.tokens} tokens, but needs 1 or more"
        )
    decoders = decoder_of(objective), decoder_of(draft.objective)
    if decoders[0].predict_at is None:
        raise UserError(
            "a draft is for an energy model that checks several tokens together, which "
            "this model does not; leave the draft out"
        )
    if decoders[1].rewinding is None:
        raise UserError("the draft's tokens cannot be taken back; give another draft")
    both = tuple(
        decoder.prepare(p)
        for decoder, p in zip(decoders, (params, draft.params), strict=True)
    )
    windows = [[int(token) for token in prompt] for prompt in prompts]
    begin = [len(window) for window in windows]
    texts = [list(window) for window in windows]
    rows = len(windows)
    rounds, proposed, accepted = (np.zeros(rows, np.int64) for _ in range(3))
    efforts: list[list[np.ndarray]] = [[] for _ in windows]
    running = np.ones(rows, bool)
    capacity = context + draft.tokens + 1
    if on_tokens is not None:
        for row in range(rows):
            on_tokens(row, np.zeros(0, np.int32))

    def encoded() -> tuple[PyTree, PyTree]:
        objectives = objective, draft.objective
        pairs = zip(both, objectives, strict=True)
        ours, theirs = (prefill(p, windows, capacity, o, 1) for p, o in pairs)
        return ours, theirs

    caches = encoded() if rows else None
    while running.any():
        caches, made, count, right, effort = _round(
            both,
            caches,
            np.arange(rows, dtype=np.int32),
            running,
            jax.random.key(seed),
            objectives=(objective, draft.objective),
            ahead=draft.tokens,
            context=context,
            thinking=thinking,
            vocab_size=vocab_size,
        )
        made, count, right, effort = jax.device_get((made, count, right, effort))
        for row in np.flatnonzero(running):
            new = made[row, : count[row]].tolist()
            windows[row].extend(new)
            rounds[row] += 1
            proposed[row] += draft.tokens
            accepted[row] += right[row]
            stop = next((i for i, t in enumerate(new) if t in stop_ids), len(new))
            room = new_tokens - (len(texts[row]) - begin[row])
            kept = new[: min(stop, room)]
            running[row] = stop == len(new) and len(new) < room
            texts[row].extend(kept)
            # All but the first come for nothing.
            spent = np.zeros((len(Effort._fields), len(kept)), np.int32)
            spent[0, :] = effort.num_steps[row, : len(kept)]
            if len(kept):
                spent[1:, 0] = [x[row].sum() for x in effort[1:]]
            efforts[row].append(spent)
            if on_tokens is not None and kept:
                on_tokens(int(row), np.array(kept, np.int32))
        full = [row for row in np.flatnonzero(running) if len(windows[row]) > context]
        for row in full:
            del windows[row][: (context + 1) // 2]
        if full:
            caches = encoded()
    continued = [
        Continued(
            np.array(text[start:], np.int32), Effort(*np.concatenate(spent, axis=1))
        )
        for text, start, spent in zip(texts, begin, efforts, strict=True)
    ]
    return Speculated(continued, rounds, proposed, accepted)


def with_draft(draft: Draft) -> Callable[..., list[Continued]]:
    """`speculate_ids` for those who call `generate_ids`, whose arguments it takes.

    It raises a UserError for sampling that is not greedy and for several samples.
    """

    def make(
        objective: Objective,
        params: PyTree,
        prompts: Sequence[np.ndarray],
        *,
        sampling: Sampling,
        samples: int = 1,
        **options: Any,
    ) -> list[Continued]:
        if sampling.temperature != 0 or samples != 1:
            raise UserError(
                f"temperature is {sampling.temperature:g} and samples is {samples}, "
                "but a draft only helps to take the likeliest token; make them 0 and 1"
            )
        made = speculate_ids(objective, params, draft, prompts, **options)
        return made.continued

    return make


@functools.partial(
    jax.jit,
    static_argnames=("objectives", "ahead", "context", "thinking", "vocab_size"),
    donate_argnums=1,
)
def _round(
    params: tuple[PyTree, PyTree],
    caches: tuple[PyTree, PyTree],
    index: jax.Array,
    running: jax.Array,
    key: jax.Array,
    *,
    objectives: tuple[Objective, Objective],
    ahead: int,
    context: int,
    thinking: Thinking,
    vocab_size: int | None,
) -> tuple[tuple[PyTree, PyTree], jax.Array, jax.Array, jax.Array, Effort]:
    """Proposes, checks, keeps what is right and adds a token.

    Returns:
      The caches; tokens `[batch, ahead + 1]`, how many of them count and how many of
      those were proposed, `[batch]`; what each prediction took `[batch, ahead + 1]`.
    """
    ours, theirs = (decoder_of(objective) for objective in objectives)
    assert ours.predict_at is not None
    predict_key, _ = jax.random.split(key)  # as in `decoding.extend`
    likeliest = lambda logits: jnp.argmax(logits[..., :vocab_size], axis=-1)

    def propose(cache: PyTree, _: None) -> tuple[PyTree, tuple[jax.Array, PyTree]]:
        logits = theirs.predict(params[1], cache, index, predict_key, AS_TRAINED)
        token = likeliest(logits.candidate).astype(jnp.int32)
        return theirs.append(params[1], cache, token), (token, _mark(theirs, cache))

    written, (draft, their_marks) = jax.lax.scan(propose, caches[1], None, length=ahead)
    their_marks = _with_end(their_marks, _mark(theirs, written))

    def follow(cache: PyTree, token: jax.Array) -> tuple[PyTree, PyTree]:
        return ours.append(params[0], cache, token), _mark(ours, cache)

    read, our_marks = jax.lax.scan(follow, caches[0], draft)
    our_marks = _with_end(our_marks, _mark(ours, read))
    thought = ours.predict_at(params[0], read, our_marks, index, predict_key, thinking)
    chosen = likeliest(thought.candidate).astype(jnp.int32)
    right = jnp.cumprod(chosen[:, :-1] == draft.T, axis=1).sum(axis=1)
    # A full context is encoded anew before the next token is predicted.
    lengths = _rewinding(ours).lengths(our_marks)[0]
    right = jnp.where(running, jnp.minimum(right, context - lengths), 0)
    token = jnp.take_along_axis(chosen, right[:, None], axis=1)[:, 0]

    def settle(decoder: Decoder, params: PyTree, cache: PyTree, marks: PyTree):
        """Ends each sequence behind what is right, and a token more where it runs."""
        at = jax.tree.map(lambda x: x[right, jnp.arange(len(right))], marks)
        cache = _rewinding(decoder).restore(cache, at)
        cache = decoder.append(params, cache, token)
        end = _mark(decoder, cache)
        keep = lambda new, old: jnp.where(
            running.reshape(-1, *(1,) * (new.ndim - 1)), new, old
        )
        return _rewinding(decoder).restore(cache, jax.tree.map(keep, end, at))

    settled = (
        settle(ours, params[0], read, our_marks),
        settle(theirs, params[1], written, their_marks),
    )
    return settled, chosen, right + 1, right, thought.effort


def _rewinding(decoder: Decoder) -> Rewinding:
    assert decoder.rewinding is not None  # the caller has looked
    return decoder.rewinding


def _mark(decoder: Decoder, cache: PyTree) -> PyTree:
    return _rewinding(decoder).mark(cache)


def _with_end(marks: PyTree, end: PyTree) -> PyTree:
    """Stacked marks and one more."""
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y[None]]), marks, end)
