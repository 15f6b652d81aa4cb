"""Packing: from joined tokens to sequences of one length.

A sequence is made of spans of the joined tokens. A span of n + 1 tokens fills n slots:
its first n tokens as inputs, its last n as their targets; what is left of the sequence
is padding of weight 0. So a target never lies in another document than its input,
except in `concat`, where that is what is wanted.

========= ==============================================================================
packing   spans
========= ==============================================================================
concat    one per sequence, cut from all documents joined; consecutive spans share a
          token, so every token but the first is a target exactly once
first_fit documents, longer ones cut as above, put into the first sequence with enough
          room; each is a segment with its own positions
document  one per sequence: a document cut off after context + 1 tokens (the paper's)
========= ==============================================================================

First-fit is planned once, from the documents' lengths. Grain's packing iterators do it
while reading, and then a sequence has no number, and processes, each packing its share
of the documents, would end an epoch after different numbers of batches.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from ebt_jax.data.corpus import Tokens

_OPEN_SEQUENCES = 64  # that first-fit keeps filling at a time


class Plan(NamedTuple):
    """Which spans make up each sequence.

    Attributes:
      starts: first token of each span, int64 `[spans]`.
      stops: the token after its last, int64 `[spans]`.
      firsts: sequence i has the spans firsts[i] to firsts[i + 1], int64
        `[sequences + 1]`.
    """

    starts: np.ndarray
    stops: np.ndarray
    firsts: np.ndarray


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Sequences with random access, as Grain wants a source of data.

    Attributes:
      tokens: what the plan refers to.
      plan: which spans make up each sequence.
      context: length of a sequence.
      pad_id: the token that fills it up.
      segmented: whether examples have segments and positions.
      token_bytes: int32 `[vocab]`, or None: whether examples have bytes.
    """

    tokens: Tokens
    plan: Plan
    context: int
    pad_id: int
    segmented: bool
    token_bytes: np.ndarray | None

    def __len__(self) -> int:
        return len(self.plan.firsts) - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One example, see `ebt_jax.data.pipeline` for its arrays."""
        tokens = np.full(self.context, self.pad_id, np.int32)
        targets = tokens.copy()
        segments = np.zeros(self.context, np.int32)
        positions = np.zeros(self.context, np.int32)
        slot = 0
        spans = range(self.plan.firsts[index], self.plan.firsts[index + 1])
        for segment, span in enumerate(spans, 1):
            ids = self.tokens.read(
                int(self.plan.starts[span]), int(self.plan.stops[span])
            )
            slots = slice(slot, slot + len(ids) - 1)
            tokens[slots] = ids[:-1]
            targets[slots] = ids[1:]
            segments[slots] = segment
            positions[slots] = np.arange(len(ids) - 1)
            slot = slots.stop
        weights = (segments > 0).astype(np.float32)
        example = {
            "tokens": tokens,
            "targets": targets,
            "weights": weights,
            "index": np.array(index, np.int32),
        }
        if self.segmented:
            example |= {"segments": segments, "positions": positions}
        if self.token_bytes is not None:
            example["bytes"] = self.token_bytes[targets].astype(np.float32) * weights
        return example


def make_plan(tokens: Tokens, packing: str, context: int) -> Plan:
    """Plans sequences; documents that leave nothing to predict are left out.

    Args:
      tokens: the joined documents.
      packing: see the module docstring.
      context: slots of a sequence.
    """
    total = int(tokens.ends[-1]) if len(tokens.ends) else 0
    if packing == "concat":
        starts, stops = _cut(np.zeros(1, np.int64), np.array([total]), context)
    else:
        starts = np.concatenate([np.zeros(1, np.int64), tokens.ends[:-1]])
        stops = tokens.ends
        if packing == "document":
            # The published form has no end token: its padding is that token, ignored.
            stops = np.minimum(stops - int(tokens.separated), starts + context + 1)
            starts, stops = starts[stops - starts > 1], stops[stops - starts > 1]
        else:
            starts, stops = _cut(starts, stops, context)
            return _first_fit(starts, stops, context)
    return Plan(starts, stops, np.arange(len(starts) + 1))


def _cut(
    starts: np.ndarray, stops: np.ndarray, context: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts spans into ones of at most context + 1 tokens, neighbours sharing one."""
    pieces = np.maximum(-(-(stops - starts - 1) // context), 0)
    # Number of each piece in its own span: 0 1 2, 0, 0 1, ...
    number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    first = np.repeat(starts, pieces) + number * context
    return first, np.minimum(first + context + 1, np.repeat(stops, pieces))


def _first_fit(starts: np.ndarray, stops: np.ndarray, context: int) -> Plan:
    """Puts each span into the first open sequence with room for it."""
    room = np.full(_OPEN_SEQUENCES, context)
    members: list[list[int]] = [[] for _ in range(_OPEN_SEQUENCES)]
    done = []
    for span, size in enumerate((stops - starts - 1).tolist()):
        chosen = int(np.argmax(room >= size))
        if room[chosen] < size:  # fits nowhere: the fullest sequence makes way
            chosen = int(np.argmin(room))
            done.append(members[chosen])
            members[chosen], room[chosen] = [], context
        members[chosen].append(span)
        room[chosen] -= size
    done += [spans for spans in members if spans]
    order = np.array([span for spans in done for span in spans], np.int64)
    firsts = np.cumsum([0] + [len(spans) for spans in done])
    return Plan(starts[order], stops[order], firsts)
