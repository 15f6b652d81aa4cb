"""`ebt inspect`."""

from __future__ import annotations

import dataclasses

from absl import flags

from ebt_jax.command import Flag, Verb
from ebt_jax.verbs.common import COUNT, FLOAT


def run(values: flags.FlagValues) -> None:
    """Prints what a config's training would take."""
    from ebt_jax.evaluation.inspect import inspect
    from ebt_jax.evaluation.planning import simulate_devices
    from ebt_jax.training.config import from_config_dict

    config = from_config_dict(values.config)
    if values.devices:
        simulate_devices(values.devices)
        if not config.refine.block:
            # What an accelerator does; on a CPU fewer would be taken at a time.
            whole = config.train.batch_size * config.data.context
            refine = dataclasses.replace(config.refine, block=whole)
            config = dataclasses.replace(config, refine=refine)
    print(inspect(config, values.memory_gib))


VERB = Verb(
    summary="show parameters, FLOPs, memory and traffic of a config; runs nothing",
    details="""\
The training step is compiled for the devices that are there, or, with --devices,
for so many that need not be there. Bytes of parameters, optimiser state and
traffic are exact; temporaries are those that XLA plans on a CPU.""",
    example="ebt inspect --config=experiments/text.py:size=xs --devices=256",
    call=run,
    flags=(
        Flag("devices", "plan for so many devices; 0: those that are there", 0, COUNT),
        Flag("memory_gib", "memory of a device, to see what fits; 0: any", 0.0, FLOAT),
    ),
    config="required",
)
