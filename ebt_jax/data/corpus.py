"""A tokenized corpus, or the part of it that a run trains on or keeps for evaluation.

Which documents are held out depends on nothing but their number and `data.held_out`, so
a corpus splits the same way as text and as token shards. One document alone is cut: its
end is held out.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from typing import Protocol

import numpy as np
from tqdm import tqdm

from ebt_jax.data import sources
from ebt_jax.data.config import DataConfig
from ebt_jax.data.tokenizers import Tokenizer
from ebt_jax.errors import UserError

SPLITS = ("train", "held_out", "all")


class Tokens(Protocol):
    """The tokens of documents, joined, with random access.

    Attributes:
      ends: where each document ends in the joined tokens, int64 `[documents]`.
      separated: whether each document ends with the tokenizer's end token.
    """

    @property
    def ends(self) -> np.ndarray: ...
    @property
    def separated(self) -> bool: ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop of the joined documents, int32 `[stop - start]`."""
        ...


@dataclasses.dataclass(frozen=True)
class MemoryTokens:
    """Tokens in memory; see `Tokens`."""

    ids: np.ndarray
    ends: np.ndarray
    separated: bool

    def read(self, start: int, stop: int) -> np.ndarray:
        """See `Tokens`."""
        return self.ids[start:stop]


def source_of(config: DataConfig, split: str) -> tuple[DataConfig, str]:
    """Which corpus a split comes from, and which part of that corpus it is.

    Args:
      config: with `held_out_path`, nothing of `path` is held out.
      split: "train", "held_out", or "all": the whole of `path`.

    Returns:
      The config, whose `path` is the corpus, and the split of it.

    Raises:
      UserError: if nothing is held out.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, but has to be one of {SPLITS}")
    if split == "all" or not config.held_out_path:
        if split == "held_out" and not config.held_out:
            raise UserError(
                "data.held_out is 0 and data.held_out_path is empty, so there is "
                "nothing to evaluate on; set one of them"
            )
        return config, split
    path = config.path if split == "train" else config.held_out_path
    return dataclasses.replace(config, path=path), "all"


def from_text(
    config: DataConfig, tokenizer: Tokenizer, split: str, *, progress: bool = True
) -> MemoryTokens:
    """Reads and tokenizes a split of `config.path`; nothing but the split is tokenized.

    Args:
      config: the source of the text.
      tokenizer: what makes tokens of it.
      split: see `source_of`.
      progress: show bars on stderr once something takes longer than a second.

    Raises:
      UserError: see `sources.documents`; also if the split has no document.
    """
    with progress_bar("reading", sources.size(config), progress) as bar:
        texts = list(sources.documents(config, bar.update))
    separated = len(texts) > 1 and tokenizer.eos_id is not None
    texts = _split_texts(texts, config.held_out, split)
    with progress_bar("tokenizing", sum(map(len, texts)), progress) as bar:
        return join(tokenizer.encode_documents(texts, bar.update), tokenizer, separated)


def join(
    documents: Iterable[np.ndarray], tokenizer: Tokenizer, separated: bool
) -> MemoryTokens:
    """Joins tokenized documents, each followed by the end token if `separated`."""
    end = np.array([tokenizer.eos_id] if separated else [], np.int32)
    parts = [part for ids in documents for part in (ids, end)]
    ids = np.concatenate(parts) if parts else end
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)[1::2]
    return MemoryTokens(ids, ends, separated)


def held_out_documents(count: int, fraction: float) -> np.ndarray:
    """Which of several documents are held out, bool `[count]`.

    A document's chance depends on a hash of its position. At least one document is held
    out and at least one is not.

    Args:
      count: number of documents, at least 2.
      fraction: of the documents.
    """
    number = min(max(round(fraction * count), 1), count - 1)
    chosen = np.argsort(_hash(np.arange(count, dtype=np.uint64)), kind="stable")
    mask = np.zeros(count, bool)
    mask[chosen[:number]] = True
    return mask


def cut_at(length: int, fraction: float) -> int:
    """Where the held-out end of a single document begins."""
    return int((1 - fraction) * length)


def progress_bar(
    what: str, total: int | None, shown: bool, *, unit: str = "B", done: int = 0
) -> tqdm:
    """A bar with the remaining time, on stderr, once a second has passed.

    Args:
      what: is being done.
      total: number of units there are; None where that is not known.
      shown: else nothing is.
      unit: such as "B" for bytes.
      done: units that were done before.
    """
    return tqdm(
        desc=what,
        total=total,
        initial=done,
        unit=unit,
        unit_scale=True,
        file=sys.stderr,
        delay=1.0,
        disable=not shown,
    )


def _split_texts(texts: list[bytes], fraction: float, split: str) -> list[bytes]:
    if split == "all" or (split == "train" and not fraction):
        return texts
    if len(texts) > 1:
        wanted = held_out_documents(len(texts), fraction) == (split == "held_out")
        return [text for text, keep in zip(texts, wanted, strict=True) if keep]
    (text,) = texts
    cut = cut_at(len(text), fraction)
    while cut < len(text) and text[cut] & 0xC0 == 0x80:  # inside a UTF-8 character
        cut += 1
    return [text[:cut] if split == "train" else text[cut:]]


def _hash(numbers: np.ndarray) -> np.ndarray:
    """SplitMix64, the same on every machine and in every version."""
    mixed = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
