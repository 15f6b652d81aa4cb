"""`ebt fit`: known laws come back, within intervals; mistakes are one line."""

import csv
import functools
import json
import math

import numpy as np
import pytest
from fake_runs import write_run

from ebt_jax import cli
from ebt_jax.evaluation.scaling import axes, draws, intervals, laws
from ebt_jax.evaluation.scaling.laws import Law, Points

LAW = Law(1.2, 0.8, 0.5, 1.0)
X = np.repeat(np.geomspace(1.0, 16.0, 5), 3)


def curve(law=LAW, noise=0.0, seed=0, x=X):
    rng = np.random.default_rng(seed)
    return Points(x, law(x) * np.exp(noise * rng.standard_normal(len(x))))


@pytest.mark.parametrize("floor", [0.0, 1.2, 30.0])
def test_a_law_without_noise_comes_back(floor):
    found = intervals.fitted(curve(Law(floor, 0.8, 0.5, 1.0), x=X * 1e6))
    law = found.law
    assert law.exponent == pytest.approx(0.5, rel=1e-3)
    assert law.floor == pytest.approx(floor, abs=1e-3)
    assert law(1e6) == pytest.approx(floor + 0.8 * 1e6**-0.5, rel=1e-5)


def test_huber_lets_one_bad_run_not_decide():
    points = curve(noise=0.003)
    y = points.y.copy()
    y[4] *= 1.5
    with_it = laws.fit_law(Points(points.x, y)).law
    without = laws.fit_law(points).law
    assert with_it.exponent == pytest.approx(without.exponent, abs=0.12)


def test_the_projection_has_the_least_loss_of_its_exponent():
    points = curve(noise=0.01)
    u = np.log(points.x)
    for exponent in (0.2, 0.5, 1.5):
        best = laws.project(u, points.y, np.array(exponent), 0.01)
        for floor, scale in ((1.01, 1.0), (0.99, 1.0), (1.0, 1.01), (1.0, 0.99)):
            fitted = best.floor * floor + best.scale * scale * np.exp(-exponent * u)
            loss = laws.huber(np.log(points.y / fitted), 0.01).sum()
            assert loss >= best.loss


def test_intervals_hold_the_truth_as_often_as_they_say():
    """20 draws of each; tests/fit_coverage.py has more."""
    held = {"exponent": 0, "slope": 0}
    slope = intervals.slope(Points(X, LAW(X))).value
    for seed in range(20):
        points = curve(noise=0.01, seed=seed)
        its = intervals.exponent_interval(intervals.fitted(points))
        assert its.low < its.value < its.high < 3
        held["exponent"] += its.low <= 0.5 <= its.high
        line = intervals.slope_interval(intervals.slope(points))
        held["slope"] += line.low <= slope <= line.high
    assert held["exponent"] >= 18 and held["slope"] >= 17


def test_what_points_do_not_say_is_not_claimed():
    noisy = intervals.fitted(curve(Law(1.0, 1.0, 0.1, 1.0), noise=0.02))
    floor, exponent = (
        intervals.floor_interval(noisy),
        intervals.exponent_interval(noisy),
    )
    assert floor.low == 0 and floor.high > 1
    assert exponent.high > 3 * exponent.low
    three = intervals.fitted(curve(x=np.array([1.0, 2.0, 4.0])))
    assert math.isnan(intervals.exponent_interval(three).low)
    assert draws.redraw(three, np.random.default_rng(0)) is None


def test_points_off_the_law_are_seen():
    bent = curve(noise=0.001)
    y = bent.y * np.where(np.isclose(bent.x, 4.0), 1.02, 1.0)
    found = intervals.fitted(Points(bent.x, y))
    assert found.misfit and found.spare == 2
    assert not intervals.fitted(bent).misfit


