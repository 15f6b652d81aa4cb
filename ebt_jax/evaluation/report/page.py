"""The page: sections of HTML, put into the template with style, scripts and numbers."""

from __future__ import annotations

import datetime
import html
import importlib.resources
import json
import platform
import statistics
import string
from collections.abc import Sequence
from typing import Any

import jax

from ebt_jax.evaluation import report
from ebt_jax.evaluation.report import charts
from ebt_jax.evaluation.report.landscape import landscape_svg
from ebt_jax.evaluation.report.runs import Run, differing, series
from ebt_jax.evaluation.report.thinking import Thoughts
from ebt_jax.training.objective import build_objective

COLOURS = 6  # of runs, as in style.css
KINDS = {"ebt": "EBT", "transformer_pp": "Transformer++"}
DASH = "–"  # where there is no value

Section = tuple[str, str, str]  # id, heading, HTML


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
    }
    drawn = {name: chart for name, chart in drawn.items() if chart["series"]}
    sections = [
        *_results(runs, thoughts),
        *_problems(runs),
        *_learning(drawn),
        *_thinking(drawn, runs, thoughts),
        *_tokens(runs, thoughts),
        *_landscapes(runs, thoughts),
        *_tasks(runs),
        *_settings(runs),
    ]
    numbers = {
        "charts": drawn,
        "thoughts": [
            token_numbers(run.name, thought)
            for run, thought in zip(runs, thoughts, strict=True)
            if thought is not None
        ],
    }
    kinds = [
        f"{run.name} ({kind})" if (kind := _kind(run)) else run.name for run in runs
    ]
    return string.Template(_file("page.html")).substitute(
        title=html.escape(", ".join(kinds)),
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
        "labels": thoughts.labels,
        "texts": thoughts.texts,
    }


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table that can be scrolled; cells are HTML, the first of a row is its name."""
    lines = ['<div class="scroll" tabindex="0" role="group"><table>']
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


def _introduction(runs: Sequence[Run], command: str) -> str:
    made = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    count = "one run" if len(runs) == 1 else f"{len(runs)} runs"
    said = f"EBT-JAX report of {count}, made {made}"
    if not command:
        return f'<p class="faint">{said}.</p>'
    return f'<p class="faint">{said} with</p>\n<pre>{html.escape(command)}</pre>'


def _results(runs: Sequence[Run], thoughts: Sequence[Thoughts | None]) -> list[Section]:
    rows = {
        "model": [_kind(run) or DASH for run in runs],
        "parameters": [number(_parameters(run)) for run in runs],
        "optimiser steps": [_steps(run) for run in runs],
        "tokens trained on": [number(_tokens_seen(run)) for run in runs],
        "held-out nll, nats per token": _result(runs, "eval/nll"),
        "perplexity": _result(runs, "eval/perplexity"),
        "bits per byte": _result(runs, "eval/bits_per_byte"),
        "energy, before": _result(runs, "eval/energy_before"),
        "energy, after": _result(runs, "eval/energy_after"),
        "training time": [_duration(run) for run in runs],
        "tokens per second, median": [number(_speed(run)) for run in runs],
    }
    rows = {
        name: cells for name, cells in rows.items() if any(c != DASH for c in cells)
    }
    content = table(
        ["", *map(_named, range(len(runs)), runs)],
        [[name, *cells] for name, cells in rows.items()],
    )
    changed = differing(runs)
    if len(runs) > 1 and changed:
        differences = table(
            ["", *map(_named, range(len(runs)), runs)],
            [[_key(key), *map(number, values)] for key, values in changed.items()],
        )
        content = (
            f"<div><h3>Numbers</h3>{content}</div>"
            f"<div><h3>Settings that differ</h3>{differences}</div>"
        )
    return [("results", "Results", f'<div class="charts">{content}</div>')]


def _problems(runs: Sequence[Run]) -> list[Section]:
    notes = [
        f'<p class="note">{_named(i, run)}: {html.escape(note)}.</p>'
        for i, run in enumerate(runs)
        for note in run.notes
    ]
    return [("missing", "Missing or damaged", "\n".join(notes))] if notes else []


def _learning(drawn: dict[str, Any]) -> list[Section]:
    if "learning" not in drawn:
        return []
    about = (
        "Thin: training loss. With marks: held-out text. The first losses can lie far "
        "above the rest; the frame cuts them off."
    )
    return [("learning", "Learning curves", _figure("learning", about))]


def _thinking(
    drawn: dict[str, Any], runs: Sequence[Run], thoughts: Sequence[Thoughts | None]
) -> list[Section]:
    figures = []
    if "thinking" in drawn:
        about = (
            "Loss on held-out text against refinement steps, at the end of training. A "
            "line across: a model that predicts in one pass."
        )
        figures.append(_figure("thinking", about))
    counts = ", ".join(
        f"{html.escape(run.name)}: {int(thought.scored.sum())} tokens, trained with "
        f"{thought.trained_steps} steps"
        for run, thought in zip(runs, thoughts, strict=True)
        if thought is not None and thought.trace.energy is not None
    )
    if "energy" in drawn:
        about = (
            "Mean energy of the candidates, from the initial one on, over the tokens "
            f"shown below ({counts}). Energies of different models are not comparable, "
            "nor are those of different landscapes."
        )
        figures.append(_figure("energy", about))
    if "gradient" in drawn:
        about = (
            "Mean norm of the energy's gradient at the candidate each step starts from."
        )
        figures.append(_figure("gradient", about))
    if not figures:
        return []
    content = f'<div class="charts">{"".join(figures)}</div>'
    return [("thinking", "Thinking: loss and energy per step", content)]


def _figure(name: str, about: str) -> str:
    """A chart for `charts.js` to draw."""
    return (
        f'<figure data-chart="{name}"><div class="bar controls"></div>'
        '<div class="bar legend"></div>'
        f'<div class="plot" tabindex="0" role="application" aria-label="{about} '
        'Arrow keys read out values."></div>'
        f'<div class="readout" aria-live="polite"></div>'
        f"<figcaption>{about}</figcaption></figure>"
    )


def _tokens(runs: Sequence[Run], thoughts: Sequence[Thoughts | None]) -> list[Section]:
    if not any(thoughts):
        return []
    steps = "; ".join(
        f"{html.escape(run.name)}: checkpoint of step {thought.step}"
        for run, thought in zip(runs, thoughts, strict=True)
        if thought is not None
    )
    content = f"""<p class="faint">Held-out text ({steps}). Point at a token, tap it, or
