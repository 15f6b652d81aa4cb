"""How images are noised, and how a diffusion model takes the noise out again."""

from __future__ import annotations

import dataclasses

from ebt_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """A noise schedule, shared by the energy model that denoises and by DiT.

    Images are noised up to step `noise_level * timesteps - 1` of the schedule: the
    published code makes a schedule of int(100 / 0.1) = 1000 steps and takes step 99.
    """

    schedule: str = "linear"  # of the noise's variance: linear (1e-4 to 0.02) | cosine
    timesteps: int = 1000  # of the whole schedule
    noise_level: float = 0.1  # share of the schedule that images are noised by; 1: all
    random_level: bool = False  # True: energy models train on any level up to it, too
    sampler: str = "ddim"  # DiT: ddim | ddpm
    sampling_steps: int = 0  # DiT: passes of one application; 0: one for each timestep
    clip: bool = True  # DiT: what is predicted of an image stays in [-1, 1]: pixels
    repeats: int = 1  # DiT: applications, each to the result of the one before
    guidance: float = 1.0  # DiT: weight of the caption; 1: as trained, no guidance
    caption_dropout: float = 0.1  # DiT: share of captions left out in training

    def __post_init__(self) -> None:
        for name, choices in (
            ("schedule", ("linear", "cosine")),
            ("sampler", ("ddim", "ddpm")),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise UserError(
                    f"diffusion.{name} is {value!r}, but has to be one of "
                    f"{', '.join(choices)}"
                )
        for name in ("timesteps", "repeats"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"diffusion.{name} is {getattr(self, name)}, but has to be at "
                    "least 1"
                )
        if not 0 < self.noise_level <= 1 or self.noised_steps < 1:
            raise UserError(
                f"diffusion.noise_level is {self.noise_level}, but has to be a share "
                f"of the {self.timesteps} timesteps, at least one and at most all"
            )
        if not 0 <= self.sampling_steps <= self.noised_steps:
            raise UserError(
                f"diffusion.sampling_steps is {self.sampling_steps}, but images are "
                f"noised by {self.noised_steps} timesteps; give at most those, or 0"
            )
        if not self.guidance >= 0:
            raise UserError(
                f"diffusion.guidance is {self.guidance}, but cannot be negative"
            )
        if not 0 <= self.caption_dropout < 1:
            raise UserError(
                f"diffusion.caption_dropout is {self.caption_dropout}, but has to be "
                "a fraction in [0, 1)"
            )

    @property
    def noised_steps(self) -> int:
        """Timesteps that an image is noised by; it stands at the last of them."""
        return round(self.noise_level * self.timesteps)
