"""The rules of Sudoku, a solver, and boards with one solution.

Everything is done for many boards at once. What a cell may still be is a set of bits,
and arrays are `[cells, boards]`, so that an operation runs along boards. Cells are
numbered in rows from the top left, digits from 1; 0 is an empty cell.

A board of few givens is carved from a solved one: cells are emptied in a random order,
each unless that lets in a second solution. Whatever is given besides what is left, the
solution stays the only one, so one carved board makes boards of every difficulty.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

STATES = 4096  # states searched at a time, so that memory stays small


class Rules(NamedTuple):
    """A size of board.

    Attributes:
      box_rows: rows of a box.
      box_columns: its columns.
      units: rows, columns, boxes: their cells, int64 `[3 digits, digits]`.
      unit_of: row, column and box of a cell as rows of `units`, int64 `[3, cells]`.
    """

    box_rows: int
    box_columns: int
    units: np.ndarray
    unit_of: np.ndarray

    @property
    def digits(self) -> int:
        """Digits, and cells of a row, a column or a box."""
        return self.box_rows * self.box_columns

    @property
    def cells(self) -> int:
        """Cells of a board."""
        return self.digits**2

    @property
    def full(self) -> np.uint16:
        """The set of all digits."""
        return np.uint16(2**self.digits - 1)


@functools.lru_cache(maxsize=8)
def make_rules(box_rows: int, box_columns: int) -> Rules:
    """The rules of boards with boxes of a size."""
    digits = box_rows * box_columns
    row, column = np.divmod(np.arange(digits**2), digits)
    box = row // box_rows * box_rows + column // box_columns
    unit_of = np.stack([row, digits + column, 2 * digits + box])
    units = np.stack(
        [np.flatnonzero(unit_of[u // digits] == u) for u in range(3 * digits)]
    )
    return Rules(box_rows, box_columns, units, unit_of)


def candidates_of(rules: Rules, puzzles: np.ndarray) -> np.ndarray:
    """What the cells of puzzles may be before anything is concluded.

    Args:
      rules: of the boards.
      puzzles: digits, 0 where empty, `[cells, boards]`.

    Returns:
      Sets of digits, uint16 `[cells, boards]`.
    """
    known = np.left_shift(1, np.maximum(puzzles, 1).astype(np.int64) - 1)
    return np.where(puzzles > 0, known, rules.full).astype(np.uint16)


def digits_of(candidates: np.ndarray) -> np.ndarray:
    """The digits of cells that have one candidate, else 0; uint8, like candidates."""
    one = np.bitwise_count(candidates) == 1
    return np.where(one, np.bitwise_count(candidates - 1) + 1, 0).astype(np.uint8)


def propagate(rules: Rules, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Concludes by singles, until nothing follows.

    A digit that is known leaves the other cells of its row, column and box (naked
    singles); a digit that has one place left there is put into it (hidden singles).

    Args:
      rules: of the boards.
      candidates: `[cells, boards]`, see `candidates_of`.

    Returns:
      What is left of them, and whether that contradicts the rules, bool `[boards]`.
    """
    candidates = candidates.copy()
    wrong = np.zeros(candidates.shape[1], bool)
    active = np.arange(candidates.shape[1])
    while active.size:
        old = candidates[:, active]
        new, failed = _conclude(rules, old)
        candidates[:, active] = new
        wrong[active] = failed
        active = active[~failed & (new != old).any(axis=0)]
    return candidates, wrong