use the arrow keys: the panel shows what was predicted for it, candidate by candidate.
A click holds a token, Escape lets it go. The darker, the larger; gray: given.</p>
<div data-view="tokens"><div class="bar controls"></div>
<div class="bar"><span class="faint range"></span></div>
<div class="tokens">
<div class="text" tabindex="0" role="listbox" aria-label="Tokens of a text"></div>
<div class="panel" aria-live="polite"></div>
</div></div>"""
    return [("tokens", "Token by token", content)]


def _landscapes(
    runs: Sequence[Run], thoughts: Sequence[Thoughts | None]
) -> list[Section]:
    pictures = []
    for run, thought in zip(runs, thoughts, strict=True):
        for shown in thought.landscapes if thought else []:
            assert thought is not None
            place, plane = shown.prediction, shown.plane
            before = thought.labels[int(thought.before[place])]
            right = thought.labels[int(thought.target[place])]
            name = html.escape(
                f"{run.name}, token {place + 1}: {right} after {before} ({shown.why})"
            )
            finite = plane.energy[abs(plane.energy) < float("inf")]
            span = "No energy is finite; "
            if finite.size:
                low, high = finite.min(), finite.max()
                span = f"Energies from {low:.4g} (dark) to {high:.4g} (bright); "
            pictures.append(
                f'<figure class="landscape"><h3>{name}</h3>'
                f"{landscape_svg(plane, f'Energy landscape, {name}')}"
                f"<figcaption>{span}at the right token {plane.target_energy:.4g}."
                "</figcaption></figure>"
            )
    if not pictures:
        return []
    about = (
        '<p class="faint">Energies, in the last landscape, on the plane through the '
        "initial candidate (start), the final one (end) and all probability on the "
        "right token. Distances are Euclidean, between probability vectors; the path "
        "is seen from above, so a candidate may lie off the plane.</p>"
    )
    content = f'{about}<div class="charts">{"".join(pictures)}</div>'
    return [("landscapes", "Energy landscapes", content)]


def _tasks(runs: Sequence[Run]) -> list[Section]:
    tables = []
    for task in dict.fromkeys(name for run in runs for name in run.tasks):
        found = [run.tasks[task] if task in run.tasks else {} for run in runs]
        keys = dict.fromkeys(key for values in found for key in values)
        rows = [
            [html.escape(key), *(number(v[key]) if key in v else DASH for v in found)]
            for key in keys
        ]
        head = ["", *map(_named, range(len(runs)), runs)]
        tables.append(f"<h3>{html.escape(task)}</h3>{table(head, rows)}")
    return [("tasks", "Benchmarks", "\n".join(tables))] if tables else []


def _settings(runs: Sequence[Run]) -> list[Section]:
    device = jax.devices()[0]
    parts = [
        f'<p class="faint">This page was made with Python {platform.python_version()}, '
        f"JAX {jax.__version__}, on {html.escape(device.device_kind)} "
        f"({html.escape(platform.platform())}).</p>"
    ]
    for i, run in enumerate(runs):
        lines = [f"{key} = {json.dumps(value)}" for key, value in run.settings.items()]
        text = html.escape("\n".join(lines)) or "not readable"
        parts.append(
            f"<details><summary>{_named(i, run)} <code>{html.escape(str(run.path))}"
            f"</code></summary><pre>{text}</pre></details>"
        )
    return [("settings", "Settings and environment", "\n".join(parts))]


def _key(key: str) -> str:
    """The name of a setting, which may be broken where its words end."""
    parts = html.escape(key).replace("_", "_<wbr>").replace(".", ".<wbr>")
    return f"<code>{parts}</code>"


def _named(i: int, run: Run) -> str:
    """A run's name beside its colour."""
    colour = f'<span class="swatch run-{i % COLOURS}" aria-hidden="true"></span>'
    return colour + html.escape(run.name)


