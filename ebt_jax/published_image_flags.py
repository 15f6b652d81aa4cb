"""The flags of the published PyTorch code that image models have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ebt_jax.diffusion_config import DiffusionConfig
from ebt_jax.errors import UserError

# Published defaults. `size`, `channels`, `patch` and `caption_size` are sizes of what a
# model sees; without them they follow from the pictures' as there: pixels to denoise,
# latents of a VAE for captions.
IMAGE_DEFAULTS: dict[str, Any] = {
    "image_task": "denoising",
    "image_dims": (224, 224),
    "patch_size": 8,
    "clip_text_encoder_size": "base",
    "diffusion_steps": 1000,
    "denoise_images_noise_level": 1,
    "randomize_denoise_images_noise_level": False,
    "use_deterministic_reverse": False,
    "infer_recurse_diffusion_n_times": 0,
    "size": 0,
    "channels": 0,
    "caption_size": 0,
    "layout": "NCHW",
    "learn_sigma": True,
    "schedule": "linear",
}
IMAGE_ALIASES = {
    "task": "image_task",
    "patch": "patch_size",
    "num_timesteps": "diffusion_steps",
}
TASKS = {
    "denoising": "denoising",
    "denoise": "denoising",
    "t2i": "t2i",
    "text_to_image": "t2i",
}
CLIP_FEATURES = {"base": 512, "large": 768}
DIT_MULTIPLIER = 4  # ffn_dim_multiplier where none is given
VAE_FACTOR, VAE_CHANNELS = 8, 4  # pixels of a latent's side; numbers in a latent


def image_model(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `ModelConfig`.

    Args:
      flags: all of `IMAGE_DEFAULTS`, and `ffn_dim_multiplier`.

    Raises:
      UserError: for a value that is not supported.
    """
    captions = _task(flags) == "t2i"
    height, width = flags["image_dims"]
    if height != width:
        raise UserError(
            f"published flag image_dims={flags['image_dims']!r} is not supported; only "
            "squares are"
        )
    for name, supported in (("layout", "NCHW"), ("learn_sigma", True)):
        if flags[name] != supported:
            raise UserError(
                f"published flag {name}={flags[name]!r} is not supported; only "
                f"{supported!r} is"
            )
    encoder = flags["clip_text_encoder_size"]
    if encoder not in CLIP_FEATURES:
        raise UserError(
            f"published flag clip_text_encoder_size={encoder!r} is not supported; only "
            f"{', '.join(CLIP_FEATURES)} are"
        )
    return {
        "ffn_multiplier": float(flags["ffn_dim_multiplier"] or DIT_MULTIPLIER),
        "image_size": flags["size"] or height // (VAE_FACTOR if captions else 1),
        "channels": flags["channels"] or (VAE_CHANNELS if captions else 3),
        "patch": flags["patch_size"],
        "condition": "caption" if captions else "none",
        "condition_size": flags["caption_size"] or CLIP_FEATURES[encoder]
        if captions
        else 0,
    }


def image_diffusion(flags: Mapping[str, Any]) -> DiffusionConfig:
    """How images are noised: to denoise, by the first `diffusion_steps` of a schedule.

    Args:
      flags: all of `IMAGE_DEFAULTS`.
    """
    steps, captions = flags["diffusion_steps"], _task(flags) == "t2i"
    level = 1 if captions else flags["denoise_images_noise_level"]
    timesteps = int(steps / level)
    return DiffusionConfig(
        schedule=flags["schedule"],
        timesteps=timesteps,
        noise_level=steps / timesteps,
        random_level=flags["randomize_denoise_images_noise_level"],
        sampler="ddim"
        if flags["use_deterministic_reverse"] and not captions
        else "ddpm",
        clip=not captions,
        repeats=1 + flags["infer_recurse_diffusion_n_times"],
        caption_dropout=0.0,
    )


def image_start(flags: Mapping[str, Any]) -> str:
    """What refinement starts from, in terms of ours."""
    if _task(flags) == "denoising":
        return "noised"
    zeros = flags["denoising_initial_condition"] == "zeros"
    return "zeros" if zeros else "noise"


def _task(flags: Mapping[str, Any]) -> str:
    if flags["image_task"] not in TASKS:
        raise UserError(
            f"published flag image_task={flags['image_task']!r} is not supported; only "
            "denoising, t2i are"
        )
    return TASKS[flags["image_task"]]
