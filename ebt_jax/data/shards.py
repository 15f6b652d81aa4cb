"""Token shards: a corpus tokenized once, as ArrayRecord files with an index.

    DIR/index.json                  what the shards hold, see `Index`
    DIR/records.npy                 int64 [records, 2]: document, number of tokens
    DIR/tokens-00000.array_record   records: little-endian tokens

A record holds tokens of one document; a long document is split over consecutive ones.
Shards are read at random, never as a whole, so they may be larger than memory.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from typing import Any

import grain
import numpy as np

from ebt_jax.data import corpus
from ebt_jax.data.config import DataConfig
from ebt_jax.data.tokenizers import Tokenizer
from ebt_jax.errors import StorageError, UserError

INDEX = "index.json"
RECORDS = "records.npy"
FORMAT = "ebt-jax token shards"
VERSION = 1
READ_WAITS = (0.5, 2.0, 8.0)  # seconds before a shard is read again


@dataclasses.dataclass(frozen=True)
class Index:
    """What a directory of token shards holds."""

    format: str  # FORMAT
    version: int  # VERSION
    tokenizer: str  # its name
    tokenizer_digest: str  # equal for equal tokenizers
    vocab_size: int  # entries of the tokenizer
    dtype: str  # of the tokens, as NumPy names it
    separated: bool  # whether each document ends with the tokenizer's end token
    documents: int  # how many
    tokens: int  # how many, end tokens included
    bytes: int  # of the text, UTF-8
    shards: list[str]  # file names, in order


@dataclasses.dataclass(frozen=True)
class Records:
    """The records of several files, numbered through.

    Attributes:
      paths: of the files.
      sources: their records.
      ends: number of the first record after each file, int64 `[files]`.
    """

    paths: list[str]
    sources: list[Any]
    ends: np.ndarray

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, index: int) -> bytes:
        """A record; a file that cannot be read is opened again, a few times.

        Raises:
          StorageError: if it still cannot be read.
          UserError: if it can, but not that record.
        """
        file = int(np.searchsorted(self.ends, index, side="right"))
        place = index - (int(self.ends[file - 1]) if file else 0)
        problem = ""
        for attempt, wait in enumerate((0.0, *READ_WAITS)):
            try:
                if attempt:
                    time.sleep(wait)
                    # A reader that has failed does not recover.
                    reopened = grain.sources.ArrayRecordDataSource(self.paths[file])
                    self.sources[file] = reopened
                return self.sources[file][place]
            except (OSError, RuntimeError) as error:  # the reader raises the second
                problem = " ".join(str(error).split())
        path = self.paths[file]
        try:
            with open(path, "rb") as opened:
                opened.read(1)
        except OSError as error:
            raise StorageError(
                f"the shard {path} cannot be read, tried {len(READ_WAITS) + 1} times: "
                f"{error.strerror}; give the same command again when it can"
            ) from error
        raise UserError(
            f"data.path: the shard {path} is damaged ({problem}); copy it or prepare "
            "the corpus again"
        )


@dataclasses.dataclass(frozen=True)
class ShardTokens:
    """Tokens on disk; see `corpus.Tokens`.

    Attributes:
      source: the records.
      records: those that belong to the split, int64 `[records]`.
      record_ends: where each ends in the joined tokens, int64 `[records]`.
      dtype: of a record's tokens.
      offset: joined tokens before the first of the split.
      ends: see `corpus.Tokens`.
      separated: see `corpus.Tokens`.
    """

    source: Records
    records: np.ndarray
    record_ends: np.ndarray
    dtype: str
    offset: int
    ends: np.ndarray
    separated: bool

    def read(self, start: int, stop: int) -> np.ndarray:
        """See `corpus.Tokens`."""
        start, stop = start + self.offset, stop + self.offset
        first = int(np.searchsorted(self.record_ends, start, side="right"))
        last = int(np.searchsorted(self.record_ends, stop, side="left"))
        records = [self.source[int(i)] for i in self.records[first : last + 1]]
        joined = np.frombuffer(b"".join(records), self.dtype).astype(np.int32)
        begin = int(self.record_ends[first - 1]) if first else 0
        return joined[start - begin : stop - begin]


def is_prepared(path: str) -> bool:
    """Whether a `data.path` names a directory of token shards."""
    return os.path.isfile(os.path.join(os.path.expanduser(path), INDEX))


def load(config: DataConfig, tokenizer: Tokenizer, split: str) -> ShardTokens:
    """Opens a split of the token shards in `config.path`.

    Args:
      config: `path` is the directory.
      tokenizer: has to be the one that made them.
      split: "train", "held_out" or "all". One document alone is cut at the fraction of
        its tokens at which text is cut by bytes.

    Raises:
      UserError: for a broken index, missing or damaged shards, another tokenizer.
    """
    directory = os.path.expanduser(config.path)
    index = read_index(directory)
    if index.tokenizer_digest != tokenizer.digest:
        raise UserError(
            f"data.path: the tokens in {directory} were made by tokenizer "
            f"{index.tokenizer!r}, but data.tokenizer is {tokenizer.name!r}; use the "
            "first, or prepare the corpus again"
        )
    table = _read_records(directory, index)
    source = _open_shards(directory, index, len(table))
    documents, lengths = table[:, 0], table[:, 1]
    if index.documents > 1 and split != "all" and (config.held_out or split != "train"):
        held_out = corpus.held_out_documents(index.documents, config.held_out)
        records = np.flatnonzero(held_out[documents] == (split == "held_out"))
    else:
        records = np.arange(len(table))
    record_ends = np.cumsum(lengths[records])
    is_last = np.diff(documents[records], append=-1) != 0
    ends, offset = record_ends[is_last], 0
    if index.documents == 1 and split != "all":
        cut = corpus.cut_at(index.tokens, config.held_out)
        offset = 0 if split == "train" else cut
        ends = np.array([cut if split == "train" else index.tokens - cut])
    return ShardTokens(
        source, records, record_ends, index.dtype, offset, ends, index.separated
    )


def read_index(directory: str) -> Index:
    """Reads the index of a directory of token shards.

    Raises:
      UserError: if it is not one, or of another version.
    """
    path = os.path.join(directory, INDEX)
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
        version = values["version"]
        if values["format"] == FORMAT and version == VERSION:
            return Index(**values)
        problem = f"format {values['format']!r}, version {version}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise UserError(
        f"data.path: {path} is not an index of token shards of version {VERSION} "
        f"({problem}); prepare the corpus again"
    )


def _read_records(directory: str, index: Index) -> np.ndarray:
    path = os.path.join(directory, RECORDS)
    try:
        table = np.load(path)
        intact = table.ndim == 2 and table[:, 1].sum() == index.tokens
    except (OSError, ValueError, EOFError):
        table, intact = np.zeros((0, 2), np.int64), False
    if not intact:
        raise UserError(
            f"data.path: {path} is missing or does not belong to {INDEX}; prepare the "
            "corpus again"
        )
    return table


def _open_shards(directory: str, index: Index, records: int) -> Records:
    paths = [os.path.join(directory, name) for name in index.shards]
    for path in paths:
        if not os.path.isfile(path):
            raise UserError(
                f"data.path: the shard {path} is missing; copy it or prepare the "
                "corpus again"
            )
    sources = []
    for path in paths:
        try:
            source: Any = grain.sources.ArrayRecordDataSource(path)
            sources.append((source, len(source)))
        except Exception as error:  # the reader raises plain RuntimeError and others
            raise UserError(
                f"data.path: the shard {path} is damaged ({error}); copy it or prepare "
                "the corpus again"
            ) from error
    ends = np.cumsum([count for _, count in sources], dtype=np.int64)
    found = int(ends[-1]) if len(ends) else 0
    if found != records:
        raise UserError(
            f"data.path: the shards in {directory} hold {found} records, but {RECORDS} "
            f"names {records}; prepare the corpus again"
        )
    return Records(paths, [source for source, _ in sources], ends)
