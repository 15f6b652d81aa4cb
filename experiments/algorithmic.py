"""Arithmetic and dyck languages: what thinking does where an answer is right or wrong.

    ebt train --config=experiments/algorithmic.py:dyck --workdir=runs/dyck
    ebt evaluate --workdir=runs/dyck --task=dyck,dyck_far --think=fixed:steps=8

trains on brackets to close and counts closed ones, nested as deep as in training and
deeper, after each of 8 refinement steps. The text is made from a seed
(`ebt_jax.data.synthetic`); nothing is read or downloaded.

Words, joined by commas after the colon:

    arithmetic      sums of one and two digits, units of the answer first (the default);
                    three and four digits are out of the distribution
    dyck            up to 16 brackets of four kinds, 4 deep; 5 to 8 deep is out of it
    anchored        anchored candidates, one refinement step (the default)
    anchored_s2     the same with 1, 2 or 3 steps, drawn for each batch, of random sizes
                    around 5; all but the last are constants, the last is scored. Only
                    this is trained to go on from where it is
    s1              System 1 as published, of experiments/text.py
    s2              System 2 as published
    transformer_pp  the feed-forward baseline with the same blocks
    size=SIZE       as in experiments/text.py; 4xs is the default
    step_size=X     as in experiments/text.py
    quickstart      1,500 updates of 16 x 64 bytes (the default)
    tiny            seconds; for tests

    python launch/sweep.py experiments/algorithmic.py

are the runs of the table, three seeds of each method, and for each the evaluation with
more steps, the best of four candidates, and steps until the energy no longer falls. A
word takes one of the tasks: `experiments/algorithmic.py:dyck`. `ebt report` shows runs
side by side.

Measured (jax 0.10.2, CPU, 500 problems that are not in the text, seeds 0, 1, 2): of
brackets as deep as in training Transformer++ closes 97.9 % (95.2 to 99.2 by seed),
anchored 99.9, its System 2 99.1, whatever the steps; of deeper ones 19 (9 to 33), 27
(20 to 34) and 22 % (18 to 26). More steps and samples gain nothing (RESULTS.md). Sums
are not learnt in that time, here by Transformer++ from 3,600 lines and one seed: 4.3 %
(2.5 to 7.3) of answers are right, and 54.8 % of their characters, each after what is
right.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ml_collections

from ebt_jax.command import load_config
from ebt_jax.data.config import DataConfig
from ebt_jax.errors import UserError
from ebt_jax.objective_config import system_2
from ebt_jax.training.config import (
    CheckpointConfig,
    Config,
    EvalConfig,
    TrainConfig,
    from_config_dict,
    to_config_dict,
)
from ebt_jax.training.presets import parse_words

TEXT = Path(__file__).with_name("text.py")
PATHS = {
    # There are 5,050 problems, of which 504 are kept for the task.
    "arithmetic": "arithmetic:digits=1-2,answer=reversed,examples=4000",
    "dyck": "dyck:kinds=4,depth=1-4,length=1-16,examples=50000",
}
METHODS = ("anchored", "anchored_s2", "s1", "s2", "transformer_pp")
OPTIONS = tuple(PATHS)
SETTINGS = ("quickstart", "tiny")
SWEPT = ("anchored", "anchored_s2", "transformer_pp")
THINK = (
    "fixed:steps=8;best_of:n=4;until:tolerance=0.01,steps=8;until:tolerance=0.1,steps=8"
)


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
    (task,) = words.options or ("arithmetic",)
    config = _method(words.method or "anchored", words.size, words.step_size)
    return to_config_dict(_setting(words.setting or "quickstart", PATHS[task], config))


def sweep(words: str = "") -> list[dict[str, Any]]:
    """The runs of the table above: flags of `ebt train`, or those of another verb.

    Args:
      words: tasks, joined by commas; all where there are none.

    Raises:
      UserError: for another word.
    """
    named = parse_words(words, methods=(), settings=(), options=OPTIONS).options
    runs = []
    for task in named or OPTIONS:
        for method in SWEPT:
            for seed in range(3):
                workdir = f"runs/algorithmic/{task}-{method}-{seed}"
                trained = {
                    "config": f"experiments/algorithmic.py:{task},{method}",
                    "config.train.seed": seed,
                    "workdir": workdir,
                }
                scored = {
                    "verb": "evaluate",
                    "workdir": workdir,
                    "task": f"{task},{task}_far",
                }
                if method != "transformer_pp":
                    scored["think"] = THINK
                runs += [trained, scored]
    return runs


def _method(method: str, size: str, step_size: float | None) -> Config:
    """A method at a size, as in experiments/text.py or a little different."""
    name = "anchored" if method == "anchored_s2" else method
    given = [name, f"size={size or '4xs'}"]
    if step_size is not None:
        given.append(f"step_size={step_size}")
    config = from_config_dict(load_config(f"{TEXT}:{','.join(given)}"))
    if method == "anchored":
        refine = dataclasses.replace(config.refine, num_steps=1, num_landscapes=1)
        return dataclasses.replace(config, refine=refine)
    if method == "anchored_s2":
        refine, objective = system_2(config.refine.step_size, noise_std=0.0)
        refine = dataclasses.replace(refine, min_steps=1)
        return dataclasses.replace(config, refine=refine, objective=objective)
    return config


def _setting(setting: str, path: str, config: Config) -> Config:
    """Data, length and evaluation of a setting."""
    tiny = setting == "tiny"
    steps, batch = (6, 8) if tiny else (1500, 16)
    replay = config.replay
    if replay.capacity:  # of a buffer of six batches, as published
        replay = dataclasses.replace(replay, capacity=6 * batch)
    config = dataclasses.replace(
        config,
        replay=replay,
        optim=dataclasses.replace(
            config.optim, warmup_steps=min(100, steps // 2), schedule_steps=0
        ),
        data=DataConfig(path=path, context=64),
        train=TrainConfig(steps=steps, batch_size=batch),
        eval=EvalConfig(every=500, sequences=256, batch_size=64),
        checkpoint=CheckpointConfig(every=500),
    )
    if not tiny:
        return config
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_layers=2, num_heads=2, dim=16),
        data=DataConfig(path=path, context=32),
        eval=EvalConfig(
            every=3, sequences=8, batch_size=8, curve_steps=3, sample_tokens=4
        ),
        checkpoint=CheckpointConfig(every=2),
        log=dataclasses.replace(config.log, every=1),
    )
