"""Several methods, several seeds each, on the same boards.

    python -m ebt_jax.evaluation.boards.compare runs/sudoku/*

reads what `ebt evaluate` has written to each workdir. Runs whose folders differ in
nothing but a number at the end, as `ebt-0` and `ebt-1`, are seeds of one method. An
interval is 95 % of a bootstrap that draws runs of each method and, for all of them
alike, boards: it is of other seeds and other boards.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ebt_jax.errors import UserError
from ebt_jax.evaluation.boards.judge import RESAMPLES, aligned, interval, shown

FILE = Path("boards", "held_out.json")


def compare(workdirs: Sequence[str | Path]) -> str:
    """Tables of boards solved by each method, and by how much that differs.

    Args:
      workdirs: of runs that were evaluated on the same boards.

    Returns:
      For each range of givens a table: boards solved, what steps and the choice by
      energy add, the AUROC of energies (means over seeds), and how many boards more are
      solved than by the method named last.

    Raises:
      UserError: if a run was not evaluated, or on other boards.
    """
    methods: dict[str, list[dict[str, Any]]] = {}
    for workdir in map(Path, workdirs):
        file = workdir / FILE
        if not file.is_file():
            raise UserError(
                f"{workdir} has no {FILE}; run `ebt evaluate --workdir={workdir}` first"
            )
        name = re.sub(r"-?\d+$", "", workdir.name) or workdir.name
        methods.setdefault(name, []).append(json.loads(file.read_text())["givens"])
    if not methods:
        raise UserError("no workdir is given; name those of evaluated runs")
    first = next(iter(methods.values()))[0]
    for name, runs in methods.items():
        if any(_boards(run) != _boards(first) for run in runs):
            raise UserError(
                f"a run of {name} was evaluated on {_boards(runs[0])} and the first "
                f"one on {_boards(first)}; give --givens and --sequences alike"
            )
    return "\n\n".join(_table(band, methods) for band in first)


def bootstrap(
    rng: np.random.Generator, solved: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Shares solved in bootstrap samples, `[RESAMPLES]` for each method.

    Args:
      rng: draws.
      solved: `[runs, boards]` of each method, boards the same for all.
    """
    boards = next(iter(solved.values())).shape[1]
    even = np.full(boards, 1 / boards)
    weights = rng.multinomial(boards, even, RESAMPLES) / boards
    made = {}
    for name, values in solved.items():
        runs = rng.integers(len(values), size=(RESAMPLES, len(values)))
        made[name] = (values[runs].mean(axis=1) * weights).sum(axis=1)
    return made


def _table(band: str, methods: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    solved = {
        name: np.array([run[band]["each"] for run in runs])
        for name, runs in methods.items()
    }
    drawn = bootstrap(np.random.default_rng(0), solved)
    last = list(methods)[-1]
    heads = ["method", "runs", "solved", "of each", "steps add", "energy adds"]
    heads += ["AUROC", f"more than {last}"]
    rows = []
    for name, runs in methods.items():
        found = [run[band] for run in runs]
        each = solved[name].mean(axis=1)
        more = solved[name].mean() - solved[last].mean()
        rows.append(
            [
                name,
                str(len(runs)),
                shown(_share(solved[name], drawn[name])),
                " ".join(f"{100 * share:.1f}" for share in each),
                _mean([run["thinking"][0] for run in found if "thinking" in run], "+"),
                _mean(
                    [
                        run["best_of"][-1]["gain"][0]
                        for run in found
                        if "best_of" in run
                    ],
                    "+",
                ),
                _mean(
                    [run["auroc"][0] for run in found if run.get("auroc")], "", ".3f"
                ),
                "-"
                if name == last
                else shown(_number(more, drawn[name] - drawn[last]), "+"),
            ]
        )
    return f"{band} given\n{aligned(heads, rows)}"


def _share(solved: np.ndarray, drawn: np.ndarray) -> list[float]:
    """Of `[runs, boards]`; where nothing varies, as `judge.interval` has it."""
    if np.ptp(drawn) < 1e-9:
        return interval(np.random.default_rng(0), solved.mean(axis=0))
    return _number(solved.mean(), drawn)


def _number(mean: float, drawn: np.ndarray) -> list[float]:
    return [float(mean), *map(float, np.quantile(drawn, [0.025, 0.975]))]


def _mean(values: Sequence[float], sign: str, form: str = ".1%") -> str:
    return f"{np.mean(values):{sign}{form}}" if values else "-"


def _boards(run: Mapping[str, Any]) -> dict[str, int]:
    return {band: found["boards"] for band, found in run.items()}


if __name__ == "__main__":
    try:
        print(compare(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
