"""Sudoku: an energy model that fills boards by refinement, and two networks beside it.

    ebt train --config=experiments/sudoku.py:quickstart --workdir=runs/sudoku

trains on boards of 6 x 6 cells that are made as they are needed; nothing is downloaded.
Then

    ebt evaluate --workdir=runs/sudoku

fills boards that training has not seen, easy ones like those trained on and hard ones
with fewer cells given: how many are solved after each step, what the attempt of lowest
energy is worth against a random one, and whether energies tell right from wrong.

Words, joined by commas after the colon:

    ebt             the energy model (the default): 3 steps, each of which is scored,
                    and any number of them after training
    transformer_pp  the same blocks, one pass
    recurrent       the same blocks, 3 passes, each of which is scored
    2x2             boards of 4 x 4 cells; quick, and too easy to tell methods apart
    2x3             of 6 x 6
    3x3             of 9 x 9 (the default)
    size=SIZE       4xs, 3xs, xxs, xs, small, medium, large or xl; else 3 layers of 64
    step_size=X     initial step size, with a learning rate of 3 X peak_lr
    quickstart      6 x 6 cells, minutes on a laptop
    tiny            seconds; for tests
"""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_collections

from ebt_jax.data.board_config import BoardConfig
from ebt_jax.errors import UserError
from ebt_jax.models.config import ModelConfig
from ebt_jax.objective_config import RefineSetup
from ebt_jax.training.config import (
    CheckpointConfig,
    Config,
    EvalConfig,
    OptimConfig,
    TrainConfig,
    to_config_dict,
)
from ebt_jax.training.presets import for_tests, parse_words, with_step_size

METHODS = ("ebt", "transformer_pp", "recurrent")
SETTINGS = ("quickstart", "tiny")
# Easy boards have about half of their cells given, hard ones about a third.
BOARDS = {
    "2x2": BoardConfig(2, 2, 7, 11, 4, 6, held_out=0.3),
    "2x3": BoardConfig(2, 3, 18, 26, 10, 14),
    "3x3": BoardConfig(3, 3, 36, 50, 24, 30),
}
OPTIONS = tuple(BOARDS)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The config of the words in `arg`.

    Raises:
      UserError: for a word that is unknown or contradicts another.
    """
    words = parse_words(arg, methods=METHODS, settings=SETTINGS, options=OPTIONS)
    if len(words.options) > 1:
        raise UserError(
            f"preset {arg!r} names both {words.options[0]!r} and {words.options[1]!r}; "
            "choose one"
        )
    small = {"quickstart": "2x3", "tiny": "2x2", "": "3x3"}[words.setting]
    box = words.options[0] if words.options else small
    config = _method(words.method or "ebt", words.size, BOARDS[box])
    if words.step_size is not None:
        config = with_step_size(config, words.step_size)
    return to_config_dict(_setting(words.setting, config))


def sweep() -> list[dict[str, Any]]:
    """All methods, three seeds each, on 6 x 6 cells: flags of `ebt train`."""
    return [
        {
            "config": f"experiments/sudoku.py:quickstart,{method}",
            "config.train.seed": seed,
            "workdir": f"runs/sudoku/{method}-{seed}",
        }
        for method in METHODS
        for seed in range(3)
    ]


def _method(method: str, size: str, board: BoardConfig) -> Config:
    """A method on boards of some size."""
    model = ModelConfig(
        kind=method,
        space="board",
        size=size or "4xs",
        conditioning="default",
        ffn_multiplier=2.0,
        iterations=3,
    )
    if not size:
        model = dataclasses.replace(model, num_layers=3, num_heads=4, dim=64)
    config = Config(
        model=model,
        refine=RefineSetup(num_steps=3, num_landscapes=1, backprop="per_step"),
        optim=OptimConfig(peak_lr=2e-3, warmup_steps=100),
        board=board,
        train=TrainConfig(steps=10_000, batch_size=64),
        eval=EvalConfig(every=1000, sequences=256, batch_size=128, curve_steps=16),
        checkpoint=CheckpointConfig(every=1000),
    )
    return with_step_size(config, 100.0)


def _setting(setting: str, config: Config) -> Config:
    """Length and evaluation of a setting."""
    if not setting:
        return config
    config = dataclasses.replace(
        config,
        optim=dataclasses.replace(config.optim, warmup_steps=50),
        train=TrainConfig(steps=1000, batch_size=32),
        eval=dataclasses.replace(config.eval, every=250),
        checkpoint=CheckpointConfig(every=250),
    )
    if setting == "tiny":
        small = dataclasses.replace(config.board, held_out_boards=16, pool=64)
        return for_tests(dataclasses.replace(config, board=small))
    return config
