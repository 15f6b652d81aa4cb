"""Settings of noise: what follows from them, and what is refused."""

import re

import pytest

from ebt_jax.diffusion_config import DiffusionConfig
from ebt_jax.errors import UserError
from ebt_jax.models.config import ModelConfig


@pytest.mark.parametrize(
    "fields, steps",
    [
        ({}, 100),
        ({"noise_level": 0.2}, 200),
        ({"noise_level": 1.0}, 1000),
        ({"timesteps": 7, "noise_level": 0.5}, 4),
    ],
)
def test_an_image_stands_at_the_last_of_its_timesteps(fields, steps):
    assert DiffusionConfig(**fields).noised_steps == steps


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"schedule": "sine"}, "diffusion.schedule is 'sine', but has to be one of"),
        ({"sampler": "heun"}, "diffusion.sampler is 'heun', but has to be one of"),
        ({"timesteps": 0}, "diffusion.timesteps is 0, but has to be at least 1"),
        ({"repeats": 0}, "diffusion.repeats is 0, but has to be at least 1"),
        ({"noise_level": 0.0}, "diffusion.noise_level is 0.0, but has to be a share"),
        ({"noise_level": 1.5}, "diffusion.noise_level is 1.5, but has to be a share"),
        ({"timesteps": 4}, "diffusion.noise_level is 0.1, but has to be a share of"),
        (
            {"sampling_steps": 101},
            "diffusion.sampling_steps is 101, but images are noised by 100 timesteps",
        ),
        ({"guidance": -1.0}, "diffusion.guidance is -1.0, but cannot be negative"),
        (
            {"caption_dropout": 1.0},
            "diffusion.caption_dropout is 1.0, but has to be a fraction in [0, 1)",
        ),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(UserError, match="^" + re.escape(message)):
        DiffusionConfig(**fields)


def test_a_patch_has_a_pixel():
    with pytest.raises(UserError, match="model.patch is 0, but has to be at least 1"):
        ModelConfig(patch=0)
