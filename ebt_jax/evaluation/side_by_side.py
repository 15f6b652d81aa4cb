"""Methods side by side: losses over seeds, what they cost, how far apart they are.

Runs that differ in nothing but the seed are one method. The difference to a baseline is
taken seed by seed, since runs of a seed read the same sequences in the same order, and
its 95 % interval is Student's over seeds: it is of other seeds, not of other text.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ebt_jax.errors import UserError
from ebt_jax.evaluation.intervals import student
from ebt_jax.evaluation.report.runs import Run, measure, thinking_curve
from ebt_jax.evaluation.scaling.axes import flops_of, seconds_of, tokens_of
from ebt_jax.evaluation.scaling.collect import BASELINES, groups_of
from ebt_jax.training.config import Config

SHOWN_STEPS = (1, 2, 3, 4, 8)  # of refinement


class Method(NamedTuple):
    """Runs of one method.

    Attributes:
      name: of their folders, or of what is their own.
      kind: of model, such as `ebt`.
      losses: by seed.
      tokens: of training, each run.
      flops: of training, by formula, each run; NaN where there is none.
      seconds: measured of updates, the median over runs; NaN where nothing was logged.
      curve: losses after 1, 2, ... refinement steps, means over runs; empty for a model
        that does not refine.
    """

    name: str
    kind: str
    losses: dict[int, float]
    tokens: int
    flops: float
    seconds: float
    curve: list[float]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.mean(self.losses.values())


class Difference(NamedTuple):
    """How much more the loss of a method is than that of another.

    Attributes:
      mean: over the seeds that both have.
      low: the interval's lower end; NaN with one seed.
      high: its upper end.
      seeds: how many both have.
    """

    mean: float
    low: float
    high: float
    seeds: int


class SideBySide(NamedTuple):
    """What is compared.

    Attributes:
      loss: what it is called.
      baseline: name of the method that others are compared to.
      methods: by name, the baseline first, then from the lowest mean loss on.
      differences: to the baseline, by name; without methods that share no seed with it.
      notes: what was left out, a sentence each.
    """

    loss: str
    baseline: str
    methods: dict[str, Method]
    differences: dict[str, Difference]
    notes: list[str]


def side_by_side(
    patterns: Sequence[str],
    y: str | None = None,
    by: Sequence[str] = (),
    baseline: str | None = None,
) -> SideBySide:
    """Puts finished runs side by side.

    Args:
      patterns: folders, or globs of them.
      y: a number of `summary.json`; None for the held-out loss.
      by: settings whose values make methods; none for all that differ.
      baseline: name of a method; None for the best feed-forward one, or the best.

    Raises:
      UserError: if there is no finished run, they were not scored alike or lack y, a
        method has two runs of a seed, or there is no such baseline.
    """
    found, notes = groups_of(patterns, (), by)
    losses = {f"eval/{measure(run)}" for _, run, _ in found}
    if y is None and len(losses) > 1:
        raise UserError(f"runs have {' and '.join(sorted(losses))}; choose with --y")
    loss = y or losses.pop()
    grouped: dict[str, list[tuple[Run, Config]]] = {}
    for name, run, config in found:
        grouped.setdefault(name, []).append((run, config))
    methods = {name: _method(name, runs, loss) for name, runs in grouped.items()}
    order = sorted(methods, key=lambda name: methods[name].mean)
    if baseline is None:
        plain = [name for name in order if methods[name].kind in BASELINES]
        baseline = (plain or order)[0]
    elif baseline not in methods:
        raise UserError(
            f"--baseline={baseline!r} is no method; there are: {', '.join(order)}"
        )
    order = [baseline, *(name for name in order if name != baseline)]
    differences = {
        name: difference(methods[name].losses, methods[baseline].losses)
        for name in order[1:]
        if set(methods[name].losses) & set(methods[baseline].losses)
    }
    return SideBySide(
        loss, baseline, {name: methods[name] for name in order}, differences, notes
    )


def difference(one: Mapping[int, float], other: Mapping[int, float]) -> Difference:
    """One less the other, paired by seed, with Student's interval.

    Args:
      one: losses by seed.
      other: losses by seed, at least one seed the same.
    """
    seeds = sorted(set(one) & set(other))
    each = [one[seed] - other[seed] for seed in seeds]
    mean = statistics.mean(each)
    return Difference(mean, *student(each), len(each))


def table(found: SideBySide) -> list[list[str]]:
    """A table's heads and its lines."""
    base = found.methods[found.baseline]
    heads = ["method", f"{found.loss}, mean (range)", "seeds"]
    heads += [f"to {found.baseline}", "tokens", "FLOPs", "seconds"]
    curves = any(method.curve for method in found.methods.values())
    steps = [
        step
        for step in SHOWN_STEPS
        if any(step <= len(method.curve) for method in found.methods.values())
    ]
    if curves:
        heads.append(f"after {', '.join(map(str, steps))} steps")
    rows = []
    for name, method in found.methods.items():
        values = list(method.losses.values())
        row = [
            name,
            f"{method.mean:.4f} ({min(values):.4f} to {max(values):.4f})",
            str(len(values)),
            _said(found.differences[name]) if name in found.differences else "-",
            f"{method.tokens:,}",
            _against(method.flops, base.flops),
            _against(method.seconds, base.seconds),
        ]
        if curves:
            reached = [step for step in steps if step <= len(method.curve)]
            each = ", ".join(f"{method.curve[step - 1]:.4f}" for step in reached)
            row.append(each or "-")
        rows.append(row)
    return [heads, *rows]


def as_json(found: SideBySide) -> dict[str, Any]:
    """All of it; not all of it is finite."""
    return {
        "loss": found.loss,
        "baseline": found.baseline,
        "methods": {
            name: {**method._asdict(), "mean": method.mean}
            for name, method in found.methods.items()
        },
        "differences": {
            name: difference._asdict() for name, difference in found.differences.items()
        },
        "notes": found.notes,
    }


def _method(name: str, runs: Sequence[tuple[Run, Config]], loss: str) -> Method:
    losses: dict[int, float] = {}
    for run, config in runs:
        if loss not in run.results:
            known = ", ".join(key for key in run.results if key.startswith("eval/"))
            raise UserError(
                f"summary.json of {run.path} has no finite {loss!r}; it has {known}"
            )
        if config.train.seed in losses:
            raise UserError(
                f"{run.path} is the second run of {name!r} with seed "
                f"{config.train.seed}; leave one out, or choose methods with --by"
            )
        losses[config.train.seed] = run.results[loss]
    _, config = runs[0]
    curves = [thinking_curve(run) for run, _ in runs]
    return Method(
        name,
        config.model.kind,
        losses,
        tokens_of(config),
        flops_of(config),
        statistics.median(seconds_of(run.rows) for run, _ in runs),
        [statistics.mean(each) for each in zip(*curves, strict=False)],
    )


def _said(found: Difference) -> str:
    if math.isnan(found.low):
        return f"{found.mean:+.4f} (one seed)"
    return f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f})"


def _against(value: float, base: float) -> str:
    """A cost, and how many times that of the baseline."""
    if math.isnan(value):
        return "-"
    form = f"{value:.3g}" if value < 1000 else f"{value:.2e}"
    return f"{form}, {value / base:.2f} x" if base > 0 else form
