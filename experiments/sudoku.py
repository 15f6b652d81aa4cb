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
    2x2             boards of 4 x 4 cells
    2x3             of 6 x 6
    3x3             of 9 x 9 (the default)
    size=SIZE       4xs, 3xs, xxs, xs, small, medium, large or xl; else 3 layers of 64
    step_size=X     initial step size, with a learning rate of 3 X peak_lr
    quickstart      6 x 6 cells, minutes on a laptop
    tiny            seconds; for tests

Measured (jax 0.10.2, CPU, `quickstart`: 1,000 updates of 32 boards with 18 to 26 of 36
cells given; percent solved of 256 such boards that no run has seen, and of 256 hard
ones with 10 to 14 given; SEED 0, 1, 2):

    ebt train --config=experiments/sudoku.py:quickstart,METHOD --workdir=DIR
        --config.train.seed=SEED
    ebt evaluate --workdir=DIR --sequences=256 --board_seed=1
        --think=fixed:steps=16 --most_steps=16 (the last two not of transformer_pp)
    python -m ebt_jax.evaluation.boards.compare DIR DIR ...

    METHOD          easy            hard, 3 steps   hard, 16 steps  best of 8
    ebt             99.7 98.6 99.6  37.8 33.8 32.1  85.4 73.2 83.6  96.9 94.1 98.4
    recurrent       99.2 96.1 100   17.6 11.7 25.0  60.9 51.6 66.0  -
    transformer_pp  66.4 58.6 62.5  -                0.0  0.0  0.4  -

Hard boards after three steps, as trained, and after 16: what a step concludes is what
the next one starts from. An update costs 36 N (ebt), 18 N (recurrent) and 6 N FLOPs,
and by the CPU clock 0.16, 0.13 (of four passes) and 0.02 seconds: methods have equal
updates here, not equal time. Only the energy model can check itself: the solution has a
lower energy than each wrong answer of its own, so of eight attempts that of lowest
energy is right wherever any of them is.

Pilots of 400 updates, one seed, percent of 256 other hard boards after 12 steps; they
chose the EBT's step size, start and backprop, the baselines were not tuned: as above
31; with 2 to 4 steps 34; backprop=full 26; starts of zeros 15; step size 1000 4;
backprop=truncated and the last of 2 to 4 steps scored 2. The paper (ICLR version, 9 x 9
cells) has 0.03, 17.7 and 29.7 for a feed-forward network, a recurrent one and an EBT.
With 9 x 9 cells no more than 300 updates were tried here, after which no board is
solved.
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
