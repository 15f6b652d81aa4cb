"""The end of a run: thinking curve, text sample, plots, summary."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import jax
from jax.sharding import Mesh

from ebt_jax.data.tokenizers import Tokenizer
from ebt_jax.evaluation import generation, metrics, plots
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
from ebt_jax.training.workdir import replace_text


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
    tokenizer: Tokenizer,
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
      tokenizer: decodes the sample.
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
        curve = thinking_curve(config, objective, params, held_out, mesh)
        results = {
            **results,
            **{f"thinking/nll/step_{i}": nll for i, nll in enumerate(curve, 1)},
        }
        if config.log.plots and first:
            plotted.append(plots.thinking_curve(path, curve))
    if config.eval.sample_tokens and objective.decoder is not None:
        params = on_first_device(params, mesh)
        if first:
            text = sample(config, objective, tokenizer, params, held_out)
            (path / "sample.txt").write_text(text + "\n")
            say(f"--- sample, begun by held-out text\n{text}\n---")
    if first:
        summary = {"step": step, **finite(results)}
        replace_text(path / "summary.json", json.dumps(summary, indent=2) + "\n")
    names = ["metrics.jsonl", "summary.json", *(file.name for file in plotted)]
    say(
        f"done: {step} steps, held-out nll {results['eval/nll']:.4f} nats per token "
        f"(perplexity {results['eval/perplexity']:.2f}); {path} holds checkpoints, "
        f"{', '.join(names)}"
    )
    return results


def read_summary(path: Path) -> dict[str, float]:
    """The numbers and the `step` of a closed run; empty for any other."""
    file = path / "summary.json"
    if not file.exists():
        return {}
    numbers = json.loads(file.read_text())
    return {k: math.nan if v is None else v for k, v in numbers.items()}


def thinking_curve(
    config: Config,
    objective: Objective,
    params: PyTree,
    held_out: Iterable[NumpyBatch],
    mesh: Mesh,
) -> list[float]:
    """Held-out nll after 1, 2, ..., `eval.curve_steps` refinement steps."""
    steps = config.eval.curve_steps
    numbers = evaluate(config, objective, params, held_out, mesh, num_steps=steps)
    return [numbers[f"eval/nll/step_{i}"] for i in range(1, steps + 1)]


def sample(
    config: Config,
    objective: Objective,
    tokenizer: Tokenizer,
    params: PyTree,
    held_out: Iterable[NumpyBatch],
) -> str:
    """The beginning of the held-out text, continued."""
    prompt = next(iter(held_out))["tokens"][0, : max(config.data.context // 4, 1)]
    (added,) = generation.generate_ids(
        objective,
        params,
        [prompt],
        context=config.data.context,
        new_tokens=config.eval.sample_tokens,
        sampling=generation.Sampling(config.eval.sample_temperature),
        seed=config.eval.seed,
        thinking=Thinking(config.eval.num_steps),
        vocab_size=tokenizer.vocab_size,
    )
    return tokenizer.decode([*prompt, *added.tokens])