def _kind(run: Run) -> str:
    kind, size = (run.settings.get(f"model.{key}") for key in ("kind", "size"))
    return f"{KINDS[kind] if kind in KINDS else kind} {size}" if kind else ""


def _parameters(run: Run) -> int | None:
    if run.config is None:
        return None
    shapes = jax.eval_shape(build_objective(run.config).init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def _steps(run: Run) -> str:
    planned = run.settings.get("train.steps")
    done = run.rows[-1]["step"] if run.rows else None
    return number(done) if done == planned else f"{number(done)} of {number(planned)}"


def _tokens_seen(run: Run) -> float | None:
    """Steps times the mean of the logged steps' tokens: padding does not count."""
    per_step = [tokens for _, _, tokens in series(run.rows, "train/tokens")]
    return run.rows[-1]["step"] * statistics.mean(per_step) if per_step else None


def _result(runs: Sequence[Run], name: str) -> list[str]:
    return [number(run.results[name]) if name in run.results else DASH for run in runs]


def _duration(run: Run) -> str:
    seconds = [row["seconds"] for row in run.rows if "seconds" in row]
    if not seconds:
        return DASH
    minutes, rest = divmod(round(seconds[-1]), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _speed(run: Run) -> float | None:
    speeds = [speed for _, _, speed in series(run.rows, "tokens_per_second")]
    return round(statistics.median(speeds)) if speeds else None


def _file(name: str) -> str:
    return importlib.resources.files(report).joinpath(name).read_text("utf-8")
