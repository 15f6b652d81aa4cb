"""The tables of a comparison, for a terminal and for Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ebt_jax.evaluation.scaling.compare import Comparison, Method, Rival
from ebt_jax.evaluation.scaling.intervals import Interval

LAW_HEAD = ("method", "runs", "seeds", "x", "slope", "exponent b", "floor c", "a")
RIVAL_HEAD = ("against {}", "slope", "exponent", "laws cross at x", "beyond it")


def for_terminal(comparison: Comparison) -> str:
    """Aligned columns and notes."""
    blocks = [_heading(comparison)]
    for rows in _tables(comparison):
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True))
            for row in rows
        ]
        blocks.append("\n".join(line.rstrip() for line in lines))
    if comparison.notes:
        blocks.append("\n".join(f"note: {note}" for note in comparison.notes))
    return "\n\n".join(blocks)


def for_markdown(comparison: Comparison) -> str:
    """Tables and a list of notes."""
    blocks = [_heading(comparison)]
    for head, *rows in _tables(comparison):
        lines = [head, ["---"] * len(head), *rows]
        blocks.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    if comparison.notes:
        blocks.append("\n".join(f"* {note}" for note in comparison.notes))
    return "\n\n".join(blocks) + "\n"


def _heading(comparison: Comparison) -> str:
    collected = comparison.collected
    return (
        f"{collected.y_label} against {collected.x_label}: y = c + a x^-b, and the "
        "slope of log y; 95 % intervals"
    )


def _tables(comparison: Comparison) -> list[list[Sequence[str]]]:
    baseline = comparison.methods[0].name
    tables = [[LAW_HEAD, *map(_law_row, comparison.methods)]]
    if comparison.rivals:
        head = tuple(name.format(baseline) for name in RIVAL_HEAD)
        rows = [_rival_row(rival, baseline) for rival in comparison.rivals]
        tables.append([head, *rows])
    return tables


def _law_row(method: Method) -> list[str]:
    x = method.found.points.x
    return [
        method.name,
        str(len(x)),
        str(method.seeds),
        f"{x.min():.4g} to {x.max():.4g}",
        _with_ends(method.slope, ".4f"),
        _with_ends(method.exponent, ".3f"),
        _with_ends(method.floor, ".3f"),
        f"{method.found.law.coefficient:.4g}",
    ]


def _rival_row(rival: Rival, baseline: str) -> list[str]:
    none = rival.crossing.value == math.inf
    return [
        rival.name,
        _faster(rival.slope),
        _faster(rival.exponent),
        _with_ends(rival.crossing, ".3g").replace("inf", "none"),
        f"{rival.name if rival.better else baseline} lower"
        + (" everywhere" if none else ""),
    ]


def _faster(percent: Interval) -> str:
    """A change in per cent, in words."""
    if not math.isfinite(percent.value):
        return "-"
    size = abs(percent.value)
    word = "faster" if percent.value >= 0 else "slower"
    form = "+.1f" if size < 1000 else "+.3g"
    return f"{size:.1f} % {word} {_ends(percent, form)}"


def _with_ends(interval: Interval, form: str) -> str:
    return f"{_number(interval.value, form)} {_ends(interval, form)}"


def _ends(interval: Interval, form: str) -> str:
    if math.isnan(interval.low):
        return "(-)"
    return f"({_number(interval.low, form)} to {_number(interval.high, form)})"


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)
