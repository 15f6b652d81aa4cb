"""What came of boards: numbers by hand, intervals, and the comparison of runs."""

import json

import numpy as np
import pytest

from ebt_jax.data import sudoku
from ebt_jax.errors import UserError
from ebt_jax.evaluation.boards import judge as judging
from ebt_jax.evaluation.boards.compare import bootstrap, compare
from ebt_jax.evaluation.boards.outcomes import Outcomes, corrupted


def outcomes(solved, energy=None):
    solved = np.asarray(solved, float)
    boards = solved.shape[-1]
    return Outcomes(
        solved,
        0.5 + solved / 2,
        None if energy is None else np.asarray(energy, float),
        np.arange(boards) + 10,
        np.arange(boards) % 2 == 0,
    )


def test_steps_and_kinds_of_boards_are_told_apart():
    # One attempt, three steps, four boards.
    found = judging.judge(outcomes([[[0, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 0]]]), 2, 0)
    assert found["solved"][0] == 0.5 and found["cells"][0] == 0.75
    assert [row["solved"][0] for row in found["curve"]] == [0, 0.5, 0.75]
    assert found["thinking"][0] == pytest.approx(0.5)
    assert found["longer"][0] == pytest.approx(0.25)
    assert found["singles"]["solved"][0] == 1 and found["singles"]["share"] == 0.5
    assert found["singles"]["others_solved"][0] == 0
    assert found["each"] == [1, 0, 1, 0] and found["givens"] == 11.5
    assert "auroc" not in found and "best_of" not in found


def test_the_attempt_of_lowest_energy_against_a_random_one():
    # Four attempts of one step at three boards; the first two boards by energy rightly.
    solved = [[[1, 0, 0]], [[0, 1, 0]], [[0, 0, 0]], [[0, 0, 1]]]
    energy = [[[-2, 0, 5]], [[1, -3, -1]], [[1, 0, 0]], [[1, 0, 2]]]
    found = judging.judge(outcomes(solved, energy), 1, 0)
    two, four = found["best_of"]
    assert (two["attempts"], four["attempts"]) == (2, 4)
    assert two["random"][0] == pytest.approx(1 / 3)
    assert two["lowest"][0] == two["oracle"][0] == pytest.approx(2 / 3)
    assert four["random"][0] == pytest.approx(0.25)
    assert four["lowest"][0] == pytest.approx(2 / 3)
    assert four["oracle"][0] == 1
    assert four["gain"][0] == pytest.approx(2 / 3 - 0.25)
    # Energies of solved ones: -2, -3, 2; of the nine others 0, 5, 1, -1, 1, 0, 0, 1, 0.
    assert found["auroc"][0] == pytest.approx((9 + 9 + 1) / 27)


def test_intervals_hold_what_they_say():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        values = (rng.random(100) < 0.3).astype(float)
        mean, low, high = judging.interval(rng, values)
        assert low <= mean <= high
        inside += low <= 0.3 <= high
    assert 178 <= inside <= 199  # 95 % of 200, within four standard deviations
    assert judging.interval(rng, np.zeros(32)) == [
        0,
        0,
        pytest.approx(0.1072, abs=1e-4),
    ]
    assert judging.interval(rng, np.ones(32))[1] == pytest.approx(0.8928, abs=1e-4)
    alike = judging.difference(rng, values, values)
    np.testing.assert_allclose(alike, 0, atol=1e-9)


def test_energies_of_the_solution_are_compared_board_by_board():
    energies = {
        "solution": np.array([0.0, 0.0, 0.0, 0.0]),
        "one cell": np.array([1.0, 1.0, 1.0, -1.0]),
        "half the cells": np.array([1.0, 1.0, 1.0, 1.0]),
        "own": np.array([0.0, 0.0, -1.0, 1.0]),
        "wrong": np.array([False, False, True, True]),
    }
    found = judging.judge_energies(energies, 0)
    assert found["one cell"][0] == 0.75 and found["half the cells"][0] == 1
    assert found["own wrong answers"][0] == 0.5
    none = judging.judge_energies(energies | {"wrong": np.zeros(4, bool)}, 0)
    assert none["own wrong answers"] is None


def test_corruption_changes_empty_cells_and_as_many_as_it_says():
    rules = sudoku.make_rules(2, 2)
    rngs = [np.random.default_rng(number) for number in range(30)]
    solution = sudoku.random_grids(rules, rngs).T.astype(np.int32)
    puzzle = np.where(rngs[0].random(solution.shape) < 0.4, solution, 0)
    empty = (puzzle == 0).sum(axis=1)
    for half, expected in ((False, np.ones(30)), (True, (empty + 1) // 2)):
        made = corrupted(rngs[0], puzzle, solution, half)
        changed = made != solution
        np.testing.assert_array_equal(changed.sum(axis=1), expected)
        assert not (changed & (puzzle > 0)).any()
        assert made.min() >= 1 and made.max() <= 4


def test_tables_show_what_there_is():
    found = judging.judge(outcomes([[[1, 0]], [[1, 1]]], [[[0, 1]], [[0, 0]]]), 1, 0)
    found["energy"] = {
        **{name: [1.0, 0.9, 1.0] for name in ("one cell", "half the cells")},
        "own wrong answers": None,
    }
    text = judging.tables({"4-6": found})
    assert "lowest energy" in text and "100.0% (90.0 to 100.0)" in text
    plain = judging.judge(outcomes([[[1, 0]]]), 1, 0)
    assert "energy" not in judging.tables({"4-6": plain})


def write(folder, each, boards=None):
    number = [float(np.mean(each)), 0.0, 1.0]
    row = {"each": each, "boards": boards or len(each), "thinking": number}
    (folder / "boards").mkdir(parents=True)
    text = json.dumps({"givens": {"4-6": row}})
    (folder / "boards" / "held_out.json").write_text(text)
    return folder


def test_methods_are_compared_over_seeds(tmp_path):
    good = [write(tmp_path / f"ebt-{i}", [1, 1, 1, 0] * 50) for i in range(3)]
    bad = [write(tmp_path / f"plain-{i}", [0, 0, 1, 0] * 50) for i in range(2)]
    table = compare([*good, *bad])
    line = next(row for row in table.splitlines() if row.startswith("ebt"))
    assert line.split()[1:3] == ["3", "75.0%"]
    assert "+50.0% (+4" in line and "75.0 75.0 75.0" in line
    assert "100.0% (98.1 to 100.0)" in compare([write(tmp_path / "all-0", [1] * 200)])
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="has no boards/held_out.json; run `ebt eval"):
        compare([tmp_path / "bare"])
    odd = write(tmp_path / "odd-0", [1, 0], 2)
    with pytest.raises(UserError, match="give --givens and --sequences alike"):
        compare([*good, odd])
    with pytest.raises(UserError, match="no workdir is given"):
        compare([])


def test_the_bootstrap_of_methods_draws_the_same_boards_for_all():
    rng = np.random.default_rng(0)
    each = (rng.random((1, 100)) < 0.5).astype(float)
    drawn = bootstrap(rng, {"a": each, "b": np.concatenate([each, each])})
    np.testing.assert_allclose(drawn["a"], drawn["b"])
    assert 0.03 < drawn["a"].std() < 0.07
