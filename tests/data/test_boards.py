"""Boards to train and test on: seeded, apart from each other, as hard as asked."""

import dataclasses
import itertools

import numpy as np
import pytest

from ebt_jax.data import boards, sudoku
from ebt_jax.data.board_config import BoardConfig
from ebt_jax.errors import UserError

SIX = BoardConfig(2, 3, 18, 26, 10, 14, held_out_boards=40, pool=20)
RULES = sudoku.make_rules(2, 3)


@pytest.fixture(scope="module")
def training():
    return boards.train_examples(SIX, 5)


@pytest.fixture(scope="module")
def hard():
    return boards.held_out_examples(SIX, SIX.hard_givens)


def first(examples, count):
    """The first boards, each array stacked."""
    rows = [examples[index] for index in range(count)]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def test_boards_are_as_hard_as_asked_and_have_one_solution(training, hard):
    for examples, (low, high) in ((training, SIX.givens), (hard, SIX.hard_givens)):
        batch = first(examples, 40)
        puzzle, solution = batch["puzzle"], batch["solution"]
        given = (puzzle > 0).sum(axis=1)
        assert low <= given.min() < given.max() <= high
        assert (puzzle == solution)[puzzle > 0].all()
        states = sudoku.candidates_of(RULES, puzzle.T)
        counts, found = sudoku.solve(RULES, states, 2)
        assert (counts == 1).all()
        np.testing.assert_array_equal(found.T, solution)
        assert len(np.unique(solution, axis=0)) > 35


def test_no_board_of_evaluation_has_the_solution_of_one_of_training(training, hard):
    trained = first(training, 300)["solution"]
    tested = first(hard, 40)["solution"]
    assert not any(boards.is_held_out(grid, SIX.held_out) for grid in trained)
    assert all(boards.is_held_out(grid, SIX.held_out) for grid in tested)
    small = BoardConfig(2, 2, 7, 11, 4, 6, held_out=0.3, pool=20)
    few = first(boards.train_examples(small, 0), 400)["solution"]
    others = first(boards.held_out_examples(small, (4, 6), 60), 60)["solution"]
    whole = {grid.tobytes() for grid in few}, {grid.tobytes() for grid in others}
    assert len(whole[0] | whole[1]) > 150  # of 288
    assert not whole[0] & whole[1]


def test_a_board_depends_on_seed_and_place_alone(training):
    again = boards.train_examples(SIX, 5)
    other = boards.train_examples(SIX, 6)
    for place in (0, 17, 10**9):
        assert all((training[place][n] == v).all() for n, v in again[place].items())
        assert (training[place]["puzzle"] != other[place]["puzzle"]).any()


def test_held_out_boards_do_not_depend_on_how_many_there_are(hard):
    fewer = boards.held_out_examples(SIX, SIX.hard_givens, 7)
    assert len(fewer) == 7
    for index in range(7):
        np.testing.assert_array_equal(fewer[index]["puzzle"], hard[index]["puzzle"])


def test_processes_and_resumed_runs_read_the_same_boards(training):
    options = {"batch_size": 6, "num_workers": 0}
    whole = boards.train_batches(training, rows=range(6), **options)
    parts = [boards.train_batches(training, rows=r, **options) for r in ([0, 2], [5])]
    batches = [next(whole) for _ in range(3)]
    assert whole.next_example == 18
    for batch in batches:
        for part, rows in zip(parts, ([0, 2], [5]), strict=True):
            np.testing.assert_array_equal(next(part)["puzzle"], batch["puzzle"][rows])
    parts[0].seek(12)
    np.testing.assert_array_equal(
        next(parts[0])["puzzle"], batches[2]["puzzle"][[0, 2]]
    )


def test_the_last_held_out_batch_is_filled_up(hard):
    batches = list(boards.held_out_batches(hard, batch_size=16, sequences=20))
    assert [int(batch["weights"].sum()) for batch in batches] == [16, 4]
    indices = itertools.chain(
        *(batch["index"][batch["weights"] > 0] for batch in batches)
    )
    assert list(indices) == list(range(20))
    assert len(boards.held_out_batches(hard, batch_size=16)) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"box_rows": 1}, "board.box_rows is 1, but has to be at least 2"),
        ({"box_rows": 5, "box_columns": 4}, "5 x 4 take 20 digits, but there are at"),
        ({"min_givens": 30}, "min_givens to max_givens is 30 to 26"),
        ({"max_givens": 36}, "a board has 36 cells, of which one at least has to be e"),
        ({"hard_min_givens": 0}, "hard_max_givens is 0 to 14"),
        ({"held_out": 0.0}, "board.held_out is 0.0, but has to be a share"),
        ({"pool": 0}, "board.pool is 0, but has to be positive"),
        ({"held_out_boards": 0}, "board.held_out_boards is 0"),
        ({"seed": -1}, "board.seed is -1"),
    ],
)
def test_errors_of_configs(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SIX, **changes)


def test_boards_that_there_are_not():
    few = r"none has a single solution with 5 cells given or fewer; raise"
    with pytest.raises(UserError, match=few):
        boards.held_out_examples(SIX, (4, 5))
    with pytest.raises(UserError, match="the range of givens is 12 to 40"):
        boards.held_out_examples(SIX, (12, 40))
