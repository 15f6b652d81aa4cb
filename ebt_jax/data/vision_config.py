"""How pictures and clips are read."""

from __future__ import annotations

import dataclasses
import math

from ebt_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Size, colours and encoding of images and frames; text leaves it alone."""

    size: int = 0  # pixels of a side; 0: the first picture's, which all must have then
    channels: int = 3  # 3: colour | 1: grey
    crop: str = "center"  # center: the middle square | squash: the whole, made square
    encoder: str = "none"  # none: pixels | pca | vae | dinov2: what a model sees
    encoder_path: str = ""  # weights of vae or dinov2, .safetensors, .npz or .pt
    encoder_size: str = "base"  # dinov2: small | base | large
    encoder_scale: float = 1.0  # vae: its latents are multiplied by it, as by 0.18215
    encoder_features: int = 64  # pca: numbers in a frame, or in a patch of an image
    encoder_patch: int = 8  # pca: pixels of a patch's side
    caption_encoder: str = "hashed"  # hashed: words | clip: CLIP's text encoder
    caption_path: str = ""  # clip: its weights; its vocabulary lies beside them
    caption_features: int = 256  # hashed: numbers in an encoded caption
    frame_seconds: float = 0.25  # video: time between frames of an example
    frame_rate: float = 30.0  # video: frames per second where they lie as pictures
    max_corrupt: float = 0.01  # share of files that may be corrupt or too short

    def __post_init__(self) -> None:
        for name, choices in (
            ("channels", (1, 3)),
            ("crop", ("center", "squash")),
            ("encoder", ("none", "pca", "vae", "dinov2")),
            ("encoder_size", ("small", "base", "large")),
            ("caption_encoder", ("hashed", "clip")),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise UserError(
                    f"vision.{name} is {value!r}, but has to be one of "
                    f"{', '.join(map(str, choices))}"
                )
        if self.size < 0:
            raise UserError(
                f"vision.size is {self.size}, but has to be positive, or 0 for the "
                "pictures' own"
            )
        for name in ("encoder_features", "encoder_patch", "caption_features"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"vision.{name} is {getattr(self, name)}, but has to be at least 1"
                )
        for name in ("frame_seconds", "frame_rate", "encoder_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(
                    f"vision.{name} is {getattr(self, name)}, but has to be positive"
                )
        if not 0 <= self.max_corrupt < 1:
            raise UserError(
                f"vision.max_corrupt is {self.max_corrupt}, but has to be a fraction "
                "in [0, 1)"
            )
        if self.encoder in ("vae", "dinov2") and not self.encoder_path:
            raise UserError(
                f"vision.encoder is {self.encoder!r}, but vision.encoder_path is "
                "empty; name its weights, or take 'pca', which needs none"
            )
        if self.caption_encoder == "clip" and not self.caption_path:
            raise UserError(
                "vision.caption_encoder is 'clip', but vision.caption_path is empty; "
                "name its weights, or take 'hashed', which needs none"
            )
