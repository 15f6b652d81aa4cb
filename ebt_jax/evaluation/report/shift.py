"""Gains of thinking: on other data than a run was trained on, and over seeds."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

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
    differing,
    measure,
    space,
    thinking_curve,
)
from ebt_jax.refine import make_schedule

HELD_OUT = "held-out text"
MORE_STEPS = "more steps"
SINCE_FIRST = "steps of training"


class Gain(NamedTuple):
    """What thinking does to the perplexity of some data.

    Attributes:
      data: its name.
      way: how it was thought: `MORE_STEPS`, `SINCE_FIRST`, or a policy as `--think` has
        it.
      steps: the most steps of the first two; 0 of a policy.
      perplexity: with the trained number of steps, or after the first (`SINCE_FIRST`).
      shift: perplexity with the trained number of steps over the held-out one; how far
        the data is from training.
      share: how much lower perplexity gets; 0.1 is 10 %, below 0 it gets higher.
    """

    data: str
    way: str
    steps: int
    perplexity: float
    shift: float
    share: float


def gains(run: Run) -> list[Gain]:
    """Gains of a run, first on held-out text, then on benchmark tasks by shift.

    More steps are those of held-out text at the end of training, and of the tasks that
    were scored step by step. Policies are those that tasks were scored with besides, on
    the same items. Empty for a model that does not think.
    """
    trained, curves = _curves(run)
    found = []
    for data, curve in curves.items():
        at, base = curve[trained - 1], curves[HELD_OUT][trained - 1]
        if len(curve) > trained:
            found.append(_gain(data, MORE_STEPS, len(curve), at, base, curve))
        policies = run.policies[data] if data in run.policies else {}
        found += [
            _gain(data, policy, 0, at, base, [numbers["nll"]])
            for policy, numbers in policies.items()
            if not _curve(numbers) and "nll" in numbers
        ]
    return _by_shift(found)


def gains_since_first_step(run: Run) -> list[Gain]:
    """What the steps of training gain over the first of them, in the order of `gains`.

    Empty for a model that was trained for one step, or does not think.
    """
    trained, curves = _curves(run)
    if trained < 2:
        return []
    found = []
    for data, curve in curves.items():
        first, last, base = curve[0], curve[trained - 1], curves[HELD_OUT][trained - 1]
        gain = _gain(data, SINCE_FIRST, trained, first, base, [last])
        found.append(gain._replace(shift=_exp(last - base)))
    return _by_shift(found)


def _curves(run: Run) -> tuple[int, dict[str, list[float]]]:
    """The steps of training, and nll after 1, 2, ... of at least as many, by data.

    Held-out text comes first; without its curve, or a model that thinks, there is none.
    """
    if run.config is None or run.config.model.kind != "ebt" or space(run) != "text":
        return 0, {}
    trained = run.config.eval.num_steps or int(make_schedule(run.config.refine).length)
    curves = {HELD_OUT: list(thinking_curve(run))}
    if len(curves[HELD_OUT]) < trained:
        return trained, {}
    for data, policies in run.policies.items():
        curves[data] = max(map(_curve, policies.values()), key=len, default=[])
    return trained, {d: curve for d, curve in curves.items() if len(curve) >= trained}


def _by_shift(found: Sequence[Gain]) -> list[Gain]:
    return sorted(found, key=lambda gain: (gain.data != HELD_OUT, gain.shift))


def shift_section(runs: Sequence[Run], drawn: bool) -> list[Section]:
    """What thinking gains, against how far the data is from that of training.

    Args:
      runs: in the order of the page.
      drawn: whether there is a chart `shift`.
    """
    found = [(i, run, gain) for i, run in enumerate(runs) for gain in gains(run)]
    if not any(gain.data != HELD_OUT for _, _, gain in found):
        return []
    rows = [
        [
            breakable(gain.data),
            run_name(i, run),
            breakable(said(gain)),
            number(gain.perplexity),
            f"{gain.shift:.2f}",
            percent(gain.share),
        ]
        for i, run, gain in found
    ]
    about = (
        '<p class="faint">How much lower perplexity gets by thinking more than in '
        "training. Shift: the perplexity of the data divided by that of held-out text, "
        "both as trained.</p>"
    )
    figure = ""
    if drawn:
        figure = chart_figure("shift", "Gain by thinking against shift.")
    head = ["data", "run", "how", "perplexity", "shift", "gain"]
    content = f'{about}<div class="charts">{figure}{table(head, rows)}</div>'
    return [("shift", "What thinking gains on other data", content)]


def seeds_section(runs: Sequence[Run]) -> list[Section]:
    """Means and spread of runs that differ in nothing but their seed."""
    groups = by_seed(runs)
    if all(len(group) == 1 for group in groups):
        return []
    firsts = [group[0] for group in groups]
    changed = {
        key: max(values, key=values.count)  # what most have, or the first
        for key, values in differing(firsts).items()
        if key != "train.seed"
    }
    by_group = [[gain for run in group for gain in gains(run)] for group in groups]
    every = sorted((gain for found in by_group for gain in found), key=_column)
    columns = {_column(gain): said(gain) for gain in every}
    rows = []
    for group, found in zip(groups, by_group, strict=True):
        losses = [(run.results, f"eval/{measure(run)}") for run in group]
        held_out = [results[name] for results, name in losses if name in results]
        shares = [
            [100 * gain.share for gain in found if _column(gain) == column]
            for column in columns
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
        "what is its own",
        "seeds",
        "held-out loss",
        *(
            f"gain, %: {breakable(data)}, {breakable(how)}"
            for (_, data, _), how in columns.items()
        ),
    ]
    about = (
        '<p class="faint">Mean and, behind ±, standard deviation over runs that differ '
        "in nothing but their seed. Gain: how much lower perplexity gets by thinking "
        "more than in training, in per cent.</p>"
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
    """Mean and sample standard deviation of some values, as HTML."""
    if not values:
        return DASH
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean}&nbsp;±&nbsp;{statistics.stdev(values):.{digits}f}"


def _settings(run: Run, usual: dict[str, Any]) -> str:
    """What a run has that is not usual."""
    unusual = [
        f"<code>{breakable(key)}</code> {number(run.settings[key])}"
        for key, value in usual.items()
        if key in run.settings and run.settings[key] != value
    ]
    return "<br>".join(unusual) or DASH


def _common_name(group: Sequence[Run]) -> str:
    """What the names of runs begin with, without what is left of a number."""
    if len(group) == 1:
        return group[0].name
    common = os.path.commonprefix([run.name for run in group])
    return common.rstrip("-_./ =") or group[0].name


def said(gain: Gain) -> str:
    """How it was thought, for people."""
    if gain.way == SINCE_FIRST:
        return f"1 to {gain.steps} steps"
    return f"{gain.steps} steps" if gain.way == MORE_STEPS else gain.way


def _column(gain: Gain) -> tuple[bool, str, str]:
    """What gains of several runs have in common; held-out text comes first."""
    return gain.data != HELD_OUT, gain.data, said(gain)


def _gain(
    data: str, way: str, steps: int, at: float, base: float, nll: Sequence[float]
) -> Gain:
    """Of nll `at` the trained number of steps, and nll that ends with the way's."""
    return Gain(data, way, steps, _exp(at), _exp(at - base), 1 - _exp(nll[-1] - at))


def _curve(numbers: dict[str, float]) -> list[float]:
    """Nll after 1, 2, ... steps; empty if it was not found step by step."""
    curve: list[float] = []
    while (name := f"nll/step_{len(curve) + 1}") in numbers:
        curve.append(numbers[name])
    return curve


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
