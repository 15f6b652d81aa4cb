"""What is in the workdirs of runs, read so that damage costs no more than its piece.

What is missing or damaged becomes a note of the run, and the report goes on without it.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ebt_jax.errors import UserError
from ebt_jax.training.config import Config, from_json, to_json
from ebt_jax.training.environment import read_environments

Found = TypeVar("Found")
Row = dict[str, Any]
Scalars = dict[str, float | int | str | bool]


class Doubted(NamedTuple):
    """What `ebt evaluate --uncertainty` found, see `evaluation.uncertainty`.

    Attributes:
      results: of `judge`.
      curves: of `doubt_curves`; None in place of what is not finite.
    """

    results: dict[str, float]
    curves: dict[str, dict[str, list[float | None]]]


class Seen(NamedTuple):
    """What `ebt evaluate` found out about images or video, see `evaluation.vision`.

    Attributes:
      denoising: `denoise.Row` by row, its quality among the other fields.
      horizons: `horizons.Horizon` by row.
      others: numbers by name of a part, such as `retrieval`, and its row.
    """

    denoising: list[dict[str, Any]]
    horizons: list[dict[str, Any]]
    others: dict[str, dict[str, dict[str, float]]]


class Run(NamedTuple):
    """A workdir.

    Attributes:
      path: of the workdir, absolute.
      name: short, and no other run's of the report.
      settings: `config.json`, dotted keys; empty if it cannot be read.
      config: the same, checked; None if it is not one of this version.
      rows: objects of `metrics.jsonl`, numbers that were not finite left out.
      results: `summary.json`, else the last evaluation of the metrics.
      environments: what it ran on, see `training.environment`; empty if not known.
      tasks: benchmark tasks by name, what is scalar in their files, dotted keys.
      policies: by the same names, numbers by the policy of thinking that gave them.
      doubts: measures of doubt, by the name of what was scored.
      verified: what `ebt evaluate --verification` found, by the same, `verify`.
      seen: of images or video, by the name of what was scored.
      notes: what is missing or damaged, a sentence each.
    """

    path: Path
    name: str
    settings: Scalars
    config: Config | None
    rows: list[Row]
    results: dict[str, float]
    environments: list[dict[str, Any]]
    tasks: dict[str, Scalars]
    policies: dict[str, dict[str, dict[str, float]]]
    doubts: dict[str, Doubted]
    verified: dict[str, dict[str, float]]
    seen: dict[str, Seen]
    notes: list[str]


def read_runs(workdirs: Sequence[str]) -> list[Run]:
    """Reads workdirs.

    Raises:
      UserError: if there is none, one is no run, or one is named twice.
    """
    if not workdirs:
        raise UserError("--workdir is missing; give it the folders of one or more runs")
    paths = [Path(workdir).expanduser().absolute() for workdir in workdirs]
    for path in paths:
        if not (path / "config.json").is_file():
            raise UserError(
                f"{path} holds no run: there is no config.json; name workdirs that "
                "`ebt train` was given, separated by commas"
            )
    real = [path.resolve() for path in paths]
    for i, path in enumerate(real):
        if path in real[:i]:
            raise UserError(f"--workdir names {paths[i]} twice; name each run once")
    names = short_names(paths)
    return [read_run(path, name) for path, name in zip(paths, names, strict=True)]


def read_run(path: Path, name: str) -> Run:
    """Reads a workdir, whatever state it is in."""
    notes: list[str] = []
    settings, config = _read_config(path, notes)
    rows = _read_rows(path, notes)
    results = _read_results(path, rows, notes)
    return Run(
        path=path,
        name=name,
        settings=settings,
        config=config,
        rows=rows,
        results=results,
        environments=_read_environments(path, notes),
        tasks=_read_folder(path, "tasks", _scores, notes),
        policies=_read_folder(path, "tasks", _by_policy, []),  # notes are above
        doubts=_read_folder(path, "uncertainty", _doubted, notes),
        verified=_read_folder(
            path, "verification", lambda found: _numbers(found["results"]), notes
        ),
        seen=_read_folder(path, "vision", _seen, notes),
        notes=notes,
    )


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of paths, as many of them as tell one from another."""
    longest = max(len(path.parts) for path in paths)
    for length in range(1, longest + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def series(rows: Sequence[Row], name: str) -> list[tuple[int, float, float]]:
    """Step, seconds of the run and value of every row that has a value.

    Args:
      rows: of a run.
      name: of the value, such as `train/loss`.
    """
    return [
        (row["step"], row["seconds"] if "seconds" in row else math.nan, row[name])
        for row in rows
        if name in row
    ]


def tokens_per_step(run: Run) -> float | None:
    """Mean of the logged steps, without padding; None where nothing is logged."""
    counts = [tokens for _, _, tokens in series(run.rows, "train/tokens")]
    return statistics.mean(counts) if counts else None


def thinned(
    points: Sequence[tuple[int, float, float]], most: int
) -> tuple[list[tuple[int, float, float]], int]:
    """At most so many points, each the mean of as many neighbours.

    Returns:
      The points, and of how many each is the mean.
    """
    size = max(1, math.ceil(len(points) / most))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    means = [
        tuple(sum(column) / len(group) for column in zip(*group, strict=True))
        for group in groups
    ]
    return [(round(step), seconds, value) for step, seconds, value in means], size


def thinking_curve(run: Run) -> list[float]:
    """Held-out loss after 1, 2, ... refinement steps; empty if there is no curve.

    Of a run that has not finished as many steps as in training.
    """
    for part in ("thinking", "eval"):
        curve: list[float] = []
        name = f"{part}/{measure(run)}/step"
        while f"{name}_{len(curve) + 1}" in run.results:
            curve.append(run.results[f"{name}_{len(curve) + 1}"])
        if curve:
            return curve
    return []


def measure(run: Run) -> str:
    """What a run's held-out loss is: `nll` of text and boards, else `smooth_l1`."""
    return "nll" if space(run) in ("text", "board") else "smooth_l1"


def units(runs: Sequence[Run]) -> str:
    """What is counted in runs: tokens, frames, images or boards."""
    names = {"text": "tokens", "video": "frames", "image": "images", "board": "boards"}
    return " or ".join(dict.fromkeys(names[space(run)] for run in runs))


def space(run: Run) -> str:
    """What a run predicts: text, video, image or board."""
    known = "model.space" in run.settings  # older runs say nothing of it
    found = run.settings["model.space"] if known else "text"
    return found if found in ("video", "image", "board") else "text"


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs; None where a run has no such one."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    values = {key: [run.settings.get(key) for run in runs] for key in keys}
    readable = [i for i, run in enumerate(runs) if run.settings]
    return {
        key: found
        for key, found in values.items()
        if any(found[i] != found[readable[0]] for i in readable)
    }


def flat(tree: dict[str, Any], prefix: str = "") -> Scalars:
    """Numbers, texts and truth values of a nested dict, by dotted keys."""
    found: Scalars = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, str | int | float):
            found[prefix + key] = value
    return found


