"""Plots are PNG files that show what the metrics file says."""

import json

import numpy as np
import pytest

from ebt_jax.errors import UserError
from ebt_jax.evaluation import plots

PNG = b"\x89PNG\r\n"


def write_metrics(workdir, rows):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (workdir / "metrics.jsonl").write_text(lines)


def test_learning_curve_reads_the_metrics(tmp_path, monkeypatch):
    rows = [
        {"step": i, "train/loss": 1500.0 if i < 5 else 2 + 3 / i} for i in range(1, 60)
    ]
    rows += [{"step": 30, "eval/nll": 2.2}, {"step": 60, "eval/nll": 2.1}]
    write_metrics(tmp_path, rows)
    figures = []
    monkeypatch.setattr(
        plots, "save_figure", lambda figure, path: (figures.append(figure), path)[1]
    )
    plots.learning_curve(tmp_path)
    (axes,) = figures[0].axes
    train, held_out = axes.lines
    np.testing.assert_array_equal(train.get_xdata(), range(1, 60))
    np.testing.assert_array_equal(held_out.get_xydata(), [[30, 2.2], [60, 2.1]])
    assert axes.get_ylim()[1] < 5  # the first steps do not hide the rest
    assert axes.get_ylabel() == "nats per token"
    assert axes.get_xlabel() == "optimiser step"


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 1, "train/loss": 2.0}],
        [{"step": 1, "eval/nll": float("nan")}],
        [],
    ],
    ids=["one line", "not finite", "empty"],
)
def test_learning_curve_of_a_short_run(tmp_path, rows):
    write_metrics(tmp_path, rows)
    path = plots.learning_curve(tmp_path)
    assert path == tmp_path / "learning_curve.png"
    assert path.read_bytes().startswith(PNG)


def test_learning_curve_without_metrics_is_an_error(tmp_path):
    with pytest.raises(UserError, match="metrics.jsonl does not exist.*workdir"):
        plots.learning_curve(tmp_path)


@pytest.mark.parametrize("nll", [[2.0], [2.5, 2.1, 2.05, 2.04]])
def test_thinking_curve(tmp_path, nll):
    path = plots.thinking_curve(tmp_path, nll)
    assert path == tmp_path / "thinking_curve.png"
    assert path.read_bytes().startswith(PNG)
