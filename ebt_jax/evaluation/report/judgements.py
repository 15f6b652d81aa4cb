"""What energies are worth as scores: of doubt, and of texts that are there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ebt_jax.evaluation.report.markup import (
    DASH,
    Section,
    breakable,
    chart_figure,
    run_name,
    table,
)
from ebt_jax.evaluation.report.runs import Run
from ebt_jax.evaluation.verification import KINDS

# Measures of doubt, as people call them.
DOUBTS = {
    "energy": "energy",
    "energy_drop": "energy drop",
    "entropy": "entropy",
    "max_probability": "1 - max. probability",
}
SCORES = {
    "energy": "energy",
    "excess_energy": "excess energy",
    "nll": "likelihood",
}


def doubt_charts(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Risk against coverage and loss by tenths of doubt, for each text."""
    charts = {}
    for k, data in enumerate(_names([run.doubts for run in runs])):
        risk, tenths = [], []
        for run in runs:
            if data not in run.doubts:
                continue
            for measure, curve in run.doubts[data].curves.items():
                # Measures, not runs, are told apart by colour.
                place = {"run": len(risk), "kind": "thick"}
                place["label"] = f"{run.name}: {_word(DOUBTS, measure)}"
                x = {"x": curve["coverage"]}
                risk.append({**place, "x": x, "y": curve["risk"]})
                x = {"x": list(range(1, len(curve["nll"]) + 1))}
                tenths.append({**place, "x": x, "y": curve["nll"]})
        charts[f"risk-{k}"] = _chart(
            "share of predictions answered", False, "share of them that are wrong", risk
        )
        charts[f"tenths-{k}"] = _chart(
            "tenth of the predictions, by doubt", True, "nats per token", tenths
        )
    return charts


def uncertainty(runs: Sequence[Run]) -> list[Section]:
    """How well measures of doubt tell which predictions are wrong."""
    parts = []
    for k, data in enumerate(_names([run.doubts for run in runs])):
        having = [(i, run) for i, run in enumerate(runs) if data in run.doubts]
        rows = []
        for i, run in having:
            found = run.doubts[data].results
            for measure in run.doubts[data].curves:
                keys = ("auroc", "rank_correlation", "risk")
                values = [f"{key}/{measure}" for key in keys]
                values.append(f"risk/{measure}/0.5")
                cells = [f"{found[v]:.3f}" if v in found else DASH for v in values]
                wrong = _percent(found["wrong"]) if "wrong" in found else DASH
                rows.append([_word(DOUBTS, measure), run_name(i, run), *cells, wrong])
        head = [
            "doubt",
            "run",
            "AUROC",
            "rank correlation with loss",
            "mean risk",
            "risk at 50 %",
            "wrong in all",
        ]
        risk = chart_figure(
            f"risk-{k}",
            "Risk against coverage: how many predictions are wrong where only the "
            "surest are answered. Lower is better.",
        )
        tenths = chart_figure(
            f"tenths-{k}",
            "Calibration: mean loss of each tenth of the predictions, from the least "
            "doubt to the most. A good measure rises.",
        )
        parts.append(
            f"<h3>{_said(data)}</h3>{table(head, rows)}"
            f'<div class="charts">{risk}{tenths}</div>'
        )
    if not parts:
        return []
    about = (
        '<p class="faint">Whether a model knows when it is wrong: AUROC is the chance '
        "that a wrong prediction has more doubt than a right one (0.5 is chance). Risk "
        "is the share of wrong predictions among those answered.</p>"
    )
    return [("uncertainty", "Uncertainty", about + "".join(parts))]


def verification(runs: Sequence[Run]) -> list[Section]:
    """How often a true continuation is told from corrupted ones."""
    rows = []
    for data in _names([run.verified for run in runs]):
        for i, run in enumerate(runs):
            if data not in run.verified:
                continue
            found = run.verified[data]
            rows += [
                [
                    _word(SCORES, measure),
                    run_name(i, run),
                    _said(data),
                    *(
                        _with_interval(found, key)
                        for key in (measure, *(f"{measure}/{kind}" for kind in KINDS))
                    ),
                ]
                for measure in SCORES
                if measure in found
            ]
    if not rows:
        return []
    about = (
        '<p class="faint">How often the true second half of a text has the lower mean '
        "energy, or the higher likelihood, than a corrupted one: a tenth of its tokens "
        "replaced at random, its words shuffled, or the second half of another text. "
        "Excess energy is by how much the energy of what is there is above that of the "
        "model's own prediction. In brackets intervals of 95 % over texts; 50 % is "
        "chance.</p>"
    )
    head = ["by", "run", "data", "all", "tokens replaced", "shuffled", "another text"]
    return [("verification", "Verification", about + table(head, rows))]


def _names(found: Sequence[dict[str, Any]]) -> list[str]:
    """Of what was scored: held-out text first."""
    names = {name for each in found for name in each}
    return sorted(names, key=lambda name: (name != "held_out", name))


def _said(data: str) -> str:
    """How the name of what was scored is shown."""
    return "held-out text" if data == "held_out" else breakable(data)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}&nbsp;%"


def _word(words: dict[str, str], name: str) -> str:
    return words[name] if name in words else name


def _with_interval(found: dict[str, float], key: str) -> str:
    if not {key, f"{key}/low", f"{key}/high"} <= found.keys():
        return DASH
    low, high = found[f"{key}/low"], found[f"{key}/high"]
    interval = f"{100 * low:.1f} to {100 * high:.1f}"
    return f'{_percent(found[key])} <span class="interval">({interval})</span>'


def _chart(x: str, integer: bool, y: str, curves: list[dict[str, Any]]) -> Any:
    axes = [{"name": "x", "label": x, "integer": integer}]
    return {"axes": axes, "y": y, "log": False, "cut": False, "series": curves}
