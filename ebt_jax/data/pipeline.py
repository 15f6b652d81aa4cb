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

with b = batch_size / process_count: batch i of all processes together is batch i of a
single process, its sequences in another order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import grain
import numpy as np
from absl import flags

from ebt_jax.data import corpus, packing, shards
from ebt_jax.data.config import DataConfig
from ebt_jax.data.tokenizers import Tokenizer
from ebt_jax.errors import UserError

Batch = dict[str, np.ndarray]

_SILENT = ("weights", "segments", "bytes")  # 0 where a prediction does not count


def train_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Batches of the training split; the iterator's state can be saved and restored.

    Close the iterator (`.close()`) when done, above all with `num_workers`.

    Args:
      config: what to read. With `repeat` there is no end; without, the sequences that
        fill no whole batch at the end of the one epoch are dropped.
      tokenizer: makes tokens of text; token shards have to have been made by it.
      batch_size: sequences per batch, over all processes.
      seed: of the order of sequences, which is another in every epoch.
      process_index: which of the processes this is.
      process_count: how many share each batch.

    Raises:
      UserError: for whatever cannot be read, for text shorter than one sequence, and if
        without `repeat` there are fewer sequences than a batch has.
    """
    local_size = _local_size(batch_size, process_count)
    sequences = _sequences(config, tokenizer, "train", process_index == 0, None)
    total = int(sequences.tokens.ends[-1])
    if config.packing == "concat" and total <= config.context:
        raise UserError(
            f"data.context is {config.context}, so a sequence takes "
            f"{config.context + 1} tokens, but the training text has only {total}; "
            "lower data.context or give more text"
        )
    dataset = grain.MapDataset.source(sequences)
    if config.shuffle:
        dataset = dataset.shuffle(seed=seed % 2**32)
    if config.repeat:
        dataset = dataset.repeat()
    else:
        usable = len(sequences) // batch_size * batch_size
        if not usable:
            raise UserError(
                f"train.batch_size is {batch_size}, but data.path has no more than "
                f"{len(sequences)} sequences and data.repeat is off; lower it or repeat"
            )
        dataset = dataset.slice(slice(0, usable))
    dataset = dataset.slice(slice(process_index, None, process_count))
    # Tokens are in memory or in the page cache: reader threads would only compete.
    reading = grain.ReadOptions(num_threads=0)
    batches = dataset.batch(local_size, drop_remainder=True).to_iter_dataset(reading)
    if config.num_workers:
        # Grain reads an absl flag here (google/grain#1355), also where a program has
        # no flags to parse.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        workers = grain.MultiprocessingOptions(num_workers=config.num_workers)
        batches = batches.mp_prefetch(workers)
    return iter(batches)


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

    sequences: packing.Sequences
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
    _local_size(batch_size, process_count)
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


def _local_size(batch_size: int, process_count: int) -> int:
    if batch_size % process_count:
        raise UserError(
            f"the batch size is {batch_size}, which {process_count} processes do not "
            "divide; change one of them"
        )
    return batch_size // process_count
