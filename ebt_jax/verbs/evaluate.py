"""`ebt evaluate`."""

from __future__ import annotations

import json
import sys

from absl import flags

from ebt_jax.command import Flag, Verb
from ebt_jax.errors import UserError
from ebt_jax.verbs import evaluate_judgement, evaluate_tasks, evaluate_vision
from ebt_jax.verbs.common import (
    CHECKPOINT,
    COUNT,
    TEXT_KEY,
    WORKDIR,
    changed,
    required,
    results_table,
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
    """Scores held-out data with a checkpoint of --workdir and prints the results."""
    if values.task is not None:
        return evaluate_tasks.run(values)
    if values["items"].value:
        raise UserError("--items is of tasks, but no --task is given; name one")
    evaluate_judgement.check_flags(values)
    workdir = required(values, "workdir", "the folder of a trained run")
    thinking = parse_thinking(values.think)

    from ebt_jax.data import pipeline
    from ebt_jax.evaluation.metrics import evaluate
    from ebt_jax.training.monitor import finite
    from ebt_jax.training.workdir import open_workdir

    path, config = open_workdir(workdir)
    if config.model.space != "text":
        return evaluate_vision.run(values, path, config, thinking)
    evaluate_vision.check_space(values, "text")
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
    results = evaluate(
        objective,
        params,
        Spread(batches, trained.mesh),
        seed=config.eval.seed,
        thinking=thinking,
        progress=sys.stderr.isatty(),
    )
    results["flops_per_token"] = flops_per_token(config, params, results)
    about = {
        "workdir": str(path),
        "checkpoint": trained.step,
        "data": values.data or f"held-out part of {data.held_out_path or data.path}",
    }
    judged, tables = evaluate_judgement.run(values, trained, batches, about, thinking)
    if values.json:
        print(json.dumps(about | finite(results | judged), allow_nan=False))
    else:
        print(results_table(about, results))
        for table in tables:
            print(f"\n{table}")


VERB = Verb(
    summary="score text, images or video: losses, energies, tables",
    details="Scores what the run has held out, or any text, or benchmark tasks: --task "
    "writes\nthe scores of each item to WORKDIR/tasks, --uncertainty and "
    "--verification to\nfolders of their names, for `ebt report`. Of images PSNR, MSE, "
    "SSIM and L1\nagainst forward passes. The batch size changes no result.\n\n"
    + DETAILS,
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
        *evaluate_judgement.FLAGS,
        *evaluate_tasks.FLAGS,
        *evaluate_vision.FLAGS,
        Flag("json", "prints one line of JSON", False, flags.DEFINE_boolean),
    ),
)
