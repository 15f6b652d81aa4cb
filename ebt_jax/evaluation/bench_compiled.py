"""What a training step costs before it runs: its memory, and compiling it.

Everything is lowered and compiled from shapes; no array is made.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from ebt_jax.errors import UserError
from ebt_jax.evaluation.bench_timed import relative
from ebt_jax.evaluation.inspect import batch_shapes
from ebt_jax.training.config import Config
from ebt_jax.training.objective import build_objective
from ebt_jax.training.optim import make_optimizer
from ebt_jax.training.step import init_state, make_step

MIB = 2**20


def memory(configs: Sequence[Config], say: Callable[[str], None]) -> dict[str, Any]:
    """Memory of the compiled training step.

    Args:
      configs: resolved; one row for each. Where the next one has the same model, its
        row tells the `growth` of the temporaries.
      say: told what is compiled.

    Returns:
      `rows`, see `bench.bench`.

    Raises:
      UserError: where the backend does not tell.
    """
    rows = []
    for config in configs:
        model, batch, seq = config.model, config.train.batch_size, config.data.context
        say(f"compiling {model.kind}, {batch} x {seq}")
        analysis = _lower(config).compile().memory_analysis()
        if analysis is None:
            raise UserError(
                f"the backend {jax.default_backend()!r} does not tell how much memory "
                "a program needs; choose another, such as JAX_PLATFORMS=cpu"
            )
        temporaries = analysis.temp_size_in_bytes
        row = {
            "model": model.kind,
            "batch": batch,
            "seq": seq,
            "temporaries_mib": temporaries / MIB,
            "arrays": temporaries / (4 * batch * seq * model.vocab_size),
            "arguments_mib": analysis.argument_size_in_bytes / MIB,
        }
        if rows and rows[-1]["model"] == model.kind:
            row["growth"] = row["temporaries_mib"] / rows[-1]["temporaries_mib"]
        rows.append(row)
    return {"rows": rows}


def compiling(configs: Sequence[Config], say: Callable[[str], None]) -> dict[str, Any]:
    """Seconds to trace and lower, and to compile, the training step.

    Args:
      configs: resolved; one row for each. The first one of a model is what its others
        are compared with.
      say: told what is compiled.

    Returns:
      `rows`, see `bench.bench`, with the `ratio` of lowering and compiling together to
      that of the first row of the same model.
    """
    _lower(_small(configs[0])).compile()  # the first of a process loads libraries
    rows = []
    for config in configs:
        model = config.model
        steps = config.refine.num_steps if model.kind == "ebt" else 0
        say(f"compiling {model.kind}, {model.layers} layers, {steps} steps")
        jax.clear_caches()  # else what an earlier row traced comes for free
        begin = time.perf_counter()
        lowered = _lower(config)
        middle = time.perf_counter()
        lowered.compile()
        end = time.perf_counter()
        rows.append(
            {
                "model": model.kind,
                "layers": model.layers,
                "refine_steps": steps,
                "lower_seconds": middle - begin,
                "compile_seconds": end - middle,
                "seconds": end - begin,
            }
        )
    relative(rows, "ratio", "seconds", ("model",))
    return {"rows": rows}


def _lower(config: Config) -> Any:
    objective = build_objective(config)
    params = jax.eval_shape(objective.init, jax.random.key(0))
    optimizer = make_optimizer(config.optim, config.refine, params)
    state = jax.eval_shape(lambda: init_state(objective, optimizer, 0))
    step = make_step(objective, optimizer, seed=0)
    return step.lower(state, batch_shapes(config))


def _small(config: Config) -> Config:
    """The same kind of program, of next to no size."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_layers=1, vocab_size=8),
        data=dataclasses.replace(config.data, context=2),
        train=dataclasses.replace(config.train, batch_size=1),
    )
