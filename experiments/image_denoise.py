"""Denoising images: an energy model that starts from the noised image, and DiT.

    ebt train --config=experiments/image_denoise.py:quickstart --workdir=runs/denoise

trains on the handwritten digits that scikit-learn ships; nothing is downloaded, but
`pip install -e '.[vision]'` is needed.

Words, joined by commas after the colon:

    s1              System 1 as published (the default): one step of a learnt size from
                    the noised image
    s2              System 2 as published: 2 or 3 steps, random step sizes around 3000,
                    loss on the last
    dit             the baseline: a diffusion transformer of the same blocks
    size=SIZE       4xs, 3xs, xxs, xs, small, medium, large (the default) or xl
    step_size=X     initial step size, with its published learning rate of 3 X peak_lr
    quickstart      4xs, digits of 16 x 16 pixels, for minutes on a laptop
    tiny            seconds; for tests

The published runs denoise COCO at 128 x 128 pixels in patches of 16, noised by the
first tenth of a linear schedule of 1,000 steps: give `--config.data.path`, a folder or
a tar of pictures. The feed-forward part is as wide as the model, unlike
DiT's. They report 27.25 dB after 3 passes where DiT reaches 26.58 after 300, and 23.29
against 19.56 at twice the noise (table 4; one seed).

    ebt evaluate --workdir=runs/denoise --noise_levels=0.1,0.2

tells the same of any run.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_collections

from ebt_jax.data.config import DataConfig
from ebt_jax.data.vision_config import VisionConfig
from ebt_jax.diffusion_config import DiffusionConfig
from ebt_jax.models.config import ModelConfig
from ebt_jax.objective_config import RefineSetup, system_2
from ebt_jax.training.config import (
    CheckpointConfig,
    Config,
    EvalConfig,
    OptimConfig,
    TrainConfig,
    to_config_dict,
)
from ebt_jax.training.presets import (
    for_minutes,
    for_tests,
    parse_words,
    with_step_size,
)

METHODS = ("s1", "s2", "dit")
SETTINGS = ("quickstart", "tiny")
OPTIONS = ()


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The config of the words in `arg`.

    Raises:
      UserError: for a word that is unknown or contradicts another.
    """
    words = parse_words(arg, methods=METHODS, settings=SETTINGS)
    size = words.size or ("4xs" if words.setting else "large")
    config = _method(words.method or "s1", size)
    if words.step_size is not None:
        config = with_step_size(config, words.step_size)
    return to_config_dict(_setting(words.setting, config))


def sweep() -> list[dict[str, Any]]:
    """Energy model and DiT, three seeds each, on the digits: flags of `ebt train`."""
    return [
        {
            "config": f"experiments/image_denoise.py:quickstart,{method}",
            "config.train.seed": seed,
            "workdir": f"runs/denoise/{method}-{seed}",
        }
        for method in ("s1", "dit")
        for seed in range(3)
    ]


def _method(method: str, size: str) -> Config:
    """A method at a size, in the published setting."""
    config = Config(
        model=ModelConfig(space="image", size=size, patch=16, ffn_multiplier=1.0),
        refine=RefineSetup(
            num_steps=1,
            num_landscapes=1,
            backprop="per_step",
            initial_candidate="noised",
        ),
        diffusion=DiffusionConfig(noise_level=0.1),
        optim=OptimConfig(peak_lr=1e-4, warmup_steps=10_000, schedule_steps=1_000_000),
        data=DataConfig(path="photographs", held_out=0.1),
        vision=VisionConfig(size=128),
        train=TrainConfig(steps=100_000, batch_size=128),
        eval=EvalConfig(every=5_000, sequences=1024, batch_size=64, curve_steps=5),
        checkpoint=CheckpointConfig(every=5_000),
    )
    if method == "dit":
        model = dataclasses.replace(config.model, kind="dit")
        optim = dataclasses.replace(config.optim, weight_decay=0.0)
        start = dataclasses.replace(config.refine, initial_candidate="noise")
        return dataclasses.replace(config, model=model, optim=optim, refine=start)
    if method == "s2":
        refine, objective = system_2(step_size=3000.0, noise_std=0.0)
        refine = dataclasses.replace(refine, initial_candidate="noised")
        return dataclasses.replace(config, refine=refine, objective=objective)
    return with_step_size(config, 3000.0)


def _setting(setting: str, config: Config) -> Config:
    """Data, length and evaluation of a setting."""
    if not setting:
        return config
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, patch=2, ffn_multiplier=4.0),
        data=DataConfig(path="digits"),
        vision=VisionConfig(size=16, channels=1),
    )
    config = for_minutes(config, steps=800, peak_lr=1e-3)
    if setting == "tiny":
        config = dataclasses.replace(
            config,
            diffusion=dataclasses.replace(config.diffusion, timesteps=50),
            vision=VisionConfig(size=8, channels=1),
        )
        return for_tests(config)
    return config
