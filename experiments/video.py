"""Video: the next frame's latents, and Transformer++.

    ebt train --config=experiments/video.py:quickstart --workdir=runs/video

trains on moving digits made of those that scikit-learn ships; nothing is downloaded,
but `pip install -e '.[vision]'` is needed.

Words, joined by commas after the colon:

    s1              System 1 as published (the default): two steps, detached between,
                    learnt step size 30,000, step embedding
    s2              System 2 as published: 2 or 3 steps, Langevin noise, random step
                    sizes around 3000, loss on the last, replay buffer
    transformer_pp  the feed-forward baseline with the same blocks
    most_recent     candidates start from the frame before instead of noise
    anchored        the candidate stream starts from candidate + frame before, as in
                    experiments/text.py; no step embedding. Not published
    size=SIZE       4xs, 3xs, xxs (the default), xs, small, medium, large or xl, with a
                    third of the published learning rate, that of Transformer++
    step_size=X     initial step size, with its published learning rate of 3 X peak_lr
    quickstart      most_recent, anchored, 4xs, 16 x 16 pixels, for minutes on a laptop
    tiny            seconds; for tests

The published step sizes suit frames of 3,136 numbers; quickstart and tiny, whose frames
are small, begin with 3: after 800 steps of the quickstart smooth L1 was 0.052 from 3,
0.065 from 30 and 0.071 from 30,000 (one run each).

From noise a model cannot get far where a frame has more numbers than the model is wide:
a step changes a candidate by a combination of the projection's `dim` directions, and
the noise in all others stays: half of its variance for 256 numbers at width 128, 88 %
for the published 3,136 at width 384. `most_recent` has no noise to begin with.

The published runs read Something-Something V2, 16 frames 0.25 s apart at 224 x 224
pixels, each encoded by Stable Diffusion's VAE to 3,136 numbers: give
`--config.data.path`, `--config.vision.encoder=vae` and `--config.vision.encoder_path`,
or encode them once with `ebt prepare`.

    ebt evaluate --workdir=runs/video --horizons=5

continues clips and compares with copying their last frame.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_collections

from ebt_jax.data.config import DataConfig
from ebt_jax.data.vision_config import VisionConfig
from ebt_jax.errors import UserError
from ebt_jax.models.config import ModelConfig
from ebt_jax.objective_config import RefineSetup, system_2
from ebt_jax.replay import ReplayConfig
from ebt_jax.training.config import (
    CheckpointConfig,
    Config,
    EvalConfig,
    OptimConfig,
    TrainConfig,
    to_config_dict,
)
from ebt_jax.training.presets import (
    PEAK_LR,
    for_minutes,
    for_tests,
    parse_words,
    with_step_size,
)

METHODS = ("s1", "s2", "transformer_pp")
SETTINGS = ("quickstart", "tiny")
OPTIONS = ("most_recent", "anchored")
SMALL_FRAMES = {"s1": 3.0, "s2": 3.0}  # step sizes of quickstart and tiny
REPLAYED_BATCHES = 6  # that the buffer holds (published: 192 sequences, 32 at a time)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The config of the words in `arg`.

    Raises:
      UserError: for a word that is unknown or contradicts another.
    """
    words = parse_words(arg, methods=METHODS, settings=SETTINGS, options=OPTIONS)
    method = words.method or "s1"
    size = words.size or ("4xs" if words.setting else "xxs")
    config = _method(method, size)
    step_size = words.step_size
    if words.setting and step_size is None and method in SMALL_FRAMES:
        step_size = SMALL_FRAMES[method]
    if step_size is not None:
        config = with_step_size(config, step_size)
    options = words.options
    if options and method == "transformer_pp":
        raise UserError(
            f"preset {arg!r} says something of candidates, but transformer_pp has "
            f"none; leave out {options[0]!r}"
        )
    if words.setting == "quickstart" and not (words.method or options):
        options = OPTIONS
    config = _with_options(config, options)
    config = _setting(words.setting, config)
    if method == "s2":
        part = config.train.batch_size // config.train.accumulation
        replay = ReplayConfig(capacity=REPLAYED_BATCHES * part)
        config = dataclasses.replace(config, replay=replay)
    return to_config_dict(config)


def sweep() -> list[dict[str, Any]]:
    """Energy model and baseline, three seeds each: flags of `ebt train`."""
    return [
        {
            "config": f"experiments/video.py:quickstart,{method}",
            "config.train.seed": seed,
            "workdir": f"runs/video/{method.replace(',', '-')}-{seed}",
        }
        for method in ("s1", "s1,most_recent", "transformer_pp")
        for seed in range(3)
    ]


def _method(method: str, size: str) -> Config:
    """A method at a size, in the published setting."""
    config = Config(
        model=ModelConfig(space="video", size=size),
        refine=RefineSetup(num_steps=2, num_landscapes=2, backprop="per_step"),
        optim=OptimConfig(
            peak_lr=PEAK_LR[size] / 3, warmup_steps=10_000, schedule_steps=1_000_000
        ),
        data=DataConfig(path="moving_digits", context=15, held_out=0.1),
        vision=VisionConfig(size=224, crop="squash", frame_seconds=0.25),
        train=TrainConfig(steps=100_000, batch_size=256, accumulation=4),
        eval=EvalConfig(every=5_000, sequences=1024, batch_size=64, curve_steps=5),
        checkpoint=CheckpointConfig(every=5_000),
    )
    if method == "s2":
        refine, objective = system_2(step_size=3000.0, noise_std=1.0)
        return dataclasses.replace(config, refine=refine, objective=objective)
    if method == "s1":
        return with_step_size(config, 30_000.0)
    model = dataclasses.replace(config.model, kind="transformer_pp")
    optim = dataclasses.replace(config.optim, peak_lr=PEAK_LR[size])
    return dataclasses.replace(config, model=model, optim=optim)


def _with_options(config: Config, options: tuple[str, ...]) -> Config:
    """Where candidates start from, and what they are added to."""
    model, refine = config.model, config.refine
    if "most_recent" in options:
        refine = dataclasses.replace(refine, initial_candidate="most_recent")
    if "anchored" in options:
        model = dataclasses.replace(
            model, candidate_input="anchored", conditioning="default"
        )
        refine = dataclasses.replace(refine, num_landscapes=1)
    return dataclasses.replace(config, model=model, refine=refine)


def _setting(setting: str, config: Config) -> Config:
    """Data, length and evaluation of a setting."""
    if not setting:
        return config
    config = dataclasses.replace(
        config,
        data=DataConfig(path="moving_digits", context=9),
        vision=VisionConfig(size=16, channels=1, crop="squash", frame_seconds=0.1),
    )
    config = for_minutes(config, steps=2000, peak_lr=PEAK_LR[config.model.size])
    if setting == "tiny":
        config = dataclasses.replace(
            config,
            data=DataConfig(path="moving_digits", context=4),
            vision=VisionConfig(size=8, channels=1, crop="squash"),
        )
        return for_tests(config)
    return config
