"""Which boards of Sudoku a run learns from, and which it is tested on."""

from __future__ import annotations

import dataclasses

from ebt_jax.errors import UserError

MOST_DIGITS = 16  # a cell's digits are the bits of 16


@dataclasses.dataclass(frozen=True)
class BoardConfig:
    """Boards of `box_rows * box_columns` digits, each with one solution.

    The more cells are given, the easier a board is. A run learns from easy boards; hard
    ones are out of its distribution.
    """

    box_rows: int = 3  # rows of a box, at least 2
    box_columns: int = 3  # its columns, at least 2; a box holds each digit once
    min_givens: int = 36  # fewest cells given, of boards to train on
    max_givens: int = 50  # most of them
    hard_min_givens: int = 24  # the same of boards that only evaluation sees
    hard_max_givens: int = 30
    held_out: float = 0.1  # share of all solved boards that training never sees
    held_out_boards: int = 1024  # boards to evaluate on, of each difficulty
    pool: int = 2048  # boards made for training; symmetries make more of each
    seed: int = 0  # of these boards; that of what is drawn of them is train.seed

    def __post_init__(self) -> None:
        for name in ("box_rows", "box_columns"):
            if getattr(self, name) < 2:
                raise UserError(
                    f"board.{name} is {getattr(self, name)}, but has to be at least 2"
                )
        if self.digits > MOST_DIGITS:
            raise UserError(
                f"board: boxes of {self.box_rows} x {self.box_columns} take "
                f"{self.digits} digits, but there are at most {MOST_DIGITS}; lower "
                "board.box_rows or board.box_columns"
            )
        check_givens("board.min_givens to max_givens", *self.givens, self.digits)
        check_givens(
            "board.hard_min_givens to hard_max_givens", *self.hard_givens, self.digits
        )
        if not 0.01 <= self.held_out <= 0.9:
            raise UserError(
                f"board.held_out is {self.held_out}, but has to be a share between "
                "0.01 and 0.9"
            )
        for name in ("held_out_boards", "pool"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"board.{name} is {getattr(self, name)}, but has to be positive"
                )
        if not 0 <= self.seed < 2**32:
            raise UserError(
                f"board.seed is {self.seed}, but has to be between 0 and 2**32 - 1"
            )

    @property
    def digits(self) -> int:
        """Digits of a board, cells of a row."""
        return self.box_rows * self.box_columns

    @property
    def givens(self) -> tuple[int, int]:
        """Fewest and most cells given, of boards to train on."""
        return self.min_givens, self.max_givens

    @property
    def hard_givens(self) -> tuple[int, int]:
        """The same of boards that only evaluation sees."""
        return self.hard_min_givens, self.hard_max_givens


def check_givens(what: str, low: int, high: int, digits: int) -> None:
    """Refuses a range of givens that cannot be.

    Args:
      what: is refused, for the message.
      low: fewest cells given.
      high: most of them.
      digits: of a board, of which some cell has to be left empty.

    Raises:
      UserError: naming the range and the rule.
    """
    if not 1 <= low <= high:
        raise UserError(
            f"{what} is {low} to {high}, but has to begin at 1 or more, and end no "
            "lower"
        )
    if high >= digits**2:
        raise UserError(
            f"{what} is {low} to {high}, but a board has {digits**2} cells, of which "
            "one at least has to be empty"
        )
