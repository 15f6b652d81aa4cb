"""Rules, solver and carved boards, against counting by hand on 4 x 4 cells."""

import itertools

import numpy as np
import pytest

from ebt_jax.data import sudoku

SMALL = sudoku.make_rules(2, 2)
OBLONG = sudoku.make_rules(2, 3)
WHOLE = sudoku.make_rules(3, 3)
RULES = pytest.mark.parametrize("rules", [SMALL, OBLONG, WHOLE], ids=["4", "6", "9"])


def rngs(count, seed=0):
    return [np.random.default_rng([seed, number]) for number in range(count)]


@pytest.fixture(scope="module")
def every_grid():
    """All solved boards of 4 x 4 cells, row by row; `[grids, cells]`."""
    rows = np.array(list(itertools.permutations(range(1, 5))))
    found = []
    for four in itertools.product(range(24), repeat=4):
        grid = rows[list(four)]
        columns = all(len(set(grid[:, c])) == 4 for c in range(4))
        if columns and all(
            len(set(grid[r : r + 2, c : c + 2].flat)) == 4
            for r in (0, 2)
            for c in (0, 2)
        ):
            found.append(grid.reshape(-1))
    return np.array(found)


def carved(rules, count, least=0, seed=0):
    """Solved boards and which of their cells are enough, `[cells, boards]`."""
    drawn = rngs(count, seed)
    grids = sudoku.random_grids(rules, drawn)
    order = np.stack([rng.permutation(rules.cells) for rng in drawn], axis=-1)
    return grids, sudoku.carve(rules, grids, order, least)


def test_units_are_rows_columns_and_boxes():
    assert OBLONG.units[1].tolist() == [6, 7, 8, 9, 10, 11]
    assert OBLONG.units[6 + 2].tolist() == [2, 8, 14, 20, 26, 32]
    assert OBLONG.units[12 + 3].tolist() == [15, 16, 17, 21, 22, 23]
    assert sorted(WHOLE.units[18:].flat) == list(range(81))


def test_solutions_are_counted_as_by_trying_every_grid(every_grid):
    assert len(every_grid) == 288
    rng = np.random.default_rng(0)
    puzzles = every_grid[rng.integers(288, size=200)]
    puzzles = np.where(rng.random(puzzles.shape) < 0.3, puzzles, 0)
    # Digits that contradict each other, in every tenth.
    puzzles[::10, :2] = 1
    fits = (puzzles[:, None] == every_grid[None]) | (puzzles[:, None] == 0)
    expected = fits.all(axis=-1).sum(axis=-1)
    assert {0, 1, 2} < set(expected)
    states = sudoku.candidates_of(SMALL, puzzles.T)
    counts, first = sudoku.solve(SMALL, states, 1000)
    np.testing.assert_array_equal(counts, expected)
    np.testing.assert_array_equal(
        sudoku.solve(SMALL, states, 2)[0], np.minimum(expected, 2)
    )
    for puzzle, board, count in zip(puzzles, first.T, expected, strict=True):
        if count:
            assert sudoku.is_solution(SMALL, board)
            assert (board == puzzle)[puzzle > 0].all()
        else:
            assert not board.any()


@RULES
def test_random_grids_keep_to_the_rules_and_depend_on_their_generator(rules):
    grids = sudoku.random_grids(rules, rngs(20))
    assert all(sudoku.is_solution(rules, grid) for grid in grids.T)
    assert len(np.unique(grids.T, axis=0)) > 15
    alone = sudoku.random_grids(rules, rngs(20)[7:8])
    np.testing.assert_array_equal(alone[:, 0], grids[:, 7])
    broken = grids[:, 0].copy()
    broken[0] = broken[1]
    assert not sudoku.is_solution(rules, broken)


@RULES
def test_carved_boards_have_one_solution_and_nothing_to_spare(rules):
    grids, given = carved(rules, 6)
    puzzles = np.where(given, grids, 0)
    counts, first = sudoku.solve(rules, sudoku.candidates_of(rules, puzzles), 2)
    assert (counts == 1).all()
    np.testing.assert_array_equal(first, grids)
    for board in range(2):
        for cell in np.flatnonzero(given[:, board]):
            fewer = puzzles[:, [board]].copy()
            fewer[cell] = 0
            states = sudoku.candidates_of(rules, fewer)
            assert sudoku.solve(rules, states, 2)[0] == 2


def test_carving_stops_at_the_least():
    _, given = carved(WHOLE, 8, least=40)
    assert (given.sum(axis=0) == 40).all()


def test_a_board_that_needs_trying_is_not_solved_by_singles():
    grids, given = carved(WHOLE, 30)
    puzzles = np.where(given, grids, 0)
    alone = sudoku.solved_by_singles(WHOLE, puzzles)
    assert 0 < alone.sum() < 30  # carved as far as can be, and unlike each other
    left, wrong = sudoku.propagate(WHOLE, sudoku.candidates_of(WHOLE, puzzles))
    assert not wrong.any()
    # What is concluded is true: the solution is never struck out.
    assert (left & sudoku.candidates_of(WHOLE, grids) > 0).all()


@RULES
def test_symmetries_keep_rules_and_solutions(rules):
    grids, given = carved(rules, 1)
    rng, seen = np.random.default_rng(3), set()
    for _ in range(8):
        source, names = sudoku.draw_symmetry(rules, rng)
        assert sorted(source) == list(range(rules.cells))
        grid = names[grids[source, 0]]
        puzzle = np.where(given[source, 0], grid, 0)
        assert sudoku.is_solution(rules, grid)
        states = sudoku.candidates_of(rules, puzzle[:, None])
        counts, first = sudoku.solve(rules, states, 2)
        assert counts == 1 and (first[:, 0] == grid).all()
        seen.add(grid.tobytes())
    assert len(seen) > 4
