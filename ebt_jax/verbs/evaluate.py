"""`ebt evaluate`."""

from __future__ import annotations

import json
import sys
from typing import Any

from absl import flags

from ebt_jax.command import Flag, Verb
from ebt_jax.errors import UserError
from ebt_jax.verbs import evaluate_tasks
from ebt_jax.verbs.common import (
    CHECKPOINT,
    COUNT,
    TEXT_KEY,
    WORKDIR,
    changed,
    required,
)
from ebt_jax.verbs.model import MESH, Spread, open_trained
from ebt_jax.verbs.thinking import (
    DETAILS,
    THINK,
    check_thinks,
    flops_per_token,
    parse_thinking,
)


def run(values: flags.FlagValues) -> None:
    """Scores text with a checkpoint of --workdir and prints the results."""
    if values.task is not None:
        return evaluate_tasks.run(values)
    if values["items"].value:
        raise UserError("--items is of tasks, but no --task is given; name one")
    workdir = required(values, "workdir", "the folder of a trained run")
    thinking = parse_thinking(values.think)

    from ebt_jax.data import pipeline
    from ebt_jax.evaluation.metrics import evaluate
    from ebt_jax.evaluation.uncertainty import find_doubts, judge, uncertainty_table
    from ebt_jax.training.monitor import finite
    from ebt_jax.training.workdir import open_workdir

    path, config = open_workdir(workdir)
    check_thinks(values.think, thinking, config)
    trained = open_trained(path, config, values.mesh, values.checkpoint)
    config, objective, params = trained.config, trained.objective, trained.params
    data = changed(
        config.data,
        path=values.data,
        text_key=values.text_key,
        packing=values.packing,
    )
    batches = pipeline.held_out_batches(
        data,
        trained.tokenizer,
        batch_size=values.batch_size or config.eval.batch_size,
        sequences=values.sequences,
        split="held_out" if values.data is None else "all",
    )
    batches = Spread(batches, trained.mesh)
    results = evaluate(
        objective,
        params,
        batches,
        seed=config.eval.seed,
        thinking=thinking,
        progress=sys.stderr.isatty(),
    )
    results["flops_per_token"] = flops_per_token(config, params, results)
    judged = {}
    if values.uncertainty:
        seed = config.eval.seed
        judged = judge(
            find_doubts(objective, params, batches, seed=seed, thinking=thinking)
        )
    about = {
        "workdir": str(path),
        "checkpoint": trained.step,
        "data": values.data or f"held-out part of {data.held_out_path or data.path}",
    }
    if values.json:
        doubts = {f"uncertainty/{name}": value for name, value in judged.items()}
        print(json.dumps(about | finite(results | doubts), allow_nan=False))
    else:
        print(_table(about, results))
        if judged:
            print(f"\n{uncertainty_table(judged)}")


def _table(about: dict[str, Any], results: dict[str, float]) -> str:
    """Results for people, one line each."""
    notes = {
        "nll": "nats per token",
        "energy_gap": "before - after",
        "energy_rose": "share of predictions whose energy rose",
        "energy_gradients": "evaluations per token",
        "energy_evaluations": "without gradient, per token",
        "flops_per_token": "of thinking, by formula",
        "energy_spread": "of the candidates' minima, standard deviation",
        "tokens": "scored",
    }
    lines = [f"{name:<24}{value}" for name, value in about.items()]
    for name, value in results.items():
        number = f"{value:,.0f}" if name in ("tokens", "sequences") else f"{value:.5g}"
        lines.append(f"{name:<24}{number:<12}{notes.get(name, '')}".rstrip())
    return "\n".join(lines)


VERB = Verb(
    summary="score text: nll, perplexity, bits per byte, energies",
    details="Scores what the run has held out, or any text, or benchmark tasks: --task "
    "writes\nthe scores of each item to WORKDIR/tasks. The batch size changes no "
    "result.\n\n" + DETAILS,
    example="ebt evaluate --workdir=runs/a --think=fixed:steps=4",
    call=run,
    flags=(
        WORKDIR,
        Flag(
            "data",
            "what to score, as in data.path, or where tasks are; else held-out text",
        ),
        TEXT_KEY,
        Flag("packing", "concat, first_fit or document; else the config's"),
        THINK,
        CHECKPOINT,
        MESH,
        Flag("batch_size", "sequences at once; 0 for the config's", 0, COUNT),
        Flag("sequences", "how many to score; 0 for all", 0, COUNT),
        Flag(
            "uncertainty",
            "whether energy tells which predictions are wrong",
            False,
            flags.DEFINE_boolean,
        ),
        *evaluate_tasks.FLAGS,
        Flag("json", "prints one line of JSON", False, flags.DEFINE_boolean),
    ),
)
