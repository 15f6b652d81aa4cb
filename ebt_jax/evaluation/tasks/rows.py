"""Items as sequences of tokens: where an answer begins, what is cut, how rows batch.

The boundary between prompt and answer falls between two tokens. Where the tokens of
both together begin with those of the prompt, they are taken as they are; where a token
would lie across the boundary, prompt and answer are encoded apart. Bytes never do that;
a BPE tokenizer seldom, as the space before a word is a part of its token and of the
answer.

A sequence longer than the context loses the left of its prompt, and never any of its
answer. An answer longer than the context is scored in several windows, each of which
sees half a context of what comes before it.

A row is padded on the right, where nothing looks, to a width that depends on its own
length alone. So the rows that it shares a batch with do not change its scores.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ebt_jax.data.tokenizers import Tokenizer

_NARROWEST = 32  # tokens; then powers of two


class Row(NamedTuple):
    """Tokens, a part of which is scored.

    Attributes:
      tokens: int32 `[at most context + 1]`.
      scored: tokens from this one on are scored, at least 1: nothing predicts the
        first.
      answer: those from this one on belong to the answer.
      index: what is drawn for a prediction depends on this and its place.
      kinds: int `[as many]`, numbers that tell tokens apart, -1 for none; or None.
    """

    tokens: np.ndarray
    scored: int
    answer: int
    index: int
    kinds: np.ndarray | None = None


class Pair(NamedTuple):
    """A prompt and an answer.

    Attributes:
      prompt: its tokens, int32.
      answer: its tokens, int32.
      apart: whether a token would lie across the boundary.
      kinds: of the tokens of both, as in `Row`.
    """

    prompt: np.ndarray
    answer: np.ndarray
    apart: bool
    kinds: np.ndarray | None = None


def encode_pair(tokenizer: Tokenizer, prompt: str, answer: str) -> Pair:
    """Tokens of a prompt and of its answer."""
    before, whole = tokenizer.encode(prompt), tokenizer.encode(prompt + answer)
    if len(whole) > len(before) and np.array_equal(whole[: len(before)], before):
        return Pair(before, whole[len(before) :], False)
    return Pair(before, tokenizer.encode(answer), True)


def windows(pair: Pair, context: int, name: str) -> list[Row]:
    """Rows in which each token of an answer is scored once.

    Args:
      pair: of which the prompt has at least one token.
      context: of the model.
      name: of the item; its rows draw the same numbers whatever the answer.
    """
    half = (context + 1) // 2
    room = context + 1 - len(pair.answer)
    kept = pair.prompt[-room if room > 0 else -half :]
    ids = np.concatenate([kept, pair.answer])
    kinds = None if pair.kinds is None else pair.kinds[-len(ids) :]
    rows = []
    for start in (0, *range(context + 1 - half, len(ids) - half, context + 1 - half)):
        begins = half if start else 1
        answer = half if start else len(kept)
        window = slice(start, start + context + 1)
        own = None if kinds is None else kinds[window]
        index = draw_index(name, len(rows))
        rows.append(Row(ids[window], begins, answer, index, own))
    return rows


def cut_tokens(pair: Pair, context: int) -> int:
    """Tokens of the prompt that `windows` leaves out."""
    rows = windows(pair, context, "")
    return len(pair.prompt) - rows[0].answer


def text_rows(ids: np.ndarray, context: int) -> list[Row]:
    """Rows of plain text; each token but the first is scored once.

    They are those of packing `concat`.
    """
    return [
        Row(window := ids[start : start + context + 1], 1, len(window), number)
        for number, start in enumerate(range(0, len(ids) - 1, context))
    ]


def draw_index(name: str, window: int) -> int:
    """A number for an item, whatever its place among others."""
    return zlib.crc32(f"{name}/{window}".encode()) & 0x7FFFFFFF


def batches(
    rows: Sequence[Row],
    batch_size: int,
    context: int,
    pad_id: int,
) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
    """Batches of rows of one width, the narrow ones first.

    Args:
      rows: in any order.
      batch_size: rows of every batch; the last of a width is filled up with weight 0.
      context: of the model, the largest width.
      pad_id: fills up rows.

    Yields:
      Places of the rows in `rows`, and arrays: `tokens`, `targets`, `weights` (1 for
      each token that is scored) and `answer` (1 for those of the answer), all
      `[batch_size, width]`, and `index` `[batch_size]`.
    """
    widths = [_width(len(row.tokens) - 1, context) for row in rows]
    for width in sorted(set(widths)):
        members = [place for place, w in enumerate(widths) if w == width]
        for start in range(0, len(members), batch_size):
            places = members[start : start + batch_size]
            chosen = [rows[place] for place in places]
            yield places, _arrays(chosen, batch_size, width, pad_id)


def _width(length: int, context: int) -> int:
    return min(context, max(_NARROWEST, 1 << (length - 1).bit_length()))


def _arrays(
    rows: list[Row], batch_size: int, width: int, pad_id: int
) -> dict[str, np.ndarray]:
    ids = np.full((batch_size, width + 1), pad_id, np.int32)
    weights = np.zeros((batch_size, width), np.float32)
    answer = np.zeros((batch_size, width), np.float32)
    index = np.zeros(batch_size, np.int32)
    for place, row in enumerate(rows):
        size = len(row.tokens)
        ids[place, :size] = row.tokens
        weights[place, row.scored - 1 : size - 1] = 1
        answer[place, row.answer - 1 : size - 1] = 1
        index[place] = row.index
    return {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "weights": weights,
        "answer": answer,
        "index": index,
    }
