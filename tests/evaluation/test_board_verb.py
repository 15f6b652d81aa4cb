"""Boards from end to end: trained, continued, evaluated; and each error of the verb."""

import json
import pathlib

import jax
import pytest

from ebt_jax import cli
from ebt_jax.training import checkpoint

SUDOKU = pathlib.Path(__file__).parents[2] / "experiments" / "sudoku.py"
QUICKER = (
    "--config.model.num_layers=1",
    "--config.eval.curve_steps=2",
    "--config.mesh.data=4",
    "--config.log.plots=False",
    "--config.log.tensorboard=False",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Tiny runs of two methods."""
    path = tmp_path_factory.mktemp("boards")
    for method in ("ebt", "recurrent"):
        config = f"--config={SUDOKU}:tiny,{method}"
        assert cli.run(["train", config, f"--workdir={path / method}", *QUICKER]) == 0
    return path


def test_a_run_says_how_many_boards_it_solves_and_shows_some(runs):
    rows = (runs / "ebt" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(rows[-1])
    assert last["step"] == 4
    assert {"eval/solved", "eval/cell_accuracy", "eval/energy_gap"} < set(last)
    assert "given," in (runs / "ebt" / "boards.txt").read_text()
    summary = json.loads((runs / "ebt" / "summary.json").read_text())
    assert {"thinking/solved/step_1", "thinking/cell_accuracy/step_2"} < set(summary)


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(runs, tmp_path):
    path = tmp_path / "run"
    argv = ["train", f"--config={SUDOKU}:tiny,ebt", f"--workdir={path}", *QUICKER]
    assert cli.run([*argv, "--steps=2", "--config.optim.schedule_steps=4"]) == 0
    assert cli.run([*argv, "--steps=4", "--config.optim.schedule_steps=4"]) == 0
    straight = checkpoint.restore_params(runs / "ebt")
    again = checkpoint.restore_params(path)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), straight, again)
    assert all(jax.tree.leaves(same))


def test_boards_are_evaluated_by_givens_steps_and_attempts(runs, capsys):
    workdir = f"--workdir={runs / 'ebt'}"
    flags = ("--sequences=8", "--batch_size=8", "--attempts=2", "--most_steps=3")
    assert cli.run(["evaluate", workdir, "--givens=5-6,9-10", *flags, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(printed["givens"]) == ["5-6", "9-10"] and printed["kind"] == "ebt"
    kept = json.loads((runs / "ebt" / "boards" / "held_out.json").read_text())
    assert kept == printed
    found = printed["givens"]["5-6"]
    assert found["boards"] == 8 and 5 <= found["givens"] <= 6
    assert [row["step"] for row in found["curve"]] == [1, 2, 3]
    assert [row["attempts"] for row in found["best_of"]] == [2]
    assert set(found["energy"]) == {"one cell", "half the cells", "own wrong answers"}
    # The first attempt is what all other results are of.
    steps = found["results"]
    assert steps["cell_accuracy"] == pytest.approx(steps["cell_accuracy/step_3"])


def test_a_recurrent_run_takes_other_numbers_of_passes(runs, capsys):
    flags = (f"--workdir={runs / 'recurrent'}", "--givens=5-6", "--sequences=8")
    argv = ["evaluate", *flags, "--batch_size=8", "--most_steps=5"]
    assert cli.run([*argv, "--think=fixed:steps=4"]) == 0
    assert "solved, 5-6 given" in capsys.readouterr().out
    file = runs / "recurrent" / "boards" / "held_out.json"
    found = json.loads(file.read_text())["givens"]["5-6"]
    assert found["steps"] == 4 and len(found["curve"]) == 5
    assert "energy" not in found and "best_of" not in found


@pytest.mark.parametrize(
    ("method", "flag", "message"),
    [
        ("ebt", "--givens=24", "--givens has '24', but takes ranges of cells given"),
        ("ebt", "--givens=9-20", "the range of givens is 9 to 20, but a board has 16"),
        ("ebt", "--data=a.txt", "--data is of text, images and video, but boards are"),
        ("ebt", "--packing=concat", "--packing is of text, but the run is of board"),
        ("ebt", "--horizons=2", "--horizons is of video, but the run is of board"),
        ("recurrent", "--attempts=2", "--attempts is of energies, which a recurrent"),
        (
            "recurrent",
            "--think=best_of:n=2",
            "recurrent, which takes no policy but fix",
        ),
    ],
)
def test_errors(runs, method, flag, message, capsys):
    assert cli.run(["evaluate", f"--workdir={runs / method}", flag]) == 2
    assert message in capsys.readouterr().err


def test_verbs_that_are_not_of_boards_say_so_and_others_work(runs, tmp_path, capsys):
    workdir = f"--workdir={runs / 'ebt'}"
    assert cli.run(["generate", workdir, "--prompt=1"]) == 2
    assert "`ebt evaluate` fill others" in capsys.readouterr().err
    argv = [f"--config={SUDOKU}:tiny", f"--output={tmp_path / 'out'}"]
    assert cli.run(["prepare", *argv]) == 2
    assert "boards are made while a run reads them" in capsys.readouterr().err
    file = tmp_path / "report.html"
    assert cli.run(["report", f"--workdir={runs / 'ebt'}", f"--out={file}"]) == 0
    assert "boards solved" in file.read_text()
    capsys.readouterr()
    assert cli.run(["inspect", argv[0], *QUICKER[:1], "--config.mesh.data=4"]) == 0
    assert "8 x 16 = 128 cells" in capsys.readouterr().out