def solve(
    rules: Rules, candidates: np.ndarray, limit: int
) -> tuple[np.ndarray, np.ndarray]:
    """Counts solutions, by conclusions and, where they end, by trying.

    Args:
      rules: of the boards.
      candidates: `[cells, boards]`, see `candidates_of`.
      limit: a board is left at so many solutions.

    Returns:
      Solutions, int64 `[boards]`, at most `limit`; and the first one found, digits
      uint8 `[cells, boards]`, 0 where there is none.
    """
    boards = candidates.shape[1]
    counts = np.zeros(boards, np.int64)
    first = np.zeros(candidates.shape, np.uint8)
    stack = [(np.arange(boards), candidates)]
    while stack:
        owner, states = stack.pop()
        wanted = counts[owner] < limit
        owner, states = owner[wanted], states[:, wanted]
        if owner.size > STATES:
            stack.append((owner[STATES:], states[:, STATES:]))
            owner, states = owner[:STATES], states[:, :STATES]
        states, wrong = propagate(rules, states)
        owner, states = owner[~wrong], states[:, ~wrong]
        sizes = np.bitwise_count(states)
        done = (sizes == 1).all(axis=0)
        new, at = np.unique(owner[done], return_index=True)
        new, at = new[counts[new] == 0], at[counts[new] == 0]
        first[:, new] = digits_of(states[:, done][:, at])
        np.add.at(counts, owner[done], 1)
        owner, states, sizes = owner[~done], states[:, ~done], sizes[:, ~done]
        if owner.size:
            stack.append(_branches(owner, states, sizes, rules.digits))
    return np.minimum(counts, limit), first


def solved_by_singles(rules: Rules, puzzles: np.ndarray) -> np.ndarray:
    """Whether puzzles `[cells, boards]` are solved without trying, bool `[boards]`."""
    left, wrong = propagate(rules, candidates_of(rules, puzzles))
    return ~wrong & (np.bitwise_count(left) == 1).all(axis=0)


def random_grids(rules: Rules, rngs: Sequence[np.random.Generator]) -> np.ndarray:
    """Solved boards, one for each generator, which alone decides it.

    Cells are filled where the fewest digits are possible, with a random one of them. An
    attempt that ends in a contradiction is given up, and another one begun.

    Returns:
      Digits, uint8 `[cells, boards]`.
    """
    grids = np.zeros((rules.cells, len(rngs)), np.uint8)
    pending = np.arange(len(rngs))
    while pending.size:
        shape = rules.cells, rules.digits
        ranks = np.stack([rngs[int(board)].random(shape) for board in pending], axis=-1)
        filled, good = _fill(rules, ranks)
        grids[:, pending[good]] = filled[:, good]
        pending = pending[~good]
    return grids


def carve(rules: Rules, grids: np.ndarray, order: np.ndarray, least: int) -> np.ndarray:
    """Which cells of solved boards are enough to know all others.

    Args:
      rules: of the boards.
      grids: solved, digits `[cells, boards]`.
      order: of cells, in which they are emptied if they can be, `[cells, boards]`.
      least: a board keeps so many givens. With 0 none of those that are left can be
        done without.

    Returns:
      Whether a cell is given, bool `[cells, boards]`.
    """
    solution = candidates_of(rules, grids)
    given = np.ones(grids.shape, bool)
    for cells in order:
        boards = np.flatnonzero(given.sum(axis=0) > least)
        cells = cells[boards]
        states = np.where(given[:, boards], solution[:, boards], rules.full)
        # With this cell empty there is a second solution if it can be another digit.
        place = np.arange(len(boards))
        states[cells, place] = rules.full & ~solution[cells, boards]
        removable = solve(rules, states, limit=1)[0] == 0
        given[cells[removable], boards[removable]] = False
    return given


