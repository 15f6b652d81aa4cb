"""Batches of Sudoku boards, for training and for evaluation.

======== ================== ====================================================
puzzle   int32 [b, cells]   the digits that are given, 0 where a cell is empty
solution int32 [b, cells]   the digits of all cells, the only ones that fit
weights  float32 [b]        0 where a board does not count
index    int32 [b]          names a board in its split, whatever the batch size
======== ================== ====================================================

Which solved boards are held out is written in them: a hash of the digits decides. So no
board of evaluation has the solution of a board that was ever trained on, whatever is
drawn; one that is the same but for a symmetry is another board here. Boards are drawn
from a pool of carved ones: a symmetry, and which cells are given besides the carved
ones. An example depends on the seed and its place alone; order and processes are those
of `ebt_jax.data.pipeline`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ebt_jax.data.board_config import BoardConfig, check_givens
from ebt_jax.data.pipeline import HeldOutBatches, TrainBatches, local_size
from ebt_jax.data.sudoku import Rules, carve, draw_symmetry, make_rules, random_grids
from ebt_jax.errors import UserError

Board = dict[str, np.ndarray]

_MADE = 512  # boards carved at a time
_TRIES = 4096  # carved boards, or symmetries, before there are said to be none
_TRAIN, _HELD_OUT = 0, 1  # splits, as seeds


class Pool(NamedTuple):
    """Carved boards.

    Attributes:
      grids: digits, uint8 `[boards, cells]`.
      cores: cells that are enough to know the others, bool `[boards, cells]`.
    """

    grids: np.ndarray
    cores: np.ndarray


@dataclasses.dataclass(frozen=True)
class BoardExamples:
    """Boards of a split, with random access.

    Attributes:
      rules: of the boards.
      pool: that they are drawn from.
      givens: fewest and most cells given; each number between is as likely, as far as
        the pool's board allows it.
      share: of all solved boards that is held out.
      held_out: whether these are.
      seed: of what is drawn.
      count: how many there are; of training boards there is no end.
    """

    rules: Rules
    pool: Pool
    givens: tuple[int, int]
    share: float
    held_out: bool
    seed: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Board:
        """A board; of those held out each is of another one of the pool."""
        rng = np.random.default_rng([self.seed, int(self.held_out), index])
        boards = len(self.pool.grids)
        chosen = index if self.held_out else int(rng.integers(boards))
        grid, core = self._turned(chosen, rng)
        least = max(self.givens[0], int(core.sum()))
        wanted = int(rng.integers(least, self.givens[1] + 1))
        others = rng.permutation(np.flatnonzero(~core))
        given = core.copy()
        given[others[: wanted - int(core.sum())]] = True
        return {
            "puzzle": np.where(given, grid, 0).astype(np.int32),
            "solution": grid.astype(np.int32),
            "weights": np.ones((), np.float32),
            "index": np.array(index % 2**31, np.int32),
        }

    def _turned(
        self, chosen: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """A symmetry of a board of the pool that is of this split."""
        for _ in range(_TRIES):
            source, names = draw_symmetry(self.rules, rng)
            grid = names[self.pool.grids[chosen][source]]
            if is_held_out(grid, self.share) == self.held_out:
                return grid, self.pool.cores[chosen][source]
        raise UserError(
            f"board.held_out is {self.share}, which leaves no solved board of "
            f"{self.rules.cells} cells {'held out' if self.held_out else 'to train on'}"
            "; bring it nearer to 0.5"
        )


def is_held_out(grid: np.ndarray, share: float) -> bool:
    """Whether a solved board `[cells]` is of the share that training never sees."""
    digest = hashlib.blake2b(grid.astype(np.uint8).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64


def train_examples(board: BoardConfig, seed: int) -> BoardExamples:
    """Boards to train on, without end.

    Args:
      board: which.
      seed: of their order and of what is drawn of each.

    Raises:
      UserError: if there are no boards of so few givens.
    """
    rules = make_rules(board.box_rows, board.box_columns)
    pool = make_pool(rules, (board.seed, _TRAIN), board.pool, board.givens)
    return BoardExamples(
        rules, pool, board.givens, board.held_out, False, seed, sys.maxsize
    )


def held_out_examples(
    board: BoardConfig, givens: tuple[int, int], count: int = 0
) -> BoardExamples:
    """Boards of which training sees none, the same for runs of every seed.

    Args:
      board: which.
      givens: fewest and most cells given.
      count: how many, from the first; 0: `board.held_out_boards`.

    Raises:
      UserError: for a range of givens that cannot be, or that no board is found for.
    """
    rules = make_rules(board.box_rows, board.box_columns)
    check_givens("the range of givens", *givens, rules.digits)
    count = count or board.held_out_boards
    pool = make_pool(rules, (board.seed, _HELD_OUT), count, givens)
    return BoardExamples(rules, pool, givens, board.held_out, True, board.seed, count)


def train_batches(
    examples: BoardExamples,
    *,
    batch_size: int,
    rows: Sequence[int],
    num_workers: int,
) -> TrainBatches:
    """Batches of `train_examples`; arguments are those of `TrainBatches`."""
    return TrainBatches(
        examples, batch_size=batch_size, rows=rows, num_workers=num_workers
    )


def held_out_batches(
    examples: BoardExamples, *, batch_size: int, sequences: int = 0
) -> HeldOutBatches:
    """Batches for evaluation: every board once, in a fixed order.

    Args:
      examples: of `held_out_examples`.
      batch_size: boards at once.
      sequences: how many, from the first; 0: all.
    """
    local_size(batch_size, 1)
    count = min(sequences, len(examples)) if sequences else len(examples)
    return HeldOutBatches(examples, count, batch_size, 0, 1)


def make_pool(
    rules: Rules, seed: tuple[int, ...], count: int, givens: tuple[int, int]
) -> Pool:
    """Carved boards; which they are depends on seed and range alone.

    Args:
      rules: of the boards.
      seed: of all of them; the number of a board is added to it.
      count: how many.
      givens: the fewest cells given that boards are carved down to, and the most that
        may be left.

    Raises:
      UserError: if next to none can be carved so far.
    """
    grids: list[np.ndarray] = []
    cores: list[np.ndarray] = []
    tried = found = 0
    while found < count:
        numbers = range(tried, tried + min(_MADE, max(count, 64)))
        rngs = [np.random.default_rng([*seed, number]) for number in numbers]
        made = random_grids(rules, rngs)
        order = np.stack([rng.permutation(rules.cells) for rng in rngs], axis=-1)
        core = carve(rules, made, order, givens[0])
        kept = core.sum(axis=0) <= givens[1]
        grids.append(made.T[kept])
        cores.append(core.T[kept])
        tried, found = tried + len(rngs), found + int(kept.sum())
        if tried >= _TRIES and not found:
            raise UserError(
                f"of {tried} boards of {rules.cells} cells none has a single solution "
                f"with {givens[1]} cells given or fewer; raise the range of givens"
            )
    return Pool(np.concatenate(grids)[:count], np.concatenate(cores)[:count])
