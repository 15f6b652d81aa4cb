"""The sections of a report that are drawn: curves, tokens, landscapes."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from ebt_jax.evaluation.report.landscape import landscape_svg
from ebt_jax.evaluation.report.markup import (
    Section,
    chart_figure,
    number,
    run_name,
    table,
)
from ebt_jax.evaluation.report.runs import Run
from ebt_jax.evaluation.report.thinking import Thoughts, token_kinds
from ebt_jax.thinking import Thinking


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
A click holds a token, Escape lets it go. The stronger the shade, the
larger; gray: given.</p>
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


def policy(runs: Sequence[Run], thoughts: Sequence[Thoughts | None]) -> list[Section]:
    """What a policy of thinking takes and gains, and on what it spends its steps."""
    rows, histograms = [], []
    for i, (run, thought) in enumerate(zip(runs, thoughts, strict=True)):
        if thought is None or thought.policy is None:
            continue
        made, nll = thought.policy, thought.trace.nll[:, thought.scored]
        ways = {f"{thought.trained_steps} steps, as trained": thought.trained_steps}
        ways |= {f"{len(nll) - 1} steps": len(nll) - 1}
        rows += [
            [run_name(i, run), how, number(steps), number(steps), *_loss(nll[steps])]
            for how, steps in ways.items()
        ]
        took, gradients = made.steps[thought.scored], made.gradients[thought.scored]
        means = [number(float(count.mean())) for count in (took, gradients)]
        loss = _loss(made.nll[thought.scored])
        rows.append([run_name(i, run), "this policy", *means, *loss])
        histograms.append(_histogram(i, run, thought))
    if not rows:
        return []
    made = next(t.policy for t in thoughts if t is not None and t.policy is not None)
    said = html.escape(
        ", ".join(
            f"{name} {value}"
            for name, value in made.thinking._asdict().items()
            if value != Thinking._field_defaults[name]
        )
    )
    about = (
        f'<p class="faint">The policy: {said or "as trained"}. Steps and energy '
        "gradients are means per token, of the tokens shown below.</p>"
    )
    head = ["run", "how", "steps", "energy gradients", "nll", "perplexity"]
    content = about + table(head, rows) + "".join(histograms)
    return [("policy", "A policy of thinking", content)]


def _loss(nll: ArrayLike) -> list[str]:
    mean = np.mean(nll, dtype=float)
    with np.errstate(over="ignore"):
        return [number(float(mean)), number(float(np.exp(mean)))]


def _histogram(i: int, run: Run, thought: Thoughts) -> str:
    """How many of each kind of token took how many steps, shaded."""
    assert thought.policy is not None
    texts = [thought.texts[int(token)] for token in thought.target]
    before = [thought.texts[int(token)] for token in thought.before]
    kinds = np.array(token_kinds(texts, before))[thought.scored]
    steps = thought.policy.steps[thought.scored]
    counts = range(int(steps.min()), int(steps.max()) + 1)
    rows = []
    for kind in ["all", *sorted(set(kinds.tolist()))]:
        these = steps if kind == "all" else steps[kinds == kind]
        shares = [float((these == count).mean()) for count in counts]
        cells = [
            f'<span class="share" style="--v:{share:.3f}">{_percent(share)}</span>'
            for share in shares
        ]
        mean = number(float(these.mean()))
        rows.append([kind, number(len(these)), mean, *cells])
    head = ["kind of token", "tokens", "mean steps", *map(str, counts)]
    caption = "Share of the tokens of a kind that took so many steps."
    name = f"<h3>{run_name(i, run)}: steps taken</h3>"
    return name + table(head, rows, caption)


def _percent(share: float) -> str:
    if 0 < share < 0.005:
        return "&lt;1 %"
    return f"{100 * share:.0f} %" if share else ""
