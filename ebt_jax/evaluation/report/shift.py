"""Gains of thinking: on other data than a run was trained on, and over seeds."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from ebt_jax.evaluation.report.markup import (
    DASH,
    Section,
    breakable,
    chart_figure,
    number,
    run_name,
    table,
)
from ebt_jax.evaluation.report.runs import (
    Run,
    Scalars,
    differing,
    space,
    thinking_curve,
)
from ebt_jax.refine import make_schedule

HELD_OUT = "held-out text"
_PER_STEP = "results.nll/step_"


class Gain(NamedTuple):
    """What more steps than in training do to the perplexity of some data.

    Attributes:
      perplexity: with the trained number of steps.
      shift: that divided by the held-out one; how far the data is from training.
      trained: steps.
      most: the most steps that were scored.
      share: how much lower perplexity is with them; 0.1 is 10 %, below 0 it is higher.
    """

    perplexity: float
    shift: float
    trained: int
    most: int
    share: float


def gains(run: Run) -> dict[str, Gain]:
    """Gains by data: held-out text, then the benchmark tasks scored step by step.

    Empty for a model that does not think, and where no more steps were scored.
    """
    if run.config is None or run.config.model.kind != "ebt" or space(run) != "text":
        return {}
    trained = run.config.eval.num_steps or int(make_schedule(run.config.refine).length)
    curves = {HELD_OUT: thinking_curve(run)}
    curves |= {name: _curve(task) for name, task in run.tasks.items()}
    held_out = curves[HELD_OUT]
    if len(held_out) < trained:
        return {}
    found = {}
    for name, nll in curves.items():
        if len(nll) <= trained:
            continue
        at, most = nll[trained - 1], nll[-1]
        shift = _exp(at - held_out[trained - 1])
        share = 1 - _exp(most - at)
        found[name] = Gain(_exp(at), shift, trained, len(nll), share)
    return found


def shift_section(runs: Sequence[Run], drawn: bool) -> list[Section]:
    """What thinking gains, against how far the data is from that of training.

    Args:
      runs: in the order of the page.
      drawn: whether there is a chart `shift`.
    """
    rows = [
        [
            breakable(name),
            run_name(i, run),
            number(gain.perplexity),
            f"{gain.shift:.2f}",
            f"{gain.trained} to {gain.most}",
            percent(gain.share),
        ]
        for i, run in enumerate(runs)
        for name, gain in sorted(gains(run).items(), key=lambda item: item[1].shift)
    ]
    if not any(len(gains(run)) > 1 for run in runs):
        return []
    about = (
        '<p class="faint">How much lower perplexity gets by more steps than in '
        "training. Shift: the perplexity of the data divided by that of held-out text, "
        "both with the trained number of steps.</p>"
    )
    figure = ""
    if drawn:
        figure = chart_figure("shift", "Gain by thinking against shift.")
    head = ["data", "run", "perplexity", "shift", "steps", "gain"]
    content = f'{about}<div class="charts">{figure}{table(head, rows)}</div>'
    return [("shift", "What thinking gains on other data", content)]


def seeds_section(runs: Sequence[Run]) -> list[Section]:
    """Means and spread of runs that differ in nothing but their seed."""
    groups = by_seed(runs)
    if all(len(group) == 1 for group in groups):
        return []
    firsts = [group[0] for group in groups]
    changed = [key for key in differing(firsts) if key != "train.seed"]
    by_run = [[gains(run) for run in group] for group in groups]
    names = list(
        dict.fromkeys(name for each in by_run for found in each for name in found)
    )
    rows = []
    for group, found in zip(groups, by_run, strict=True):
        held_out = [r.results["eval/nll"] for r in group if "eval/nll" in r.results]
        shares = [
            [100 * each[name].share for each in found if name in each] for name in names
        ]
        rows.append(
            [
                breakable(_common_name(group)),
                _settings(group[0], changed),
                number(len(group)),
                spread(held_out, 4),
                *(spread(each, 2) for each in shares),
            ]
        )
    head = [
        "config",
        "what differs",
        "seeds",
        "held-out nll",
        *(f"gain, {breakable(name)}, %" for name in names),
    ]
    about = (
        '<p class="faint">Mean and, behind ±, standard deviation over runs that differ '
        "in nothing but their seed. Gain: how much lower perplexity gets by more steps "
        "than in training, in per cent.</p>"
    )
    return [("seeds", "Over seeds", about + table(head, rows))]


def by_seed(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs in groups of the same settings but for the seed, in the order given.

    A run without settings is a group of its own.
    """
    groups: dict[tuple, list[Run]] = {}
    for i, run in enumerate(runs):
        rest = {k: v for k, v in run.settings.items() if k != "train.seed"}
        key = tuple(sorted((k, repr(v)) for k, v in rest.items())) or (i,)
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def percent(share: float) -> str:
    """A share of 1 with its sign, in per cent, as HTML."""
    return f"{100 * share:+.1f}&nbsp;%" if math.isfinite(share) else DASH


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and sample standard deviation of some values."""
    if not values:
        return DASH
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _settings(run: Run, keys: Sequence[str]) -> str:
    said = [
        f"<code>{breakable(key)}</code> {number(run.settings[key])}"
        for key in keys
        if key in run.settings
    ]
    return "<br>".join(said) or DASH


def _common_name(group: Sequence[Run]) -> str:
    """What the names of runs begin with, without what is left of a number."""
    if len(group) == 1:
        return group[0].name
    common = os.path.commonprefix([run.name for run in group])
    return common.rstrip("-_./ =") or group[0].name


def _curve(task: Scalars) -> list[float]:
    """Nll of a task after 1, 2, ... steps; empty if there is none."""
    curve: list[float] = []
    while f"{_PER_STEP}{len(curve) + 1}" in task:
        curve.append(float(task[f"{_PER_STEP}{len(curve) + 1}"]))
    return curve


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
