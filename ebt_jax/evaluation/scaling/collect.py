"""Points of scaling curves: from the folders of finished runs, or from a table."""

from __future__ import annotations

import csv
import glob
import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ebt_jax.errors import UserError
from ebt_jax.evaluation.report.runs import (
    Run,
    differing,
    measure,
    read_run,
    short_names,
)
from ebt_jax.evaluation.scaling.axes import axis_of
from ebt_jax.evaluation.scaling.laws import Points
from ebt_jax.training.config import Config

SEED = "train.seed"
BASELINES = ("transformer_pp", "dit")
# Changes no loss, or shows only in it.
IGNORED = ("eval", "mesh", "checkpoint", "log")
SCORING = ("eval.sequences", "eval.seed")  # what has to be the same
COLUMNS = ("group", "x", "y", "seed")


class Point(NamedTuple):
    """The loss of a run.

    Attributes:
      group: its method.
      x: what the loss is put against.
      y: the loss.
      seed: of the run.
      source: its folder, or the line of its table.
    """

    group: str
    x: float
    y: float
    seed: int
    source: str


class Collected(NamedTuple):
    """Points, and what they are of.

    Attributes:
      points: in the order of their groups.
      x_label: what x is.
      y_label: what y is.
      baseline: the group that looks like one; None if none does.
      notes: what was left out, a sentence each.
    """

    points: list[Point]
    x_label: str
    y_label: str
    baseline: str | None
    notes: list[str]


def by_group(points: Sequence[Point]) -> dict[str, Points]:
    """The points of each group, as arrays.

    Raises:
      UserError: for what no law can be fitted to.
    """
    for point in points:
        for name, value in (("x", point.x), ("y", point.y)):
            if not (math.isfinite(value) and value > 0):
                raise UserError(
                    f"{name} of {point.source} is {value}, but has to be positive and "
                    "finite; leave that one out"
                )
    if len({point.x for point in points}) < 2:
        raise UserError(
            f"x is {points[0].x:g} in all {len(points)} runs; choose the axis along "
            "which they differ with --x"
        )
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.group, []).append(point)
    for name, its in groups.items():
        places = len({point.x for point in its})
        if places < 3:
            raise UserError(
                f"{name!r} has {len(its)} runs at {places} different x, but a law "
                "needs 3 or more; add runs, or leave the group out"
            )
        for one, other in itertools.combinations(its, 2):
            if (one.x, one.seed) == (other.x, other.seed):
                raise UserError(
                    f"{one.source} and {other.source} are both of {name!r} with x "
                    f"{one.x:g} and seed {one.seed}; leave one out, or choose groups "
                    "with --by"
                )
    return {
        name: Points(
            np.array([point.x for point in its], float),
            np.array([point.y for point in its], float),
        )
        for name, its in groups.items()
    }


def from_runs(
    patterns: Sequence[str], x: str, y: str | None, by: Sequence[str]
) -> Collected:
    """Points of finished runs.

    Args:
      patterns: folders, or globs of them.
      x: a key of `axes.AXES`.
      y: a number of `summary.json`; None for the held-out loss.
      by: settings whose values make groups; none for all that differ.

    Raises:
      UserError: if there is no finished run, the runs were not scored alike, or lack y.
    """
    axis = axis_of(x)
    grouped, notes = groups_of(patterns, axis.keys, by)
    runs = [run for _, run, _ in grouped]
    measures = {f"eval/{measure(run)}" for run in runs}
    if y is None and len(measures) > 1:
        raise UserError(f"runs have {' and '.join(sorted(measures))}; choose with --y")
    name = y or measures.pop()
    points = []
    for group, run, config in grouped:
        if name not in run.results:
            known = ", ".join(key for key in run.results if key.startswith("eval/"))
            raise UserError(
                f"summary.json of {run.path} has no finite {name!r}; it has {known}"
            )
        seed = config.train.seed
        place = float(axis.of(run, config))
        points.append(Point(group, place, run.results[name], seed, str(run.path)))
    kinds = {group: config.model.kind for group, _, config in grouped}
    plain = [group for group, kind in kinds.items() if kind in BASELINES]
    label = "held-out loss (nats per token)" if name == "eval/nll" else name
    order = sorted(points, key=lambda point: (point.group, point.x, point.seed))
    return Collected(
        order, axis.label, label, plain[0] if len(plain) == 1 else None, notes
    )


def groups_of(
    patterns: Sequence[str], apart: Sequence[str], by: Sequence[str]
) -> tuple[list[tuple[str, Run, Config]], list[str]]:
    """Finished runs with the name of their method, and what was left out.

    Args:
      patterns: folders, or globs of them.
      apart: settings that do not tell methods apart.
      by: settings whose values make methods; none for all others that differ.

    Raises:
      UserError: if there is no finished run, or the runs were not scored alike.
    """
    runs, notes = _finished(patterns)
    settled = [(run, config) for run in runs if (config := run.config) is not None]
    if len(settled) < len(runs):
        bad = next(run for run in runs if run.config is None)
        raise UserError(f"{bad.path}: {bad.notes[0]}")
    _check_alike(runs, by)
    names = _named(runs, _keys(runs, apart, by), folders_first=bool(apart))
    found = [
        (name, run, config) for name, (run, config) in zip(names, settled, strict=True)
    ]
    return found, notes


