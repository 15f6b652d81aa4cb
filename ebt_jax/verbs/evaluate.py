"""`ebt evaluate`."""

from __future__ import annotations

import json
import sys

from absl import flags

from ebt_jax.command import Flag, Verb
from ebt_jax.errors import UserError
from ebt_jax.verbs import (
    evaluate_board,
    evaluate_judgement,
    evaluate_tasks,
    evaluate_vision,
)
from ebt_jax.verbs.common import (
    CHECKPOINT,
    COUNT,
    RESULTS,
    TEXT_KEY,
    TRAINED,
    changed,
    required,
    results_table,
)
from ebt_jax.verbs.model import MESH, Spread, Trained, open_trained
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
    from ebt_jax.training import packed
    from ebt_jax.training.monitor import finite
    from ebt_jax.training.workdir import open_workdir

    path, config = open_workdir(workdir)
    if config.model.space == "board":
        evaluate_vision.check_space(values, "board")
        return evaluate_board.run(values, path, config, thinking)
    if config.model.space != "text":
        return evaluate_vision.run(values, path, config, thinking)
    evaluate_vision.check_space(values, "text")
    check_thinks(values.think, thinking, config)
    if values.data is None:
        packed.check_data(path, "give the text to score with --data")
    trained = open_trained(path, config, values.mesh, values.checkpoint)
    if values.ensemble is not None:
        trained = _ensemble(values, trained)
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
    if values.ensemble is None:
        results["flops_per_token"] = flops_per_token(config, params, results)
    about = {
        "workdir": str(path),
        "checkpoint": trained.step,
        "data": values.data or f"held-out part of {data.held_out_path or data.path}",
    }
    if values.ensemble is not None:
        about["ensemble"] = ", ".join(values.ensemble)
    judged, tables = evaluate_judgement.run(values, trained, batches, about, thinking)
    if values.json:
        print(json.dumps(about | finite(results | judged), allow_nan=False))
    else:
        print(results_table(about, results))
        for table in tables:
            print(f"\n{table}")


def _ensemble(values: flags.FlagValues, trained: Trained) -> Trained:
    """The run's model and those of --ensemble, as one that predicts their mean."""
    from ebt_jax.composition import ensemble
    from ebt_jax.training.workdir import open_workdir

    for name in ("uncertainty", "verification"):
        if values[name].value:
            raise UserError(
                f"--{name} is of one model's energies, which --ensemble has not; leave "
                "one out"
            )
    members = [trained]
    for folder in values.ensemble:
        path, config = open_workdir(folder)
        if config.model.space != "text":
            raise UserError(f"--ensemble names {folder}, which is no run of text")
        member = open_trained(path, config, values.mesh, None)
        if member.tokenizer.digest != trained.tokenizer.digest:
            raise UserError(
                f"--ensemble names {folder}, whose tokenizer is "
                f"{member.tokenizer.name!r}, but that of the run is "
                f"{trained.tokenizer.name!r}; average models of one tokenizer"
            )
        members.append(member)
    together = ensemble([member.objective for member in members], [1.0] * len(members))
    params = {"members": [member.params for member in members]}
    return trained._replace(objective=together, params=params)


VERB = Verb(
    summary="score text, images, video or boards: losses, energies, tables",
    details="Scores what the run has held out, or any text, or benchmark tasks: --task "
    "writes\nthe scores of each item to WORKDIR/tasks, --uncertainty and "
    "--verification to\nfolders of their names, for `ebt report`. Of images PSNR, MSE, "
    "SSIM and L1\nagainst forward passes. Of boards how many are solved, by givens, "
    "steps and\nattempts. The batch size changes no result.\n\n"
    "The tasks arithmetic, arithmetic_far, dyck and dyck_far are made, as the text of\n"
    "the run is or as --data says. Of tasks --think takes several, apart by semicolons."
    "\n\n" + DETAILS,
    example="ebt evaluate --workdir=runs/a --think=fixed:steps=4",
    call=run,
    flags=(
        TRAINED,
        Flag(
            "data",
            "what to score, as in data.path, or where tasks are; else held-out text",
        ),
        RESULTS,
        TEXT_KEY,
        Flag("packing", "concat, first_fit or document; else the config's"),
        THINK,
        CHECKPOINT,
        MESH,
        Flag("batch_size", "sequences at once; 0 for the config's", 0, COUNT),
        Flag("sequences", "how many to score; 0 for all", 0, COUNT),
        Flag(
            "ensemble",
            "other runs of text, or models: their mean with this is scored",
            None,
            flags.DEFINE_list,
        ),
        *evaluate_judgement.FLAGS,
        *evaluate_tasks.FLAGS,
        *evaluate_vision.FLAGS,
        *evaluate_board.FLAGS,
        Flag("json", "prints one line of JSON", False, flags.DEFINE_boolean),
    ),
)
