"""What a run learns from: text, pictures or boards, as the train loop sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from ebt_jax.data import pipeline, tokenizers
from ebt_jax.data.tokenizers import Tokenizer
from ebt_jax.evaluation import generation
from ebt_jax.interfaces import Objective
from ebt_jax.refine import PyTree
from ebt_jax.thinking import Thinking
from ebt_jax.training.config import Config
from ebt_jax.training.resolve import resolve
from ebt_jax.training.sharding import NumpyBatch

# (objective, params, held-out batches, workdir) -> lines to print; writes samples
Show = Callable[[Objective, PyTree, Iterable[NumpyBatch], Path], str]


class Task(NamedTuple):
    """What the data of a config brings to a run.

    Attributes:
      config: resolved.
      train_batches: `(rows) -> batches` to train on, those rows of each.
      held_out: `() -> batches` to evaluate on, which every process holds whole.
      show: shows people what the trained model does.
    """

    config: Config
    train_batches: Callable[[Sequence[int]], pipeline.TrainBatches]
    held_out: Callable[[], Iterable[NumpyBatch]]
    show: Show


def open_task(config: Config) -> Task:
    """The task of a config.

    Raises:
      UserError: for data that cannot be read or does not suit the model.
    """
    if config.model.space == "text":
        return _text(config)
    if config.model.space == "board":
        from ebt_jax.training.board_task import open_board_task

        return open_board_task(config)
    # Pictures need packages that text does not.
    from ebt_jax.training.vision_task import open_vision_task

    return open_vision_task(config)


def resolved(config: Config) -> Config:
    """A config with the sizes that its data decide, see `resolve.resolve`.

    Text itself is not read, its tokenizer is; pictures are.

    Raises:
      UserError: as `open_task`.
    """
    if config.model.space == "board":
        from ebt_jax.training.board_task import resolve_board

        return resolve_board(config)
    if config.model.space == "text":
        return resolve(config, tokenizers.load(config.data.tokenizer).vocab_size)
    return open_task(config).config


def _text(config: Config) -> Task:
    tokenizer = tokenizers.load(config.data.tokenizer)
    config = resolve(config, tokenizer.vocab_size)

    def train_batches(rows: Sequence[int]) -> pipeline.TrainBatches:
        return pipeline.train_batches(
            config.data,
            tokenizer,
            batch_size=config.train.batch_size,
            seed=config.train.seed,
            rows=rows,
            progress=jax.process_index() == 0,
        )

    def held_out() -> pipeline.HeldOutBatches:
        return pipeline.held_out_batches(
            config.data,
            tokenizer,
            batch_size=config.eval.batch_size,
            sequences=config.eval.sequences,
        )

    return Task(config, train_batches, held_out, show_text(config, tokenizer))


def show_text(config: Config, tokenizer: Tokenizer) -> Show:
    """Writes `sample.txt`, held-out text continued by the model."""

    def show(
        objective: Objective, params: PyTree, held_out: Iterable[NumpyBatch], path: Path
    ) -> str:
        text = sample(config, objective, tokenizer, params, held_out)
        (path / "sample.txt").write_text(text + "\n")
        return f"--- sample, begun by held-out text\n{text}\n---"

    return show


def sample(
    config: Config,
    objective: Objective,
    tokenizer: Tokenizer,
    params: PyTree,
    held_out: Iterable[NumpyBatch],
) -> str:
    """The beginning of the held-out text, continued."""
    prompt = next(iter(held_out))["tokens"][0, : max(config.data.context // 4, 1)]
    (added,) = generation.generate_ids(
        objective,
        params,
        [prompt],
        context=config.data.context,
        new_tokens=config.eval.sample_tokens,
        sampling=generation.Sampling(config.eval.sample_temperature),
        seed=config.eval.seed,
        thinking=Thinking(config.eval.num_steps),
        vocab_size=tokenizer.vocab_size,
    )
    return tokenizer.decode([*prompt, *added.tokens])
