"""`ebt compare`: differences by seed, their intervals, cost; mistakes are one line."""

import json
import math

import pytest
from fake_runs import write_run
from scipy import stats

from ebt_jax import cli
from ebt_jax.evaluation.side_by_side import difference, side_by_side, table

LOSSES = {"transformer_pp": (2.0, 2.2, 2.1), "ebt": (1.9, 2.0, 2.0)}


@pytest.fixture
def runs(tmp_path):
    for kind, losses in LOSSES.items():
        for seed, loss in enumerate(losses):
            curve = (loss, loss - 0.1, loss - 0.2) if kind == "ebt" else ()
            write_run(tmp_path, f"{kind}-{seed}", kind, 10, seed, y=loss, curve=curve)
    return tmp_path


def test_differences_are_taken_seed_by_seed_with_students_interval():
    one, other = (dict(enumerate(losses)) for losses in LOSSES.values())
    found = difference(other, one)
    each = [-0.1, -0.2, -0.1]
    expected = stats.ttest_1samp(each, 0).confidence_interval(0.95)
    assert found.mean == pytest.approx(sum(each) / 3) and found.seeds == 3
    assert (found.low, found.high) == pytest.approx(tuple(expected))
    single = difference({0: 1.0, 5: 9.0}, {0: 1.5, 6: 0.0})
    assert single.mean == -0.5 and math.isnan(single.low) and single.seeds == 1


def test_a_table_of_methods(runs, capsys):
    write_run(runs, "late-0", "ebt", 20, 0, finished=False)
    assert cli.run(["compare", f"--runs={runs}/*"]) == 0
    head, line, first, second, note = capsys.readouterr().out.splitlines()
    assert len({head.count("|"), line.count("|"), first.count("|")}) == 1
    assert "eval/nll, mean (range)" in head and "to transformer_pp" in head
    assert "2.1000 (2.0000 to 2.2000)" in first and "1,280" in first
    assert "-0.1333 (-0.2768 to +0.0101)" in second and "1.00 x" in second
    assert "1.9667, 1.8667, 1.7667" in second and "after 1, 2, 3 steps" in head
    assert note == "note: 1 runs have not finished and are left out: late-0"


def test_what_json_says(runs, capsys):
    flags = [f"--runs={runs}/*", "--json", "--baseline=ebt", "--y=eval/nll/step_1"]
    assert cli.run(["compare", *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["methods"]) == ["ebt", "transformer_pp"]
    assert found["methods"]["ebt"]["seconds"] == pytest.approx(5.0)
    assert found["differences"]["transformer_pp"]["mean"] == pytest.approx(4 / 15)


def test_the_baseline_is_the_best_feed_forward_method(runs):
    for seed in range(2):
        name = f"transformer_pp_long-{seed}"
        write_run(runs, name, "transformer_pp", 20, seed, y=1.5)
    found = side_by_side([f"{runs}/*"])
    assert found.baseline == "transformer_pp_long"
    assert list(found.methods) == ["transformer_pp_long", "ebt", "transformer_pp"]
    costs = [line[5] for line in table(found)[1:]]
    assert costs[0].endswith(" 1.00 x") and costs[2].endswith(" 0.50 x")


def test_gains_over_seeds(runs, capsys):
    assert cli.run(["compare", f"--runs={runs}/*", "--gains", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["gains"]
    assert [gain["way"] for gain in found] == ["1 to 2 steps", "3 steps"]
    percent = 100 * (1 - math.exp(-0.1))  # two steps in training, 0.1 nats each
    for gain in found:
        assert (gain["method"], gain["data"]) == ("ebt", "held-out text")
        assert gain["percent"] == pytest.approx(percent) and gain["seeds"] == 3
        assert gain["low"] == pytest.approx(gain["high"]) == pytest.approx(percent)
        assert gain["tokens"] == 1280
    assert found[1]["shift"] == 1


def test_mistakes(runs, capsys):
    def fails(*flags):
        assert cli.run(["compare", *flags]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    flag = f"--runs={runs}/*"
    assert "--runs is missing; give it folders" in fails()
    assert "no method; there are: ebt, transformer_pp" in fails(flag, "--baseline=x")
    assert "has no finite 'eval/x'" in fails(flag, "--y=eval/x")
    assert "--y is of losses" in fails(flag, "--y=eval/x", "--gains")
    baselines = f"--runs={runs}/transformer_pp*"
    assert "none of the runs has thought" in fails(baselines, "--gains")
    write_run(runs, "ebt-9", "ebt", 10, 0)
    assert "is the second run of 'ebt' with seed 0" in fails(flag)


def test_a_method_alone_has_its_own_name_not_its_folders(runs):
    assert list(side_by_side([f"{runs}/ebt-*"]).methods) == ["ebt"]
