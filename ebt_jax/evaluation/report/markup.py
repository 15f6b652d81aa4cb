"""Pieces of HTML that the sections of a report are made of."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from ebt_jax.evaluation.report.runs import Run

COLOURS = 6  # of runs, as in style.css
DASH = "–"  # where there is no value

Section = tuple[str, str, str]  # id, heading, HTML


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table that can be scrolled; cells are HTML, the first of a row is its name."""
    lines = ['<div class="scroll" tabindex="0" role="group" aria-label="Table"><table>']
    if caption:
        lines.append(f"<caption>{caption}</caption>")
    cells = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines.append(f"<thead><tr>{cells}</tr></thead><tbody>")
    for name, *values in rows:
        cells = "".join(f"<td>{value}</td>" for value in values)
        lines.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    return "\n".join([*lines, "</tbody></table></div>"])


def number(value: Any) -> str:
    """A value for people, as HTML."""
    if value is None:
        return DASH
    if isinstance(value, bool | str):
        return html.escape(str(value)) or "(empty)"
    if isinstance(value, int) or float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}"


def chart_figure(name: str, about: str) -> str:
    """A chart for `charts.js` to draw; `about` is its caption."""
    return (
        f'<figure data-chart="{name}"><div class="bar controls"></div>'
        '<div class="bar legend"></div>'
        f'<div class="plot" tabindex="0" role="application" aria-label="{about} '
        'Arrow keys read out values."></div>'
        f'<div class="readout" aria-live="polite"></div>'
        f"<figcaption>{about}</figcaption></figure>"
    )


def breakable(name: str) -> str:
    """A name with underscores and dots, which may be broken behind them."""
    return html.escape(name).replace("_", "_<wbr>").replace(".", ".<wbr>")


def run_name(i: int, run: Run) -> str:
    """A run's name beside its colour."""
    colour = f'<span class="swatch run-{i % COLOURS}" aria-hidden="true"></span>'
    return f'<span class="run">{colour}{html.escape(run.name)}</span>'


def heads(runs: Sequence[Run]) -> list[str]:
    """The head of a table that has a column for each run."""
    return ["", *(run_name(i, run) for i, run in enumerate(runs))]
