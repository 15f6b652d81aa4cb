"""The page: sections put into the template with style, scripts and numbers."""

from __future__ import annotations

import datetime
import html
import importlib.resources
import json
import string
from collections.abc import Sequence
from typing import Any

from ebt_jax.evaluation import report
from ebt_jax.evaluation.report import (
    charts,
    judgements,
    pictures,
    shift,
    tables,
    vision,
)
from ebt_jax.evaluation.report.runs import Run
from ebt_jax.evaluation.report.thinking import Thoughts


def page(runs: Sequence[Run], thoughts: Sequence[Thoughts | None], command: str) -> str:
    """The whole page.

    Args:
      runs: in the order of the page.
      thoughts: of each run's model; None where it was not looked into.
      command: that the page was made with; empty if it is not known.
    """
    drawn = {
        "learning": charts.learning_chart(runs),
        "thinking": charts.thinking_chart(runs),
        "energy": charts.energy_chart(runs, thoughts),
        "gradient": charts.gradient_chart(runs, thoughts),
        "shift": charts.shift_chart(runs),
        **judgements.doubt_charts(runs),
        "passes": vision.passes_chart(runs),
        "horizons": vision.horizons_chart(runs),
    }
    drawn = {name: chart for name, chart in drawn.items() if chart["series"]}
    sections = [
        *tables.results(runs),
        *tables.problems(runs),
        *vision.samples(runs),
        *vision.measured(runs, drawn),
        *pictures.learning(drawn),
        *pictures.thinking(drawn, runs, thoughts),
        *pictures.policy(runs, thoughts),
        *pictures.tokens(runs, thoughts),
        *pictures.landscapes(runs, thoughts),
        *tables.tasks(runs),
        *shift.shift_section(runs, "shift" in drawn),
        *shift.seeds_section(runs),
        *judgements.uncertainty(runs),
        *judgements.verification(runs),
        *tables.settings(runs),
    ]
    numbers = {
        "charts": drawn,
        "thoughts": [
            token_numbers(run.name, thought)
            for run, thought in zip(runs, thoughts, strict=True)
            if thought is not None
        ],
    }
    kinds = [tables.kind(run) for run in runs]
    compared = [run.name for run in runs]
    if len(runs) <= tables.SIDE_BY_SIDE:
        named = zip(compared, kinds, strict=True)
        compared = [f"{name} ({kind})" if kind else name for name, kind in named]
    return string.Template(_file("page.html")).substitute(
        title=html.escape(", ".join(compared)),
        introduction=_introduction(runs, command),
        links="\n".join(f'<a href="#{id}">{name}</a>' for id, name, _ in sections),
        sections="\n".join(
            f'<section id="{id}" aria-labelledby="{id}-name">\n'
            f'<h2 id="{id}-name">{name}</h2>\n{content}\n</section>'
            for id, name, content in sections
        ),
        # "<" could end the script element that the numbers stand in.
        data=json.dumps(numbers, allow_nan=False).replace("<", "\\u003c"),
        style=_file("style.css"),
        script=_file("charts.js") + "\n" + _file("tokens.js"),
    )


def token_numbers(name: str, thoughts: Thoughts) -> dict[str, Any]:
    """What `tokens.js` shows of a run."""
    seen = thoughts.trace
    listed = lambda array: None if array is None else charts.finite_list(array)
    return {
        "name": name,
        "steps": thoughts.trained_steps,
        "target": thoughts.target.tolist(),
        "before": thoughts.before.tolist(),
        "starts": thoughts.starts.astype(int).tolist(),
        "scored": thoughts.scored.astype(int).tolist(),
        "nll": listed(seen.nll),
        "energy": listed(seen.energy),
        "norm": listed(seen.gradient_norm),
        "top": seen.top.tolist(),
        "probability": listed(seen.probability),
        "taken": thoughts.policy.steps.tolist() if thoughts.policy else None,
        "labels": thoughts.labels,
        "texts": thoughts.texts,
    }


def _introduction(runs: Sequence[Run], command: str) -> str:
    made = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    count = "one run" if len(runs) == 1 else f"{len(runs)} runs"
    said = f"EBT-JAX report of {count}, made {made}"
    if not command:
        return f'<p class="faint">{said}.</p>'
    return f'<p class="faint">{said} with</p>\n<pre>{html.escape(command)}</pre>'


def _file(name: str) -> str:
    return importlib.resources.files(report).joinpath(name).read_text("utf-8")
