"""What a run of boards learns from, as the train loop sees it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ebt_jax.data import boards, pipeline
from ebt_jax.errors import UserError
from ebt_jax.interfaces import Objective
from ebt_jax.models.board import answers
from ebt_jax.refine import PyTree
from ebt_jax.thinking import Thinking
from ebt_jax.training.config import Config
from ebt_jax.training.resolve import scheduled
from ebt_jax.training.sharding import NumpyBatch
from ebt_jax.training.task import Show, Task

SHOWN = 4  # boards of a sample


def open_board_task(config: Config) -> Task:
    """The task of a config whose `model.space` is board.

    Raises:
      UserError: for boards that there are not, or that do not suit the model.
    """
    config = resolve_board(config)

    def train_batches(rows: Sequence[int]) -> pipeline.TrainBatches:
        return boards.train_batches(
            boards.train_examples(config.board, config.train.seed),
            batch_size=config.train.batch_size,
            rows=rows,
            num_workers=config.data.num_workers,
        )

    def held_out() -> Iterable[NumpyBatch]:
        return boards.held_out_batches(
            boards.held_out_examples(config.board, config.board.givens),
            batch_size=config.eval.batch_size,
            sequences=config.eval.sequences,
        )

    return Task(config, train_batches, held_out, show_boards(config))


def resolve_board(config: Config) -> Config:
    """With the sizes that the boards decide.

    Raises:
      UserError: if the model's are given and are others.
    """
    board = config.board
    found = {
        "vocab_size": board.digits,
        "box_rows": board.box_rows,
        "box_columns": board.box_columns,
    }
    for name, size in found.items():
        if getattr(config.model, name) not in (0, size):
            raise UserError(
                f"model.{name} is {getattr(config.model, name)}, but the boards' is "
                f"{size}; leave it at 0 to follow"
            )
    model = dataclasses.replace(
        config.model, num_landscapes=config.refine.num_landscapes, **found
    )
    return scheduled(config, model)


def show_boards(config: Config) -> Show:
    """Writes `boards.txt`, the first held-out boards as they are filled."""

    def show(
        objective: Objective, params: PyTree, batches: Iterable[NumpyBatch], path: Path
    ) -> str:
        first = next(iter(batches))
        batch = {name: jnp.asarray(rows[:SHOWN]) for name, rows in first.items()}
        key, thinking = (
            jax.random.key(config.eval.seed),
            Thinking(config.eval.num_steps),
        )
        predict = jax.jit(objective.predict, static_argnums=3)
        filled = np.asarray(answers(predict(params, batch, key, thinking), batch))
        text = "\n".join(
            side_by_side(puzzle, answer, solution, config.model.vocab_size)
            for puzzle, answer, solution in zip(
                first["puzzle"][:SHOWN], filled, first["solution"][:SHOWN], strict=True
            )
        )
        (path / "boards.txt").write_text(text)
        return f"samples  {path / 'boards.txt'}"

    return show


def side_by_side(
    puzzle: np.ndarray, answer: np.ndarray, solution: np.ndarray, digits: int
) -> str:
    """A board as it is given and as it was filled, with wrong digits marked `!`.

    Args:
      puzzle: digits, 0 where empty, `[cells]`.
      answer: digits `[cells]`.
      solution: digits `[cells]`.
      digits: of the board.
    """
    width = len(str(digits)) + 2
    given = [f"{digit or '.':>{width}}" for digit in puzzle]
    marks = np.where(answer == solution, " ", "!")
    made = [
        f"{digit:>{width - 1}}{mark}" for digit, mark in zip(answer, marks, strict=True)
    ]
    lines = []
    for first in range(0, digits**2, digits):
        row = slice(first, first + digits)
        lines.append(f"{''.join(given[row])}    {''.join(made[row])}".rstrip())
    wrong = int((answer != solution).sum())
    lines.append(f"{int((puzzle > 0).sum())} given, {wrong or 'none'} wrong")
    return "\n".join([*lines, ""])
