"""Batches for training and for evaluation.

A batch is a dict of NumPy arrays:

========= ================= =======================================================
tokens    int32 [b, s]      inputs
targets   int32 [b, s]      the token after each input
weights   float32 [b, s]    0 where a prediction does not count
index     int32 [b]         names a sequence in its split, whatever the batch size
segments  int32 [b, s]      first_fit only: which document, from 1; 0 is padding
positions int32 [b, s]      first_fit only: position in that document
bytes     float32 [b, s]    evaluation only: UTF-8 bytes of each target that counts
========= ================= =======================================================

Training batches come from one order of examples, endless or one epoch long: row r of
batch k is example start + k * batch_size + r. A process loads the rows that it is told
to, so the place of a run in its data is one number, whatever the number of processes.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, cast

import grain
import numpy as np
from absl import flags

from ebt_jax.data import corpus, packing, shards
from ebt_jax.data.config import DataConfig
from ebt_jax.data.tokenizers import Tokenizer
from ebt_jax.errors import UserError

Batch = dict[str, np.ndarray]

_SILENT = ("weights", "segments", "bytes")  # 0 where a prediction does not count


class Examples(Protocol):
    """Examples in an order, with random access; also a `grain.MapDataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of one process, from an example on, as Grain wants a source of data.

    Attributes:
      examples: all of them, in order.
      start: the first one of the first batch.
      batch_size: sequences per batch, over all processes.
      rows: which rows of each batch.
    """

    examples: Examples
    start: int
    batch_size: int
    rows: Sequence[int]

    def __len__(self) -> int:
        batches = max(len(self.examples) - self.start, 0) // self.batch_size
        return min(batches * len(self.rows), sys.maxsize)

    def __getitem__(self, index: int) -> Batch:
        batch, row = divmod(index, len(self.rows))
        example = self.start + batch * self.batch_size + self.rows[row]
        return cast(Batch, self.examples[example])


class TrainBatches(Iterator[Batch]):
    """Batches of the training split, from any example on.

    Attributes:
      batch_size: sequences per batch, over all processes.
      next_example: the first example of the next batch, in the order of all processes.
        It is all there is to save: `seek` goes on there, also in other processes.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        batch_size: int,
        rows: Sequence[int],
        num_workers: int,
    ) -> None:
        """Stands before the first example.

        Args:
          examples: all of them, in order.
          batch_size: sequences per batch, over all processes.
          rows: which rows of each batch are loaded.
          num_workers: processes that prepare batches ahead; 0: in this one.
        """
        self.batch_size = batch_size
        self.next_example = 0
        self._examples, self._rows, self._num_workers = examples, rows, num_workers
        self._batches: grain.DatasetIterator[Batch] | None = None

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = self._open()
        batch = next(self._batches)
        self.next_example += self.batch_size
        return batch

    def seek(self, example: int) -> None:
        """Goes on at an example, counted from 0 in the order of all processes."""
        self.close()
        self.next_example = example

    def close(self) -> None:
        """Ends the processes that prepare batches."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def _open(self) -> grain.DatasetIterator[Batch]:
        source = Rows(self._examples, self.next_example, self.batch_size, self._rows)
        # Tokens are in memory or in the page cache: reader threads would only compete.
        reading = grain.ReadOptions(num_threads=0)
        dataset = grain.MapDataset.source(source)
        dataset = dataset.batch(len(self._rows), drop_remainder=True)
        batches = dataset.to_iter_dataset(reading)
        if self._num_workers:
            # Grain reads an absl flag here (google/grain#1355), also where a program
            # has no flags to parse.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            workers = grain.MultiprocessingOptions(num_workers=self._num_workers)
            batches = batches.mp_prefetch(workers)
        return iter(batches)


def train_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    rows: Sequence[int] | None = None,
    progress: bool = True,
) -> TrainBatches:
    """Batches of the training split, in an order that only config and seed determine.

    Close them (`.close()`) when done, above all with `num_workers`.

    Args:
      config: what to read. With `repeat` there is no end; without, the sequences that
        fill no whole batch at the end of the one epoch are dropped.
      tokenizer: makes tokens of text; token shards have to have been made by it.
      batch_size: sequences per batch, over all processes.
      seed: of the order of sequences, which is another in every epoch.
      start: the first example.
      rows: which rows of each batch this process loads, such as `range(0, 8)`; None for
        all. Row r of batch k is example `start + k * batch_size + r`.
      progress: whether to say how far tokenizing is.

    Raises:
      UserError: for whatever cannot be read, for text shorter than one sequence, and if
        without `repeat` there are fewer sequences than a batch has.
    """
    sequences = _sequences(config, tokenizer, "train", progress, None)
    total = int(sequences.tokens.ends[-1])
    if config.packing == "concat" and total <= config.context:
        raise UserError(
            f"data.context is {config.context}, so a sequence takes "
            f"{config.context + 1} tokens, but the training text has only {total}; "
            "lower data.context or give more text"
        )
    examples = grain.MapDataset.source(sequences)
    if config.train_tokens:
        examples = examples[: config.train_tokens // config.context]
    check_batch(config, batch_size, len(examples), "sequences")
    if config.shuffle:
        examples = examples.shuffle(seed=seed % 2**32)
    if config.repeat:
        examples = examples.repeat()
    batches = TrainBatches(
        examples,
        batch_size=batch_size,
        rows=range(batch_size) if rows is None else rows,
        num_workers=config.num_workers,
    )
    batches.seek(start)
    return batches


@dataclasses.dataclass(frozen=True)
class HeldOutBatches:
    """Batches of sequences in a fixed order, as often as wanted.

    Attributes:
      sequences: all there are.
      count: how many of them, from the first.
      batch_size: sequences per batch, over all processes. The last batch is filled up
        with sequences of weight 0.
      process_index: which of the processes this is.
      process_count: how many share each batch.
    """

    sequences: Examples
    count: int
    batch_size: int
    process_index: int
    process_count: int

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        mine = range(self.process_index, self.batch_size, self.process_count)
        for first in range(0, len(self) * self.batch_size, self.batch_size):
            examples = [self._example(first + row) for row in mine]
            yield {
                name: np.stack([example[name] for example in examples])
                for name in examples[0]
            }

    def _example(self, index: int) -> Batch:
        if index < self.count:
            return self.sequences[index]
        filler = self.sequences[0]
        zeros = {name: filler[name] * 0 for name in _SILENT if name in filler}
        return filler | zeros | {"index": np.array(index, np.int32)}


def held_out_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    sequences: int = 0,
    split: str = "held_out",
    process_index: int = 0,
    process_count: int = 1,
) -> HeldOutBatches:
    """Batches for evaluation: every sequence once, in a fixed order.

    Args:
      config: what to read.
      tokenizer: see `train_batches`.
      batch_size: sequences per batch, over all processes.
      sequences: how many, from the first; 0: all.
      split: "held_out"; "all" for the whole of `config.path`; "train".
      process_index: which of the processes this is.
      process_count: how many share each batch.

    Raises:
      UserError: for whatever cannot be read, and if there is nothing to predict.
    """
    local_size(batch_size, process_count)
    token_bytes = tokenizer.token_bytes()
    found = _sequences(config, tokenizer, split, process_index == 0, token_bytes)
    count = min(sequences, len(found)) if sequences else len(found)
    return HeldOutBatches(found, count, batch_size, process_index, process_count)


def _sequences(
    config: DataConfig,
    tokenizer: Tokenizer,
    split: str,
    progress: bool,
    token_bytes: np.ndarray | None,
) -> packing.Sequences:
    source, part = corpus.source_of(config, split)
    if shards.is_prepared(source.path):
        tokens = shards.load(source, tokenizer, part)
    else:
        tokens = corpus.from_text(source, tokenizer, part, progress=progress)
    plan = packing.make_plan(tokens, config.packing, config.context)
    if len(plan.firsts) < 2:
        total = int(tokens.ends[-1]) if len(tokens.ends) else 0
        raise UserError(
            f"data.path: {source.path}, split {part!r}, has {total} tokens in "
            f"{len(tokens.ends)} documents, which leaves nothing to predict; give more "
            "text or another data.held_out"
        )
    segmented = config.packing == "first_fit"
    return packing.Sequences(
        tokens, plan, config.context, tokenizer.pad_id, segmented, token_bytes
    )


def check_batch(config: DataConfig, batch_size: int, count: int, what: str) -> None:
    """Refuses batches that one epoch cannot fill.

    Args:
      config: `repeat`.
      batch_size: examples per batch.
      count: examples there are.
      what: they are, for the message.

    Raises:
      UserError: if they are too few.
    """
    if not config.repeat and count < batch_size:
        raise UserError(
            f"train.batch_size is {batch_size}, but data.path has no more than "
            f"{count} {what} and data.repeat is off; lower it or repeat"
        )


def local_size(batch_size: int, process_count: int) -> int:
    """Rows of a batch that each process has.

    Raises:
      UserError: if processes do not divide it.
    """
    if batch_size % process_count:
        raise UserError(
            f"the batch size is {batch_size}, which {process_count} processes do not "
            "divide; change one of them"
        )
    return batch_size // process_count