def test_ratios_hold_the_truth():
    other = Law(1.2, 0.8, 0.4, 1.0)
    one, two = curve(noise=0.003), curve(other, noise=0.003, seed=1)
    ratio = intervals.exponent_ratio(intervals.fitted(one), intervals.fitted(two))
    assert 0.8 < ratio.low < 1.25 < ratio.high < 2
    exact = intervals.slope(Points(X, LAW(X))), intervals.slope(Points(X, other(X)))
    slopes = intervals.slope_ratio(intervals.slope(one), intervals.slope(two))
    assert slopes.low < exact[0].value / exact[1].value < slopes.high
    flat = intervals.slope(Points(X, np.exp(0.01 * np.sin(np.arange(15.0)))))
    assert intervals.slope_ratio(exact[0], flat).high == math.inf


def test_laws_cross_where_they_do():
    one, other = Law(1.0, 1.0, 0.5, 1.0), Law(1.2, 0.7, 0.5, 1.0)  # at 0.2 = 0.3 x^-.5
    found = [
        intervals.fitted(curve(law, 0.002, seed))
        for seed, law in enumerate((one, other))
    ]
    rng = np.random.default_rng(0)
    drawn = [draws.redraw(each, rng, 60) for each in found]
    place = draws.crossing(one, other, (drawn[0], drawn[1]), X)
    assert place.value == pytest.approx(2.25, rel=0.01)
    assert place.low < 2.25 < place.high < 16
    assert (
        draws.crossing(one, Law(2.0, 1.0, 0.5, 1.0), (None, None), X).value == math.inf
    )
    low, high = draws.band(drawn[0], np.array([4.0]))
    assert low < one(4.0) < high


# The command --------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path):
    """Writes a CSV file; changes replace or, with None, drop fields of a line."""

    def write(changes=None, methods=("transformer_pp", "ours"), places=5):
        file = tmp_path / "points.csv"
        with file.open("w", newline="") as out:
            lines = csv.writer(out)
            lines.writerow(["group", "x", "y", "seed"])
            for seed, method in enumerate(methods):
                law = LAW if seed == 0 else Law(1.1, 0.95, 0.5, 1.0)
                points = curve(law, 0.003, seed)
                for i in range(3 * places):
                    row = [method, points.x[i], points.y[i], i % 3]
                    if changes and i == 4:
                        row[changes[0]] = changes[1]
                    lines.writerow(row)
        return f"--csv={file}"

    return write


