"""The sections of a report that are tables: results, damage, benchmarks, settings."""

from __future__ import annotations

import html
import json
import platform
import statistics
from collections.abc import Sequence

import jax

from ebt_jax.evaluation.report.markup import (
    DASH,
    Section,
    breakable,
    heads,
    number,
    run_name,
    table,
)
from ebt_jax.evaluation.report.runs import (
    Run,
    differing,
    series,
    tokens_per_step,
    units,
)
from ebt_jax.training.objective import build_objective

KINDS = {"ebt": "EBT", "transformer_pp": "Transformer++", "dit": "DiT"}
SIDE_BY_SIDE = 3  # runs whose tables are narrow enough

# Results of a task that stand in the table of all tasks; the others are folded away.
HEADLINES = {
    "think": "policy",
    "counts.items": "items",
    "results.perplexity": "perplexity",
    "results.answer_perplexity": "of the answers",
    "results.bits_per_byte": "bits per byte",
    "results.accuracy": "accuracy",
    "results.chance": "chance",
    "results.exact_match": "exact match",
    "results.f1": "F1",
}


def results(runs: Sequence[Run]) -> list[Section]:
    """What came out of each run, and what they do not have in common."""
    counted = units(runs)
    rows = {
        "model": [kind(run) or DASH for run in runs],
        "parameters": [number(_parameters(run)) for run in runs],
        "optimiser steps": [_steps(run) for run in runs],
        f"{counted} trained on": [number(_tokens_seen(run)) for run in runs],
        "held-out nll, nats per token": _result(runs, "eval/nll"),
        "held-out smooth L1": _result(runs, "eval/smooth_l1"),
        "PSNR, dB": _result(runs, "eval/psnr"),
        "perplexity": _result(runs, "eval/perplexity"),
        "boards solved": _result(runs, "eval/solved"),
        "empty cells right": _result(runs, "eval/cell_accuracy"),
        "bits per byte": _result(runs, "eval/bits_per_byte"),
        "energy, before": _result(runs, "eval/energy_before"),
        "energy, after": _result(runs, "eval/energy_after"),
        "training time": [_duration(run) for run in runs],
        f"{counted} per second, median": [number(_speed(run)) for run in runs],
        "devices": [_device(run) for run in runs],
    }
    rows = {
        name: cells for name, cells in rows.items() if any(c != DASH for c in cells)
    }
    content = table(
        heads(runs),
        [[name, *cells] for name, cells in rows.items()],
    )
    changed = differing(runs)
    if len(runs) > 1 and changed:
        differences = table(
            heads(runs),
            [
                [f"<code>{breakable(key)}</code>", *map(number, values)]
                for key, values in changed.items()
            ],
        )
        content = (
            f"<div><h3>Numbers</h3>{content}</div>"
            f"<div><h3>Settings that differ</h3>{differences}</div>"
        )
    if len(runs) <= SIDE_BY_SIDE:
        content = f'<div class="charts">{content}</div>'
    return [("results", "Results", content)]


def problems(runs: Sequence[Run]) -> list[Section]:
    """What is missing or damaged, so that nobody misses it."""
    notes = [
        f'<p class="note">{run_name(i, run)}: {html.escape(note)}.</p>'
        for i, run in enumerate(runs)
        for note in run.notes
    ]
    return [("missing", "Missing or damaged", "\n".join(notes))] if notes else []


def tasks(runs: Sequence[Run]) -> list[Section]:
    """Benchmark tasks: a line for each task and run, and everything folded away."""
    names = sorted({name for run in runs for name in run.tasks})
    found = [
        (name, i, run)
        for name in names
        for i, run in enumerate(runs)
        if name in run.tasks
    ]
    if not found:
        return []
    shown = [
        k for k in HEADLINES if any(k in run.tasks[name] for name, _, run in found)
    ]
    rows = [
        [
            breakable(name),
            run_name(i, run),
            *(
                number(run.tasks[name][key]) if key in run.tasks[name] else DASH
                for key in shown
            ),
        ]
        for name, i, run in found
    ]
    content = table(["task", "run", *(HEADLINES[key] for key in shown)], rows)
    folded = "\n".join(
        f"<h3>{html.escape(name)}</h3>{_all_numbers(name, runs)}" for name in names
    )
    more = f"<details><summary>All numbers</summary>{folded}</details>"
    return [("tasks", "Benchmarks", content + more)]


def _all_numbers(task: str, runs: Sequence[Run]) -> str:
    found = [run.tasks[task] if task in run.tasks else {} for run in runs]
    keys = dict.fromkeys(key for values in found for key in values)
    rows = [
        [breakable(key), *(number(v[key]) if key in v else DASH for v in found)]
        for key in keys
    ]
    return table(heads(runs), rows)


def settings(runs: Sequence[Run]) -> list[Section]:
    """The whole config of each run, and where the page was made."""
    device = jax.devices()[0]
    parts = [
        f'<p class="faint">This page was made with Python {platform.python_version()}, '
        f"JAX {jax.__version__}, on {html.escape(device.device_kind)} "
        f"({html.escape(platform.platform())}).</p>"
    ]
    for i, run in enumerate(runs):
        lines = [f"{key} = {json.dumps(value)}" for key, value in run.settings.items()]
        lines += [
            f"from step {entry['step']} on: "
            + ", ".join(f"{k} {v}" for k, v in entry.items() if k != "step")
            for entry in run.environments
        ]
        text = html.escape("\n".join(lines)) or "not readable"
        parts.append(
            f"<details><summary>{run_name(i, run)} <code>{html.escape(str(run.path))}"
            f"</code></summary><pre>{text}</pre></details>"
        )
    return [("settings", "Settings and environment", "\n".join(parts))]


def kind(run: Run) -> str:
    """What a run's model is, such as `EBT 4xs`; empty where that cannot be read."""
    if not {"model.kind", "model.size"} <= run.settings.keys():
        return ""
    name, size = run.settings["model.kind"], run.settings["model.size"]
    return f"{KINDS[str(name)] if name in KINDS else name} {size}"


def _parameters(run: Run) -> int | None:
    if run.config is None:
        return None
    shapes = jax.eval_shape(build_objective(run.config).init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def _steps(run: Run) -> str:
    done = number(run.rows[-1]["step"]) if run.rows else DASH
    if "train.steps" not in run.settings:
        return done
    planned = number(run.settings["train.steps"])
    return done if done == planned else f"{done} of {planned}"


def _tokens_seen(run: Run) -> float | None:
    per_step = tokens_per_step(run)
    return per_step and round(run.rows[-1]["step"] * per_step)


def _result(runs: Sequence[Run], name: str) -> list[str]:
    return [number(run.results[name]) if name in run.results else DASH for run in runs]


def _duration(run: Run) -> str:
    seconds = [row["seconds"] for row in run.rows if "seconds" in row]
    if not seconds:
        return DASH
    minutes, rest = divmod(round(seconds[-1]), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _device(run: Run) -> str:
    if not run.environments:
        return DASH
    last = run.environments[-1]
    words = [f"{last[key]}" for key in ("devices", "device") if key in last]
    versions = f", JAX {last['jax']}" if "jax" in last else ""
    return html.escape(" x ".join(words) + versions)


def _speed(run: Run) -> float | None:
    speeds = [speed for _, _, speed in series(run.rows, f"{units([run])}_per_second")]
    return round(statistics.median(speeds)) if speeds else None
