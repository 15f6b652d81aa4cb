"""Tokenizes a corpus once, into token shards (`ebt_jax.data.shards`)."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from ebt_jax.data import corpus, shards, sources, tokenizers
from ebt_jax.data.config import DataConfig
from ebt_jax.data.tokenizers import Tokenizer
from ebt_jax.errors import UserError

_RECORD_TOKENS = 4096  # a window of context reads whole records, so they are short


def prepare(
    config: DataConfig,
    output: str,
    *,
    shard_tokens: int = 100_000_000,
    progress: bool = True,
) -> shards.Index:
    """Tokenizes `config.path` with `config.tokenizer` into the directory `output`.

    Documents are read one at a time. Everything is written beside `output` and renamed
    at the end, so `output` is whole or absent.

    Args:
      config: `path`, `tokenizer`, `text_key` and `max_malformed`. All documents are
        written; what is held out is decided when they are read.
      output: directory that does not exist yet.
      shard_tokens: tokens after which a new shard begins.
      progress: show a bar on stderr.

    Returns:
      What has been written.

    Raises:
      UserError: if `output` exists or cannot be written, `shard_tokens` is not
        positive, or the corpus cannot be read.
    """
    if shard_tokens < 1:
        raise UserError(f"shard_tokens is {shard_tokens}, but has to be at least 1")
    output = os.path.abspath(os.path.expanduser(output))
    if os.path.exists(output):
        raise UserError(f"{output} exists already; name a new directory or remove it")
    if shards.is_prepared(config.path):
        raise UserError(f"data.path: {config.path} holds token shards already; use it")
    tokenizer = tokenizers.load(config.tokenizer)
    sources.entries(config.path)
    partial = f"{output}.partial-{os.getpid()}"
    try:
        os.makedirs(partial)
    except OSError as error:
        raise UserError(
            f"{output} cannot be written ({error.strerror}); choose another directory"
        ) from error
    try:
        with corpus.progress_bar("preparing", None, progress) as bar:
            seen = _Seen(bar, sources.size(config))
            texts = seen.watch(sources.documents(config, seen.on_read))
            index = _write(texts, tokenizer, bar.update, partial, shard_tokens)
        os.rename(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return index


class _Seen:
    """Keeps the bar's total at what the whole text will come to.

    A compressed file does not say how much text it holds; what was read of it does.

    Attributes:
      bar: of bytes of text.
      files: size of all sources as they lie on disk, None if not known.
      read: how much of that has been read.
      text: bytes of text found there.
    """

    def __init__(self, bar: tqdm, files: int | None):
        self.bar, self.files, self.read, self.text = bar, files, 0, 0

    def on_read(self, count: int) -> None:
        """Takes note of bytes read from a file."""
        self.read += count

    def watch(self, texts: Iterator[bytes]) -> Iterator[bytes]:
        """Passes documents on."""
        for text in texts:
            self.text += len(text)
            if self.files and self.read:
                self.bar.total = self.files * self.text // self.read
            yield text


class _ShardWriter:
    """Writes records, beginning a new shard when one is full."""

    def __init__(self, directory: str, dtype: str, shard_tokens: int):
        self.directory, self.dtype, self.shard_tokens = directory, dtype, shard_tokens
        self.names: list[str] = []
        self.records: list[tuple[int, int]] = []  # document, number of tokens
        self.writer: ArrayRecordWriter | None = None
        self.room = 0

    def write(self, document: int, ids: np.ndarray) -> None:
        """Writes a document, int32 `[tokens]`, as one or several records."""
        for part in np.split(ids, range(_RECORD_TOKENS, len(ids), _RECORD_TOKENS)):
            writer = self.writer
            if writer is None or self.room <= 0:
                writer = self._next_shard()
            writer.write(part.astype(self.dtype).tobytes())
            self.records.append((document, len(part)))
            self.room -= len(part)

    def _next_shard(self) -> ArrayRecordWriter:
        self.close()
        self.names.append(f"tokens-{len(self.names):05}.array_record")
        path = os.path.join(self.directory, self.names[-1])
        # One record per group, so that a record can be read alone.
        self.writer = ArrayRecordWriter(path, "group_size:1")
        self.room = self.shard_tokens
        return self.writer

    def close(self) -> None:
        """Ends the open shard."""
        if self.writer is not None:
            self.writer.close()


def _write(
    texts: Iterator[bytes],
    tokenizer: Tokenizer,
    on_done: Callable[[int], Any],
    directory: str,
    shard_tokens: int,
) -> shards.Index:
    first_two = list(itertools.islice(texts, 2))
    separated = len(first_two) > 1 and tokenizer.eos_id is not None
    end = np.array([tokenizer.eos_id] if separated else [], np.int32)
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<i4"
    writer = _ShardWriter(directory, dtype, shard_tokens)
    text_bytes = 0

    def count(done: int) -> None:
        nonlocal text_bytes
        text_bytes += done
        on_done(done)

    texts = itertools.chain(first_two, texts)
    for document, ids in enumerate(tokenizer.encode_documents(texts, count)):
        writer.write(document, np.concatenate([ids, end]))
    writer.close()
    records = np.array(writer.records, np.int64)
    np.save(os.path.join(directory, shards.RECORDS), records)
    index = shards.Index(
        format=shards.FORMAT,
        version=shards.VERSION,
        tokenizer=tokenizer.name,
        tokenizer_digest=tokenizer.digest,
        vocab_size=tokenizer.vocab_size,
        dtype=dtype,
        separated=separated,
        documents=int(records[-1, 0]) + 1,
        tokens=int(records[:, 1].sum()),
        bytes=text_bytes,
        shards=writer.names,
    )
    with open(os.path.join(directory, shards.INDEX), "w", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(index), indent=2) + "\n")
    return index
