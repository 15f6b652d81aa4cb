"""What losses are put against: tokens, batch, depth, width, parameters, cost."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ebt_jax.errors import UserError
from ebt_jax.evaluation.report.runs import Row, Run
from ebt_jax.training.config import Config, TrainConfig

LENGTH = ("train.steps", "optim.schedule_steps", "optim.warmup_steps")
BATCH = ("train.batch_size", "train.accumulation")
SIZE = ("model.size", "model.num_layers", "model.num_heads", "model.dim")
RATE = ("optim.peak_lr",)  # published ones are of sizes


class Axis(NamedTuple):
    """What x is.

    Attributes:
      label: of plots.
      keys: settings that may differ along it.
      of: a run's x.
    """

    label: str
    keys: tuple[str, ...]
    of: Callable[[Run, Config], float]


def _tokens_of_update(config: Config) -> int:
    from ebt_jax.evaluation.flops import tokens_per_sequence

    return config.train.batch_size * tokens_per_sequence(config)


@functools.cache
def _sizes(config: Config) -> tuple[int, float]:
    """Parameters without vocabulary matrices, and FLOPs of an update."""
    import jax

    from ebt_jax.evaluation.flops import count_non_embedding
    from ebt_jax.training.objective import build_objective
    from ebt_jax.training.timing import flops_per_update

    objective = build_objective(config)
    shapes = jax.eval_shape(objective.init, jax.random.key(0))
    return count_non_embedding(shapes), flops_per_update(config, shapes) or math.nan


def _sizes_of(config: Config) -> tuple[int, float]:
    # What does not change a model's shape must not make it be built again.
    train = TrainConfig(
        batch_size=config.train.batch_size, accumulation=config.train.accumulation
    )
    alike = {"train": train, "optim": type(config.optim)()}
    return _sizes(dataclasses.replace(config, **alike))


def tokens_of(config: Config) -> int:
    """Training tokens of a whole run."""
    return config.train.steps * _tokens_of_update(config)


def flops_of(config: Config) -> float:
    """Training FLOPs of a whole run, by formula; NaN where there is none."""
    return config.train.steps * _sizes_of(config)[1]


def seconds_of(rows: Sequence[Row]) -> float:
    """Seconds of a run's updates and their input, as `metrics.jsonl` has them.

    Evaluation and checkpoints are left out. The first window, in which the program is
    compiled, counts as the median of the others. NaN where nothing was logged.
    """
    windows, before = [], 0
    for row in rows:
        if "seconds/step" in row:
            each = row["seconds/step"] + row.get("seconds/input", 0.0)
            windows.append((row["step"] - before, each))
            before = row["step"]
    if not windows:
        return math.nan
    if len(windows) > 1:
        usual = statistics.median(each for _, each in windows[1:])
        windows[0] = (windows[0][0], usual)
    return sum(updates * each for updates, each in windows)


AXES = {
    "tokens": Axis(
        "training tokens",
        (*LENGTH, *RATE),
        lambda _, config: tokens_of(config),
    ),
    "batch": Axis(
        "tokens in a batch",
        (*BATCH, *RATE),
        lambda _, config: _tokens_of_update(config),
    ),
    "layers": Axis(
        "layers", ("model.num_layers", *RATE), lambda _, config: config.model.layers
    ),
    "width": Axis(
        "width",
        ("model.dim", "model.num_heads", *RATE),
        lambda _, config: config.model.width,
    ),
    "parameters": Axis(
        "parameters without vocabulary matrices",
        (*SIZE, *RATE),
        lambda _, config: _sizes_of(config)[0],
    ),
    "flops": Axis(
        "training FLOPs, by formula",
        (*SIZE, *LENGTH, *BATCH, *RATE),
        lambda _, config: flops_of(config),
    ),
    "seconds": Axis(
        "measured seconds of updates",
        (*SIZE, *LENGTH, *BATCH, *RATE),
        lambda run, _: seconds_of(run.rows),
    ),
}


def axis_of(name: str) -> Axis:
    """An axis by its name.

    Raises:
      UserError: if there is none.
    """
    if name not in AXES:
        raise UserError(f"--x={name!r} is not one of {', '.join(AXES)}")
    return AXES[name]
