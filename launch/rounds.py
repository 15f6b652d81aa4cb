"""What a sweep consists of: runs, checked, round after round.

An experiment file's `sweep()` returns the first round. Where the file defines
`following(results)`, that is called after each round with the held-out loss of every
run made so far, by its workdir, and returns the next round, empty for the end. A run
that diverged has no result. Successive halving is then a few lines:

    def following(results):
        best = sorted(results, key=results.get)[: len(results) // 2]
        ...
"""

from __future__ import annotations

import collections
import inspect
import json
import math
import os
import runpy
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from ebt_jax import cli
from ebt_jax.command import parse, suggest
from ebt_jax.errors import UserError

Given = list[dict[str, Any]]  # runs as an experiment file has them
LOSSES = ("eval/nll", "eval/smooth_l1")  # what `following` is told, the first there is


class Run(NamedTuple):
    """A run of a sweep.

    Attributes:
      workdir: its folder, which is also its name.
      arguments: flags of the verb.
      verb: of `ebt`.
    """

    workdir: str
    arguments: list[str]
    verb: str = "train"


class Sweep(NamedTuple):
    """What an experiment file says of its sweep.

    Attributes:
      first: the runs of the first round.
      following: results so far -> the runs of the next round; None if there is none.
    """

    first: Given
    following: Callable[[dict[str, float]], Given] | None


def expand(argument: str) -> Sweep:
    """The sweep of an experiment file.

    Args:
      argument: the file's path; what follows a colon is passed to its `sweep` and, as
        a second argument, to its `following`.

    Raises:
      UserError: if there is no such file or function, or it returns something else.
    """
    file, colon, words = argument.partition(":")
    if not Path(file).is_file():
        raise UserError(
            f"experiment file {file!r} does not exist; name one, such as "
            "experiments/text.py"
        )
    names = runpy.run_path(file, run_name="ebt_sweep")
    if "sweep" not in names:
        raise UserError(
            f"experiment file {file!r} defines no sweep(); see experiments/text.py"
        )
    if colon and not inspect.signature(names["sweep"]).parameters:
        raise UserError(
            f"sweep() of {file!r} takes no words, but {words!r} is given; leave out "
            "what is behind the colon"
        )
    further = [words] if colon else []
    first = names["sweep"](*further)
    following = None
    if "following" in names:
        following = lambda results: _listed(
            names["following"](results, *further), file, "following"
        )
    return Sweep(_listed(first, file, "sweep"), following)


def settings(changes: Sequence[str]) -> dict[str, str]:
    """Flags and their values from `FLAG=VALUE` strings.

    Raises:
      UserError: for one without `=`.
    """
    for change in changes:
        if "=" not in change:
            raise UserError(
                f"--set={change!r} has no value; write it as "
                "--set=config.data.path=input.txt"
            )
    pairs = (change.lstrip("-").partition("=") for change in changes)
    return {name: value for name, _, value in pairs}


def select(expanded: Given, changes: Mapping[str, str], only: str) -> list[Run]:
    """Runs of a sweep, each checked as `ebt` would check it.

    Args:
      expanded: as an experiment file has them.
      changes: of `settings`; made in trainings.
      only: what a command has to contain.

    Raises:
      UserError, flags.Error: for an unknown verb, flag or key, a missing workdir, or
        what stands in its place twice or too early.
    """
    runs = []
    for number, given in enumerate(expanded):
        given = dict(given)
        verb = str(given.pop("verb", "train"))
        if verb not in cli.VERBS:
            raise UserError(
                f"run {number} of the sweep has the verb {verb!r}, which `ebt` does "
                f"not{suggest(verb, cli.VERBS)} Known: {', '.join(cli.VERBS)}"
            )
        values = {**given, **(changes if verb == "train" else {})}
        if "workdir" not in values:
            raise UserError(
                f"run {number} of the sweep has no workdir, which every run needs; add "
                "it to what sweep() returns"
            )
        arguments = [f"--{name}={value}" for name, value in values.items()]
        if only in shlex.join(arguments):
            runs.append(Run(str(values["workdir"]), arguments, verb))
    _check_order(runs)
    for run in runs:
        parsed(run)
    return runs


def rounds(sweep: Sweep, changes: Mapping[str, str], only: str) -> Iterator[list[Run]]:
    """The rounds of a sweep; each is asked for once the one before has been made.

    Args:
      sweep: of `expand`.
      changes: as for `select`.
      only: as for `select`.

    Raises:
      UserError, flags.Error: as `select`; if no run is left of the first round, or a
        round has nothing new.
    """
    runs = select(sweep.first, changes, only)
    if not runs:
        raise UserError(
            f"none of the {len(sweep.first)} runs contains --only={only!r}; leave it "
            "out to see them"
        )
    made: list[Run] = []
    while runs:
        yield runs
        made += runs
        if sweep.following is None:
            return
        runs = select(sweep.following(results_of(made)), changes, only)
        if runs and all(run in made for run in runs):
            raise UserError(
                "following() returned only runs that had been made; to end a sweep it "
                "has to return []"
            )


def results_of(runs: Sequence[Run]) -> dict[str, float]:
    """Held-out losses by workdir, of the runs that have a summary."""
    found = {}
    for run in runs:
        try:
            summary = json.loads((Path(run.workdir) / "summary.json").read_text())
        except (OSError, ValueError):
            continue
        for name in LOSSES:
            if name in summary:
                loss = summary[name]
                found[run.workdir] = math.nan if loss is None else float(loss)
                break
    return found


def is_done(run: Run) -> bool:
    """Whether a run is a training that has made all its updates."""
    if run.verb != "train" or not os.path.exists(f"{run.workdir}/summary.json"):
        return False

    from ebt_jax.training.workdir import check_workdir, is_finished
    from ebt_jax.verbs.train import given_config

    return is_finished(check_workdir(run.workdir), given_config(parsed(run)))


def parsed(run: Run) -> flags.FlagValues:
    """The flags of a run, checked.

    Raises:
      UserError, flags.Error: for whatever is wrong with them.
    """
    return parse(cli.VERBS[run.verb], [run.verb, *run.arguments])


def _listed(found: Any, file: str, function: str) -> Given:
    if not isinstance(found, list) or not all(isinstance(run, dict) for run in found):
        raise UserError(
            f"{function}() of {file!r} has to return a list of dicts, the flags of "
            "`ebt train`; see experiments/text.py"
        )
    return found


def _check_order(runs: Sequence[Run]) -> None:
    """That a workdir has one training, and nothing before it or twice."""
    by_workdir: dict[str, list[Run]] = collections.defaultdict(list)
    for run in runs:
        by_workdir[run.workdir].append(run)
    for workdir, its in by_workdir.items():
        trainings = [i for i, run in enumerate(its) if run.verb == "train"]
        if len(trainings) > 1 or any(run in its[:i] for i, run in enumerate(its)):
            raise UserError(
                f"{len(its)} runs of the sweep share the workdir {workdir!r}; each "
                "training needs its own, and further runs of it their own flags"
            )
        if trainings and trainings[0]:
            raise UserError(
                f"the sweep lists an {its[0].verb!r} of {workdir!r} before its "
                "training; list the training first"
            )