def _read_config(path: Path, notes: list[str]) -> tuple[Scalars, Config | None]:
    text = ""
    try:
        text = (path / "config.json").read_text()
        settings = flat(json.loads(text))
    except (OSError, ValueError, AttributeError) as error:
        notes.append(f"config.json cannot be read ({_reason(error)}): no settings")
        return {}, None
    try:
        config = from_json(text)
        return flat(json.loads(to_json(config))), config  # as an older run was made
    except (ValueError, TypeError, AttributeError) as error:
        notes.append(
            f"config.json is not of this version of EBT-JAX ({error}): its settings "
            "are shown, but nothing that needs the model"
        )
        return settings, None


def _read_rows(path: Path, notes: list[str]) -> list[Row]:
    try:
        lines = (path / "metrics.jsonl").read_text().splitlines()
    except (OSError, ValueError) as error:
        notes.append(f"metrics.jsonl cannot be read ({_reason(error)}): no curves")
        return []
    rows, damaged = [], []
    for number, line in enumerate(lines, 1):
        try:
            row = _numbers(json.loads(line))
            row["step"] = int(row["step"])
            rows.append(row)
        except (ValueError, KeyError, AttributeError):
            damaged.append(number)
    if damaged:
        which = ", ".join(map(str, damaged[:5])) + (", ..." if damaged[5:] else "")
        notes.append(f"metrics.jsonl: line {which} is damaged and left out")
    if not rows and not damaged:
        notes.append("metrics.jsonl is empty: the run has logged nothing yet")
    return rows


def _read_results(path: Path, rows: list[Row], notes: list[str]) -> dict[str, float]:
    try:
        return _numbers(json.loads((path / "summary.json").read_text()))
    except FileNotFoundError:
        why = "summary.json is missing: the run has not finished"
    except (OSError, ValueError, AttributeError) as error:
        why = f"summary.json cannot be read ({_reason(error)})"
    notes.append(f"{why}; results are those of the last evaluation in metrics.jsonl")
    evaluated = [row for row in rows if any(key.startswith("eval/") for key in row)]
    return evaluated[-1] if evaluated else {}


def _read_environments(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    try:
        return read_environments(path)
    except OSError as error:
        notes.append(f"environment.json cannot be read ({_reason(error)})")
        return []


def _read_folder(
    path: Path, folder: str, read: Callable[[Any], Found], notes: list[str]
) -> dict[str, Found]:
    """What is in the JSON files of a folder, by their names."""
    found = {}
    for file in sorted((path / folder).glob("*.json")):
        try:
            found[file.stem] = read(json.loads(file.read_text()))
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            notes.append(f"{folder}/{file.name} cannot be read ({_reason(error)})")
    return found


def _scores(task: dict[str, Any]) -> Scalars:
    return flat({key: value for key, value in task.items() if key != "policies"})


def _by_policy(task: dict[str, Any]) -> dict[str, dict[str, float]]:
    if "policies" not in task:
        return {}  # as older versions wrote it
    return {policy: _numbers(found) for policy, found in task["policies"].items()}


def _doubted(found: dict[str, Any]) -> Doubted:
    names = ("coverage", "risk", "doubt", "nll", "wrong")
    curves = {
        measure: {name: list(curve[name]) for name in names}
        for measure, curve in found["curves"].items()
    }
    return Doubted(_numbers(found["results"]), curves)


def _seen(found: dict[str, Any]) -> Seen:
    fields = ("noise_level", "what", "passes", "psnr", "mse", "ssim", "l1")
    tables = {
        "denoising": lambda row: {name: row[name] for name in fields},
        "horizons": lambda row: {
            "ahead": row["ahead"],
            "model": _numbers(row["model"]),
            "copying": _numbers(row["copying"]),
        },
    }
    rows = {
        name: [read(row) for row in found[name]] if name in found else []
        for name, read in tables.items()
    }
    others = {
        name: {"": _numbers(found[name])}
        for name in ("fid", "retrieval")
        if name in found
    }
    if "probe" in found:
        probed = found["probe"].items()
        others["probe"] = {of: _numbers(numbers) for of, numbers in probed}
    return Seen(rows["denoising"], rows["horizons"], others)


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """Those that are numbers: what was not finite is null."""
    return {
        key: value
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is none"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return str(error)
