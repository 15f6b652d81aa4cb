"""`ebt train`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from absl import flags

from ebt_jax.command import Flag, Verb
from ebt_jax.verbs.common import COUNT, INTEGER, POSITIVE, WORKDIR, required

if TYPE_CHECKING:  # else `ebt train --help` would wait for JAX
    from ebt_jax.training.config import Config


def run(values: flags.FlagValues) -> None:
    """Trains the config's model in --workdir, or continues the run that is there."""
    workdir = required(values, "workdir", "a folder for what the run writes")
    config = given_config(values)

    from ebt_jax.training.distributed import Processes, running
    from ebt_jax.training.loop import train

    processes = Processes(
        detect=values.distributed,
        coordinator=values.coordinator,
        count=values.num_processes,
        index=values.process_id,
        connect_seconds=values.connect_seconds,
        heartbeat_seconds=values.heartbeat_seconds,
    )
    with running(processes):
        train(config, workdir, values.resume_from or "")


def given_config(values: flags.FlagValues) -> Config:
    """The config of a command line, unresolved."""
    from ebt_jax.training.config import from_config_dict

    if values.steps is not None:
        values.config.train.steps = values.steps
    if values.init_from is not None:
        values.config.train.init_from = values.init_from
    return from_config_dict(values.config)


VERB = Verb(
    summary="train a model, or continue a run that was stopped",
    details="The workdir gets config.json, metrics.jsonl, checkpoints, plots and a "
    "text sample.\nThe same command continues a run at its newest checkpoint.\n"
    "Exit code 0: done, 2: a mistake, 3: diverged, 75: stopped by SIGTERM, a lost\n"
    "process or storage, to be started again; 130: Ctrl-C, which saves, too.",
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
        Flag(
            "distributed",
            "processes as TPU pod, SLURM, MPI or GKE have them",
            False,
            flags.DEFINE_boolean,
        ),
        Flag("coordinator", "several processes: HOST:PORT of the first"),
        Flag("num_processes", "several processes: how many", None, POSITIVE),
        Flag("process_id", "several processes: which this is, from 0", None, COUNT),
        Flag("connect_seconds", "until all processes have to be there", 300, POSITIVE),
        Flag(
            "heartbeat_seconds",
            "of silence until a process counts as dead",
            60,
            POSITIVE,
        ),
    ),
    config="required",
)