def from_table(path: str) -> Collected:
    """Points of a CSV file with the columns group, x, y and seed.

    Raises:
      UserError: if it cannot be read, lacks a column or a value, or has a value that is
        no number.
    """
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--csv={path!r} cannot be read: {error}") from error
    if not rows:
        raise UserError(f"--csv={path!r} has no rows below its header")
    points = []
    for line, row in enumerate(rows, 2):
        source = f"line {line} of {path}"
        for column in COLUMNS:
            if not row.get(column):
                raise UserError(
                    f"{source} has no {column!r}; the columns are {','.join(COLUMNS)}"
                )
        try:
            numbers = float(row["x"]), float(row["y"]), int(row["seed"])
        except ValueError as error:
            raise UserError(f"{source}: {error}") from error
        points.append(Point(row["group"], *numbers, source))
    plain = [name for name in {p.group: 0 for p in points} if name in BASELINES]
    return Collected(points, "x", "y", plain[0] if plain else None, [])


def _finished(patterns: Sequence[str]) -> tuple[list[Run], list[str]]:
    """The finished runs among folders, and what is to be said of the others."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        matches = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
        if not matches:
            raise UserError(f"--runs: nothing is at {pattern!r}; name folders of runs")
        found |= {Path(match).resolve(): None for match in matches}
    runs = [path for path in found if (path / "config.json").is_file()]
    finished = [path for path in runs if (path / "summary.json").is_file()]
    if not finished:
        raise UserError(
            f"--runs: no finished run is at {', '.join(patterns)} ({len(runs)} began); "
            "a finished one has a summary.json"
        )
    notes = []
    if len(runs) > len(finished):
        left = [path.name for path in runs if path not in finished]
        shown = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
        notes.append(f"{len(left)} runs have not finished and are left out: {shown}")
    names = short_names(finished)
    read = [read_run(path, name) for path, name in zip(finished, names, strict=True)]
    return read, notes


def _check_alike(runs: Sequence[Run], by: Sequence[str]) -> None:
    """That all runs were trained on the same data and scored alike."""
    differ = [
        f"{key} ({', '.join(sorted({repr(value) for value in values}))})"
        for key, values in differing(runs).items()
        if (key in SCORING or key.startswith("data.")) and key not in by
    ]
    if differ:
        raise UserError(
            f"the runs cannot be compared, as they differ in {'; '.join(differ)}; "
            "leave some out, or name the key in --by"
        )


def _keys(
    runs: Sequence[Run], apart: Sequence[str], by: Sequence[str]
) -> dict[str, list]:
    """Settings that make groups, with the value of each run."""
    if by:
        for key in by:
            if not any(key in run.settings for run in runs):
                raise UserError(f"--by: the config has no key {key!r}")
        return {key: [run.settings.get(key) for run in runs] for key in by}
    return {
        key: values
        for key, values in differing(runs).items()
        if key != SEED
        and key not in apart
        and (key.split(".")[0] not in IGNORED or key == "eval.num_steps")
    }


def _named(
    runs: Sequence[Run], keys: dict[str, list], folders_first: bool
) -> list[str]:
    """A name for the group of each run: of their folders, else of settings.

    Runs of several x have in their folder's name what a method is; those that differ in
    their seed alone have it in the beginning of their own.
    """
    values = [tuple(values[i] for values in keys.values()) for i in range(len(runs))]
    groups: dict[tuple, list[int]] = {}
    for i, value in enumerate(values):
        groups.setdefault(value, []).append(i)
    for name_of in (_parent, _stem) if folders_first else (_stem, _parent):
        names = {
            value: name_of([runs[i] for i in its]) for value, its in groups.items()
        }
        if all(names.values()) and len(set(names.values())) == len(names):
            return [names[value] for value in values]
    for count in range(1, len(keys) + 1):
        for chosen in itertools.combinations(range(len(keys)), count):
            short = {tuple(value[k] for k in chosen) for value in groups}
            if len(short) == len(groups):
                named = [list(keys)[k].split(".", 1)[-1] for k in chosen]
                return [
                    " ".join(
                        f"{name}={value[k]}"
                        for name, k in zip(named, chosen, strict=True)
                    )
                    for value in values
                ]
    return [str(runs[0].settings.get("model.kind", "all"))] * len(runs)


def _parent(runs: Sequence[Run]) -> str:
    """The folder that runs are in, if it is one."""
    found = {run.path.parent.name for run in runs}
    return found.pop() if len(found) == 1 else ""


def _stem(runs: Sequence[Run]) -> str:
    """What the names of runs begin with, up to a mark."""
    start = os.path.commonprefix([run.path.name for run in runs])
    if len(runs) > 1 and "-" in start:
        start = start.rpartition("-")[0]
    return start.rstrip("-_.")
