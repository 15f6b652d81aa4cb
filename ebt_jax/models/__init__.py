"""Models: Flax at the edge, pure functions of plain parameter dicts beyond it."""

from __future__ import annotations

from ebt_jax.diffusion_config import DiffusionConfig
from ebt_jax.interfaces import Denoiser, EnergyModel, FeedForward, Recurrent
from ebt_jax.models import board, image, text, video
from ebt_jax.models.config import SIZES, ModelConfig

__all__ = ["SIZES", "ModelConfig", "build"]


def build(
    config: ModelConfig, diffusion: DiffusionConfig | None = None
) -> EnergyModel | FeedForward | Recurrent | Denoiser:
    """The model of a resolved config.

    Args:
      config: of the model.
      diffusion: how images are noised; all others do without.

    Raises:
      ValueError: if the config leaves the landscapes, or what the data decide, at 0.
    """
    if config.space == "image":
        return _build_image(config, diffusion)
    space = {"text": text, "video": video, "board": board}[config.space]
    if config.space == "text" and not config.vocab_size:
        raise ValueError("model.vocab_size is 0; set it to the tokenizer's vocab_size")
    if config.space == "video" and not config.frame_size:
        raise ValueError("model.frame_size is 0; set it to the numbers in a frame")
    if config.space == "board" and not config.box_rows * config.box_columns:
        raise ValueError("model.box_rows or box_columns is 0; set them to the boards'")
    if config.kind == "recurrent":
        return board.recurrent(config)
    if config.kind == "transformer_pp":
        return space.transformer_pp(config)
    if not config.num_landscapes:
        raise ValueError("model.num_landscapes is 0; set it to refine.num_landscapes")
    return space.energy_model(config)


def _build_image(
    config: ModelConfig, diffusion: DiffusionConfig | None
) -> EnergyModel | Denoiser:
    if diffusion is None:
        raise ValueError("diffusion is None, but images are noised; give its config")
    for name in ("image_size", "channels"):
        if not getattr(config, name):
            raise ValueError(f"model.{name} is 0; set it to the images'")
    if config.condition == "caption" and not config.condition_size:
        raise ValueError(
            "model.condition_size is 0; set it to the numbers in an encoded caption"
        )
    if config.kind == "dit":
        return image.dit(config, diffusion)
    return image.energy_model(config, diffusion)
