"""The end of a run: thinking curve, samples, plots, summary."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import jax
from jax.sharding import Mesh

from ebt_jax.evaluation import metrics, plots
from ebt_jax.interfaces import Objective
from ebt_jax.refine import PyTree
from ebt_jax.thinking import Thinking
from ebt_jax.training.config import Config
from ebt_jax.training.monitor import finite, say
from ebt_jax.training.sharding import (
    NumpyBatch,
    gathered,
    global_batch,
    on_first_device,
)
from ebt_jax.training.task import Show
from ebt_jax.training.workdir import replace_text

# Numbers that there are after each refinement step.
MEASURES = {
    "nll": "held-out nll (nats per token)",
    "smooth_l1": "held-out smooth L1",
    "mse": "held-out mean squared error",
    "psnr": "held-out PSNR (dB)",
    "cell_accuracy": "held-out share of empty cells that are right",
    "solved": "held-out share of boards that are solved",
}


def evaluate(
    config: Config,
    objective: Objective,
    params: PyTree,
    held_out: Iterable[NumpyBatch],
    mesh: Mesh,
    num_steps: int = 0,
) -> dict[str, float]:
    """The held-out numbers of `evaluation.metrics.evaluate`, named `eval/...`.

    Args:
      config: its section `eval` says how.
      objective: what predicts.
      params: its parameters.
      held_out: batches that every process holds whole.
      mesh: batches are split over its devices where their size allows it.
      num_steps: refinement steps; 0 for `eval.num_steps`.
    """
    numbers = metrics.evaluate(
        objective,
        gathered(params, mesh),
        (global_batch(batch, mesh) for batch in held_out),
        seed=config.eval.seed,
        thinking=Thinking(num_steps or config.eval.num_steps),
    )
    return {f"eval/{name}": value for name, value in numbers.items()}


def close_run(
    config: Config,
    path: Path,
    objective: Objective,
    show: Show,
    params: PyTree,
    held_out: Iterable[NumpyBatch],
    mesh: Mesh,
    step: int,
    row: dict[str, float],
) -> dict[str, float]:
    """Writes what a finished run is judged by; `summary.json` comes last.

    Args:
      config: resolved.
      path: the workdir.
      objective: what was trained.
      show: writes samples.
      params: the final ones.
      held_out: batches to evaluate on.
      mesh: of the run.
      step: updates made.
      row: the last step's numbers; empty for a run that was killed when it had made
        all its steps: what is held out is then evaluated again.

    Returns:
      The numbers in `summary.json`.
    """
    first = jax.process_index() == 0
    results = row or evaluate(config, objective, params, held_out, mesh)
    plotted = []
    if config.log.plots and first:
        plotted.append(plots.learning_curve(path))
    if config.eval.curve_steps and "eval/energy_gap" in results:
        curves = thinking_curves(config, objective, params, held_out, mesh)
        for name, curve in curves.items():
            numbers = {f"thinking/{name}/step_{i}": y for i, y in enumerate(curve, 1)}
            results = {**results, **numbers}
        if config.log.plots and first:
            best = (name for name in ("psnr", "solved") if name in curves)
            shown = next(best, objective.measure)
            label = MEASURES[shown]
            plotted.append(plots.thinking_curve(path, curves[shown], label))
    if config.eval.sample_tokens:
        params = on_first_device(params, mesh)
        if first:
            say(show(objective, params, held_out, path))
    results = {**results, **lowest(path, objective.measure)}
    if first:
        summary = {"step": step, **finite(results)}
        replace_text(path / "summary.json", json.dumps(summary, indent=2) + "\n")
    names = ["metrics.jsonl", "summary.json", *(file.name for file in plotted)]
    say(
        f"done: {step} steps, {held_out_text(results)}; {path} holds checkpoints, "
        f"{', '.join(names)}"
    )
    return results


def lowest(path: Path, measure: str) -> dict[str, float]:
    """The lowest held-out loss of a run, and the step that had it.

    What stopping there would have given: of small corpora the last step is not the
    best.

    Args:
      path: the workdir, whose `metrics.jsonl` is read.
      measure: of the objective.

    Returns:
      `lowest/MEASURE` and `lowest/step`; empty where nothing finite was evaluated.
    """
    found = []
    with open(path / "metrics.jsonl") as file:
        for line in file:
            row = json.loads(line)
            loss = row.get(f"eval/{measure}")
            if loss is not None:  # of a number that is not finite, too
                found.append((loss, row["step"]))
    if not found:
        return {}
    loss, step = min(found)
    return {f"lowest/{measure}": loss, "lowest/step": float(step)}


def held_out_text(results: dict[str, float]) -> str:
    """The held-out numbers in words."""
    if "eval/solved" in results:
        return (
            f"held-out boards solved {results['eval/solved']:.1%}, empty cells right "
            f"{results['eval/cell_accuracy']:.1%}"
        )
    if "eval/nll" in results:
        return (
            f"held-out nll {results['eval/nll']:.4f} nats per token (perplexity "
            f"{results['eval/perplexity']:.2f})"
        )
    text = f"held-out smooth L1 {results['eval/smooth_l1']:.5f}"
    if "eval/psnr" in results:
        text += f" (PSNR {results['eval/psnr']:.2f} dB)"
    return text


def read_summary(path: Path) -> dict[str, float]:
    """The numbers and the `step` of a closed run; empty for any other."""
    file = path / "summary.json"
    if not file.exists():
        return {}
    numbers = json.loads(file.read_text())
    return {k: math.nan if v is None else v for k, v in numbers.items()}


def thinking_curves(
    config: Config,
    objective: Objective,
    params: PyTree,
    held_out: Iterable[NumpyBatch],
    mesh: Mesh,
) -> dict[str, list[float]]:
    """Held-out measures after 1, 2, ..., `eval.curve_steps` refinement steps."""
    steps = config.eval.curve_steps
    numbers = evaluate(config, objective, params, held_out, mesh, num_steps=steps)
    return {
        name: [numbers[f"eval/{name}/step_{i}"] for i in range(1, steps + 1)]
        for name in MEASURES
        if f"eval/{name}/step_1" in numbers
    }
