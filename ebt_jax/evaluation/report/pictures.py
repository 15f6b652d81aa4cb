"""The sections of a report that are drawn: curves, tokens, landscapes."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from ebt_jax.evaluation.report.landscape import landscape_svg
from ebt_jax.evaluation.report.markup import Section, chart_figure
from ebt_jax.evaluation.report.runs import Run
from ebt_jax.evaluation.report.thinking import Thoughts


def learning(drawn: dict[str, Any]) -> list[Section]:
    """Training loss and held-out nll of all runs."""
    if "learning" not in drawn:
        return []
    about = (
        "Thin: training loss. With marks: held-out text. The first losses can lie far "
        "above the rest; the frame cuts them off."
    )
    return [("learning", "Learning curves", chart_figure("learning", about))]


def thinking(
    drawn: dict[str, Any], runs: Sequence[Run], thoughts: Sequence[Thoughts | None]
) -> list[Section]:
    """What steps do to loss, energy and gradient."""
    figures = []
    if "thinking" in drawn:
        about = (
            "Loss on held-out text against refinement steps, at the end of training. A "
            "line across: a model that predicts in one pass."
        )
        figures.append(chart_figure("thinking", about))
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
        figures.append(chart_figure("energy", about))
    if "gradient" in drawn:
        about = (
            "Mean norm of the energy's gradient at the candidate each step starts from."
        )
        figures.append(chart_figure("gradient", about))
    if not figures:
        return []
    content = f'<div class="charts">{"".join(figures)}</div>'
    return [("thinking", "Thinking: loss and energy per step", content)]


def tokens(runs: Sequence[Run], thoughts: Sequence[Thoughts | None]) -> list[Section]:
    """The token view, which `tokens.js` draws."""
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


def landscapes(
    runs: Sequence[Run], thoughts: Sequence[Thoughts | None]
) -> list[Section]:
    """Slices of the energy of a few tokens."""
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
