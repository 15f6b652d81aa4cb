"""The numbers behind the charts of a report, as `charts.js` draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ebt_jax.evaluation.report.runs import (
    Run,
    measure,
    series,
    thinking_curve,
    thinned,
    tokens_per_step,
    units,
)
from ebt_jax.evaluation.report.shift import gains
from ebt_jax.evaluation.report.thinking import Thoughts

MOST_POINTS = 400  # of a curve; more are averaged

Chart = dict[str, Any]


def learning_chart(runs: Sequence[Run]) -> Chart:
    """Training and held-out loss of all runs."""
    curves = []
    for i, run in enumerate(runs):
        loss, size = thinned(series(run.rows, "train/loss"), MOST_POINTS)
        held_out, _ = thinned(series(run.rows, f"eval/{measure(run)}"), MOST_POINTS)
        per_step = tokens_per_step(run)
        means = f", means of {size}" if size > 1 else ""
        curves += [
            _learnt(f"{run.name}, training{means}", i, "thin", loss, per_step),
            _learnt(f"{run.name}, held out", i, "thick", held_out, per_step),
        ]
    return {
        "axes": [
            {"name": "step", "label": "optimiser step", "integer": True},
            {"name": "tokens", "label": f"{units(runs)} trained on", "integer": True},
            {"name": "seconds", "label": "seconds of training", "integer": False},
        ],
        "y": losses(runs),
        "log": True,
        "cut": True,
        "series": [curve for curve in curves if curve["y"]],
    }


def thinking_chart(runs: Sequence[Run]) -> Chart:
    """Held-out loss against refinement steps; a line across where there are none."""
    curves = []
    for i, run in enumerate(runs):
        curve, loss = thinking_curve(run), f"eval/{measure(run)}"
        if curve:
            curves.append(_stepwise(run.name, i, 1, curve))
        elif loss in run.results and "eval/energy_gap" not in run.results:
            level = run.results[loss]
            curves.append({"label": run.name, "run": i, "kind": "level", "y": level})
    if all(curve["kind"] == "level" for curve in curves):
        curves = []  # there are no steps to draw them across
    return _per_step("refinement step", f"held-out {losses(runs)}", curves)


def losses(runs: Sequence[Run]) -> str:
    """What the held-out losses of runs are."""
    names = {"nll": "nats per token", "smooth_l1": "smooth L1"}
    return " or ".join(dict.fromkeys(names[measure(run)] for run in runs))


def energy_chart(runs: Sequence[Run], thoughts: Sequence[Thoughts | None]) -> Chart:
    """Mean energy of the candidates of the token view."""
    curves = [
        _stepwise(run.name, i, 0, _means(thought.trace.energy, thought))
        for i, (run, thought) in enumerate(zip(runs, thoughts, strict=True))
        if thought is not None and thought.trace.energy is not None
    ]
    return _per_step("refinement steps taken", "mean energy", curves)


def gradient_chart(runs: Sequence[Run], thoughts: Sequence[Thoughts | None]) -> Chart:
    """Mean norm of the inner gradients of the token view."""
    curves = [
        _stepwise(run.name, i, 1, _means(thought.trace.gradient_norm, thought))
        for i, (run, thought) in enumerate(zip(runs, thoughts, strict=True))
        if thought is not None and thought.trace.gradient_norm is not None
    ]
    return _per_step("refinement step", "mean gradient norm", curves)


def shift_chart(runs: Sequence[Run]) -> Chart:
    """Gain of thinking, per cent, against how far data is from that of training."""
    curves = []
    for run in runs:
        found = gains(run)
        for way in dict.fromkeys(gain.way for gain in found):
            these = [gain for gain in found if gain.way == way]
            if len(these) < 2:
                continue  # such as nothing but held-out text
            # A run may have several curves: they, not runs, are told apart by colour.
            about = {"label": f"{run.name}, {way}", "run": len(curves), "kind": "thick"}
            x = {"shift": finite_list([gain.shift for gain in these])}
            y = finite_list([100 * gain.share for gain in these])
            curves.append({**about, "x": x, "y": y})
    label = "shift: perplexity / held-out perplexity"
    axes = [{"name": "shift", "label": label, "integer": False}]
    y = "gain of thinking, %"
    return {"axes": axes, "y": y, "log": True, "cut": False, "series": curves}


def finite(value: float) -> float | None:
    """A number of five digits, None where JSON has none for it."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def finite_list(array: Any) -> Any:
    """A nested list of what `finite` makes of an array."""
    if np.ndim(array):
        return [finite_list(row) for row in array]
    return finite(float(array))


def _learnt(
    label: str,
    run: int,
    kind: str,
    points: list[tuple[int, float, float]],
    per_step: float | None,
) -> dict[str, Any]:
    steps, seconds, values = zip(*points, strict=True) if points else ((), (), ())
    x = {
        "step": list(steps),
        "tokens": [per_step and step * per_step for step in steps],
        "seconds": finite_list(seconds),
    }
    y = finite_list(values)
    return {"label": label, "run": run, "kind": kind, "x": x, "y": y}


def _stepwise(
    label: str, run: int, first: int, values: Sequence[float]
) -> dict[str, Any]:
    steps = list(range(first, first + len(values)))
    y = finite_list(values)
    return {"label": label, "run": run, "kind": "thick", "x": {"step": steps}, "y": y}


def _per_step(x: str, y: str, curves: list[dict[str, Any]]) -> Chart:
    axes = [{"name": "step", "label": x, "integer": True}]
    return {"axes": axes, "y": y, "log": False, "cut": False, "series": curves}


def _means(array: Any, thoughts: Thoughts) -> list[float]:
    """Of `[steps, predictions]` over those that are scored."""
    scored = array[:, thoughts.scored]
    return [float(row.mean()) for row in scored] if scored.size else []