def draw_symmetry(
    rules: Rules, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A random map of boards that keeps to the rules and keeps solutions unique.

    Digits are renamed; rows change places within their band, and bands do; columns and
    stacks likewise; and, of square boxes, half of the boards are transposed.

    Returns:
      Where each cell comes from, int64 `[cells]`, and what each digit becomes, uint8
      `[digits + 1]`, 0 for 0: `names[board[source]]` is the other board.
    """
    rows = _shuffled(rng, rules.box_columns, rules.box_rows)
    columns = _shuffled(rng, rules.box_rows, rules.box_columns)
    source = rows[:, None] * rules.digits + columns[None, :]
    if rules.box_rows == rules.box_columns and rng.random() < 0.5:
        source = source.T
    names = np.concatenate([[0], 1 + rng.permutation(rules.digits)]).astype(np.uint8)
    return source.reshape(-1), names


def is_solution(rules: Rules, grid: np.ndarray) -> bool:
    """Whether each digit stands once in each row, column and box of `[cells]`."""
    return bool((np.sort(grid[rules.units], -1) == 1 + np.arange(rules.digits)).all())


def _shuffled(rng: np.random.Generator, groups: int, size: int) -> np.ndarray:
    """Lines in another order, which keeps the groups together, `[groups * size]`."""
    within = [group * size + rng.permutation(size) for group in rng.permutation(groups)]
    return np.concatenate(within)


def _conclude(rules: Rules, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One round of `propagate`."""
    at = rules.unit_of
    single = np.bitwise_count(candidates) == 1
    known, clashing = _once_and_twice(rules, np.where(single, candidates, 0))
    possible, several = _once_and_twice(rules, candidates)
    around = known[at[0]] | known[at[1]] | known[at[2]]
    clash = clashing[at[0]] | clashing[at[1]] | clashing[at[2]]
    new = candidates & ~np.where(single, clash, around)
    hidden = possible & ~several
    here = new & (hidden[at[0]] | hidden[at[1]] | hidden[at[2]])
    # The only place of two digits is a contradiction: it is left with none.
    new = np.where(here > 0, np.where(here & (here - 1), 0, here), new)
    new = new.astype(np.uint16)
    failed = (new == 0).any(axis=0) | (possible != rules.full).any(axis=0)
    return new, failed


def _once_and_twice(
    rules: Rules, candidates: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Digits that are in some cell of a unit, and in two; `[units, boards]`."""
    once = np.zeros((len(rules.units), candidates.shape[1]), np.uint16)
    twice = np.zeros_like(once)
    for cells in rules.units.T:
        here = candidates[cells]
        twice |= once & here
        once |= here
    return once, twice


def _branches(
    owner: np.ndarray, states: np.ndarray, sizes: np.ndarray, digits: int
) -> tuple[np.ndarray, np.ndarray]:
    """States with each candidate of a cell that has the fewest, of those unknown."""
    cell = np.where(sizes > 1, sizes, digits + 1).argmin(axis=0)
    tried = states[cell, np.arange(owner.size)]
    bits = np.left_shift(1, np.arange(digits)).astype(np.uint16)
    state, digit = np.nonzero(tried[:, None] & bits[None])
    made = states[:, state]
    made[cell[state], np.arange(state.size)] = bits[digit]
    return owner[state], made


def _fill(rules: Rules, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An attempt at solved boards; digits `[cells, boards]`, and whether it succeeded.

    Args:
      rules: of the boards.
      ranks: of the possible digits of a cell that is filled the one with the highest is
        taken, `[cells, digits, boards]`.
    """
    states = np.full((rules.cells, ranks.shape[2]), rules.full, np.uint16)
    bits = np.left_shift(1, np.arange(rules.digits)).astype(np.uint16)
    good = np.ones(ranks.shape[2], bool)
    active = np.arange(ranks.shape[2])
    while active.size:
        new, wrong = propagate(rules, states[:, active])
        states[:, active] = new
        good[active[wrong]] = False
        sizes = np.bitwise_count(new)
        going = ~wrong & (sizes > 1).any(axis=0)
        active, new, sizes = active[going], new[:, going], sizes[:, going]
        cell = np.where(sizes > 1, sizes, rules.digits + 1).argmin(axis=0)
        place = np.arange(active.size)
        allowed = (new[cell, place][:, None] & bits[None]) > 0
        chosen = np.where(allowed, ranks[cell, :, active], -1.0).argmax(axis=1)
        states[cell, active] = bits[chosen]
    return digits_of(states), good
