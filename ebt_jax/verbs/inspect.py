"""`ebt inspect`."""

from __future__ import annotations

from absl import flags

from ebt_jax.command import Verb


def run(values: flags.FlagValues) -> None:
    """Prints what a config's training would take."""
    from ebt_jax.evaluation.inspect import inspect
    from ebt_jax.training.config import from_config_dict

    print(inspect(from_config_dict(values.config)))


VERB = Verb(
    summary="show parameters, FLOPs and memory of a config; runs nothing",
    details="The training step is compiled for the devices that are there.",
    example="ebt inspect --config=experiments/text.py:size=xs",
    call=run,
    config="required",
)
