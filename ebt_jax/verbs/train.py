"""`ebt train`."""

from __future__ import annotations

from absl import flags

from ebt_jax.command import Flag, Verb
from ebt_jax.verbs.common import INTEGER, WORKDIR, required


def run(values: flags.FlagValues) -> None:
    """Trains the config's model in --workdir, or continues the run that is there."""
    workdir = required(values, "workdir", "a folder for what the run writes")
    if values.steps is not None:
        values.config.train.steps = values.steps
    if values.init_from is not None:
        values.config.train.init_from = values.init_from

    from ebt_jax.training.config import from_config_dict
    from ebt_jax.training.loop import train

    train(from_config_dict(values.config), workdir, values.resume_from or "")


VERB = Verb(
    summary="train a model, or continue a run that was stopped",
    details="The workdir gets config.json, metrics.jsonl, checkpoints, plots and a "
    "text sample.\nThe same command continues a run at its newest checkpoint.",
    example="ebt train --config=experiments/text.py:quickstart --workdir=runs/a",
    call=run,
    flags=(
        WORKDIR,
        Flag("steps", "short for --config.train.steps", None, INTEGER),
        Flag(
            "init_from", "parameters to begin with: WORKDIR[@STEP], .safetensors, .npz"
        ),
        Flag(
            "resume_from", "WORKDIR[@STEP] whose whole state a new workdir begins with"
        ),
    ),
    config="required",
)
