"""Text to image: an energy model that starts from noise, a caption its condition.

    ebt train --config=experiments/text_to_image.py:quickstart --workdir=runs/emoji
        --config.data.path=captions.jsonl

`captions.jsonl` names pictures and their captions, one object a line; `pip install -e
'.[vision]'` is needed. Without a path it draws the digits of scikit-learn, whose
captions are their names.

Words, joined by commas after the colon:

    s1              System 1 as published (the default): 2 steps, learnt step size
    s2              System 2 as published: 3 or 4 steps, Langevin noise, random step
                    sizes around 3000, loss on the last
    dit             the baseline: a diffusion transformer of the same blocks, trained at
                    all noise levels, a tenth of the captions left out
    size=SIZE       4xs, 3xs, xxs, xs, small, medium, large (the default) or xl
    step_size=X     initial step size, with its published learning rate of 3 X peak_lr
    quickstart      4xs, 16 x 16 pixels, for minutes on a laptop
    tiny            seconds; for tests

The published runs draw COCO at 256 x 256 pixels in the latents of Stable Diffusion's
VAE, captions encoded by CLIP: give `--config.vision.encoder_path` and
`--config.vision.caption_path`, the weights, with `--config.vision.encoder=vae` and
`--config.vision.caption_encoder=clip`. Latents are not clipped while DiT draws; pixels
should be (`--config.diffusion.clip=True`), and are in quickstart and tiny. The paper
says that its runs failed: samples are blurred averages.

    ebt evaluate --workdir=runs/emoji --retrieval=10

tells how often the right caption has the lowest energy of ten.
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
    """Energy model and DiT, three seeds each: flags of `ebt train`, the path apart."""
    return [
        {
            "config": f"experiments/text_to_image.py:quickstart,{method}",
            "config.train.seed": seed,
            "workdir": f"runs/text_to_image/{method}-{seed}",
        }
        for method in ("s1", "dit")
        for seed in range(3)
    ]


def _method(method: str, size: str) -> Config:
    """A method at a size, in the published setting."""
    config = Config(
        model=ModelConfig(
            space="image",
            size=size,
            patch=2,
            condition="caption",
            ffn_multiplier=1.0,
        ),
        refine=RefineSetup(num_steps=2, num_landscapes=1, backprop="per_step"),
        diffusion=DiffusionConfig(noise_level=1.0, sampling_steps=250, clip=False),
        optim=OptimConfig(peak_lr=1e-4, warmup_steps=10_000, schedule_steps=1_000_000),
        data=DataConfig(path="digits", held_out=0.02),
        vision=VisionConfig(size=256),
        train=TrainConfig(steps=100_000, batch_size=256, accumulation=4),
        eval=EvalConfig(every=5_000, sequences=1024, batch_size=64, curve_steps=5),
        checkpoint=CheckpointConfig(every=5_000),
    )
    if method == "dit":
        model = dataclasses.replace(config.model, kind="dit")
        optim = dataclasses.replace(config.optim, weight_decay=0.0)
        return dataclasses.replace(config, model=model, optim=optim)
    if method == "s2":
        refine, objective = system_2(step_size=3000.0, noise_std=3.0, num_steps=4)
        return dataclasses.replace(config, refine=refine, objective=objective)
    return with_step_size(config, 3000.0)


def _setting(setting: str, config: Config) -> Config:
    """Data, length and evaluation of a setting."""
    if not setting:
        return config
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, ffn_multiplier=4.0),
        diffusion=dataclasses.replace(config.diffusion, sampling_steps=50, clip=True),
        data=DataConfig(path="digits"),
        vision=VisionConfig(size=16),
    )
    config = for_minutes(config, steps=800, peak_lr=1e-3)
    if setting == "tiny":
        config = dataclasses.replace(
            config,
            diffusion=dataclasses.replace(
                config.diffusion, timesteps=20, sampling_steps=3
            ),
            vision=VisionConfig(size=8, caption_features=16),
        )
        return for_tests(config)
    return config
