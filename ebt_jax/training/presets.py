"""The words after the colon of `--config=experiments/FILE.py:WORDS`."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, NamedTuple

from ebt_jax.errors import UserError
from ebt_jax.models.config import SIZES
from ebt_jax.objective_config import RefineSetup
from ebt_jax.training.config import (
    CheckpointConfig,
    Config,
    EvalConfig,
    TrainConfig,
)

# Peak learning rates of the paper, table D.1; 4xs and 3xs from the published code.
PEAK_LR = {
    "4xs": 2.4e-3,
    "3xs": 1.8e-3,
    "xxs": 1.2e-3,
    "xs": 9e-4,
    "small": 6e-4,
    "medium": 3e-4,
    "large": 2.5e-4,
    "xl": 2e-4,
}
KEYS = ("size", "step_size")
# Flags of a run that is one of many: scored once, at its end, and nothing drawn of it.
LEAN: dict[str, Any] = {
    "config.eval.every": 0,
    "config.eval.curve_steps": 0,
    "config.eval.sample_tokens": 0,
    "config.checkpoint.every": 0,
    "config.log.plots": False,
    "config.log.tensorboard": False,
}


class Words(NamedTuple):
    """What an argument says.

    Attributes:
      method: one of the methods, or "" where none is named.
      setting: one of the settings, or "".
      options: those of the options that are named, in order.
      size: of the model, or "".
      step_size: initial step size, or None.
    """

    method: str
    setting: str
    options: tuple[str, ...]
    size: str
    step_size: float | None


def parse_words(
    arg: str,
    *,
    methods: tuple[str, ...],
    settings: tuple[str, ...],
    options: tuple[str, ...] = (),
) -> Words:
    """Reads the words of an argument, joined by commas.

    Args:
      arg: such as `s2,no_replay,size=xs`.
      methods: of which one may be named.
      settings: of which one may be named.
      options: of which any may be named.

    Raises:
      UserError: for a word that is unknown or contradicts another.
    """
    words = [word.strip() for word in arg.split(",") if word.strip()]
    chosen = []
    for kind in (methods, settings):
        named = [word for word in words if word in kind]
        if len(named) > 1:
            raise UserError(
                f"preset {arg!r} names both {named[0]!r} and {named[1]!r}; choose one"
            )
        chosen.append(named[0] if named else "")
    known = (*methods, *options, *settings)
    values = _values([word for word in words if word not in known], known)
    size = values["size"] if "size" in values else ""
    if size and size not in SIZES:
        raise UserError(f"preset size {size!r} is not one of {', '.join(SIZES)}")
    step_size = values["step_size"] if "step_size" in values else None
    given = tuple(word for word in words if word in options)
    return Words(chosen[0], chosen[1], given, size, step_size)


def with_step_size(config: Config, step_size: float) -> Config:
    """The learning rate of a learnt step size is 3 times it (paper, appendix I)."""
    return dataclasses.replace(
        config,
        refine=dataclasses.replace(config.refine, step_size=step_size),
        optim=dataclasses.replace(config.optim, step_size_lr_multiplier=3 * step_size),
    )


def for_minutes(config: Config, steps: int, peak_lr: float) -> Config:
    """A run of pictures that a laptop makes in minutes, evaluated four times."""
    every = steps // 4
    return dataclasses.replace(
        config,
        optim=dataclasses.replace(
            config.optim,
            peak_lr=peak_lr,
            warmup_steps=min(100, steps // 2),
            schedule_steps=0,
        ),
        train=TrainConfig(steps=steps, batch_size=32),
        eval=EvalConfig(every=every, sequences=128, batch_size=32, curve_steps=4),
        checkpoint=CheckpointConfig(every=every),
    )


def for_tests(config: Config) -> Config:
    """Four updates of a model of next to no size."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_heads=2, dim=16),
        optim=dataclasses.replace(config.optim, warmup_steps=2),
        train=TrainConfig(steps=4, batch_size=8),
        eval=EvalConfig(every=2, sequences=8, batch_size=8, curve_steps=2),
        checkpoint=CheckpointConfig(every=2),
        log=dataclasses.replace(config.log, every=1),
    )


def _values(words: list[str], words_known: tuple[str, ...]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in KEYS:
            known = (*words_known, *(f"{key}=..." for key in KEYS))
            close = difflib.get_close_matches(key, words_known + KEYS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise UserError(
                f"preset word {word!r} is unknown{hint} Known: {', '.join(known)}"
            )
        try:
            if key == "step_size":
                value = RefineSetup(step_size=float(value)).step_size
        except ValueError as error:
            raise UserError(f"preset word {word!r}: {error}") from error
        values[key] = value
    return values