def test_a_table_becomes_tables_a_plot_and_json(table, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.run(["fit", table(), f"--out={out}"]) == 0
    text = capsys.readouterr().out
    assert "against transformer_pp" in text and "% faster" in text
    assert "ours lower" in text
    found = json.loads((out / "fit.json").read_text())
    ours = found["methods"]["ours"]
    assert ours["exponent"]["low"] < 0.5 < ours["exponent"]["high"]
    assert ours["runs"] == 15 and ours["seeds"] == 3
    ratio = found["methods"]["ours"]["slope"]["value"]
    ratio /= found["methods"]["transformer_pp"]["slope"]["value"]
    percent = found["against_baseline"]["ours"]["slope_percent"]
    assert percent["value"] == pytest.approx(100 * (ratio - 1))
    assert percent["low"] < percent["value"] < percent["high"]
    assert (out / "table.md").read_text().count("| --- |") >= 1
    assert (out / "fit.png").read_bytes().startswith(b"\x89PNG")
    assert cli.run(["fit", table(), "--json", "--baseline=ours"]) == 0
    assert json.loads(capsys.readouterr().out)["baseline"] == "ours"


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ((3, ""), [], "line 6 of"),
        ((2, "nan"), [], "is nan, but has to be positive and finite"),
        ((2, "low"), [], "could not convert"),
        ((3, 0), [], "both of 'transformer_pp' with x 2 and seed 0"),
        (None, ["--baseline=our"], "is no group; did you mean 'ours'?"),
        (None, ["--by=model.kind"], "--by is of --runs"),
        (None, ["--runs=x"], "is needed, not both"),
    ],
)
def test_mistakes_in_a_table(table, changes, flags, message, capsys):
    assert cli.run(["fit", table(changes), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_too_few_points(table, capsys):
    assert cli.run(["fit", table(places=2)]) == 2
    assert "6 runs at 2 different x, but a law needs 3" in capsys.readouterr().err
    assert cli.run(["fit", table(places=1)]) == 2
    assert "x is 1 in all 6 runs" in capsys.readouterr().err


# Folders of runs ----------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path):
    """Writes what finished runs leave, without training any."""

    write = functools.partial(write_run, tmp_path)

    def several():
        for kind in ("ebt", "transformer_pp"):
            for steps in (10, 20, 40):
                for seed in (0, 1):
                    y = (3.0 if kind == "ebt" else 2.5) + 0.1 * seed
                    name = f"{kind}-{steps}-{seed}"
                    write(name, kind, steps, seed, y=y * steps**-0.1)
        return f"--runs={tmp_path}/ebt*,\n  {tmp_path}/*"  # as in a docstring

    return write, several


def test_runs_become_points(runs, capsys, tmp_path):
    write, several = runs
    flag = several()
    write("late-0", "ebt", 80, 0, finished=False)
    assert cli.run(["fit", flag, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["baseline"] == "transformer_pp"
    assert set(found["methods"]) == {"ebt", "transformer_pp"}
    assert {p["x"] for p in found["points"]} == {1280, 2560, 5120}
    assert any("1 runs have not finished" in note for note in found["notes"])
    assert found["methods"]["ebt"]["slope"]["value"] == pytest.approx(0.1)
    assert cli.run(["fit", flag, "--json", "--x=seconds", "--y=eval/nll/step_1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {p["x"] for p in found["points"]} == {5.0, 10.0, 20.0}  # 0.5 s an update
    assert max(p["y"] for p in found["points"]) > 4


def test_runs_that_cannot_be_compared(runs, capsys, tmp_path):
    write, several = runs
    flag = several()

    def fails(*flags):
        assert cli.run(["fit", flag, *flags]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "--x='depth' is not one of tokens" in fails("--x=depth")
    assert "x is 128 in all 12 runs" in fails("--x=batch", "--by=model.kind")
    assert "no key 'model.kin'" in fails("--by=model.kin")
    assert "has no finite 'eval/x'; it has eval/nll" in fails("--y=eval/x")
    write("other-10-3", "ebt", 10, 3, data="b.txt")
    assert "data.path ('a.txt', 'b.txt')" in fails()
    (tmp_path / "other-10-3" / "summary.json").unlink()
    write("longer-10-3", "ebt", 10, 3, eval_=128)
    assert "eval.sequences (128, 64)" in fails()
    assert cli.run(["fit", f"--runs={tmp_path}/other*"]) == 2
    assert "no finished run is at" in capsys.readouterr().err
    assert cli.run(["fit", f"--runs={tmp_path}/none*"]) == 2
    assert "nothing is at" in capsys.readouterr().err


def test_runs_of_an_older_version_are_of_the_same_method(runs, capsys, tmp_path):
    """What a config does not say yet is what was done then."""
    _, several = runs
    flag = several()
    for path in tmp_path.glob("ebt-10-*/config.json"):
        tree = json.loads(path.read_text())
        del tree["model"]["box_rows"], tree["model"]["candidate_layers"]
        path.write_text(json.dumps(tree))
    assert cli.run(["fit", flag, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["methods"]) == 2


def test_a_loss_that_is_not_finite(runs, capsys, tmp_path):
    write, several = runs
    flag = several()
    write("ebt-80-0", "ebt", 80, 0, y=None)
    assert cli.run(["fit", flag]) == 2
    assert "has no finite 'eval/nll'" in capsys.readouterr().err


def test_seconds_leave_out_what_was_compiled():
    rows = [
        {"step": n, "seconds/step": s} for n, s in ((1, 60.0), (11, 1.0), (21, 2.0))
    ]
    assert axes.seconds_of(rows) == pytest.approx(1 * 1.5 + 10 * 1 + 10 * 2)
    assert math.isnan(axes.seconds_of([]))
