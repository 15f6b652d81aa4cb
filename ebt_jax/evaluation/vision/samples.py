"""What a trained model makes of held-out images and clips: pictures in a workdir."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ebt_jax.diffusion_config import DiffusionConfig
from ebt_jax.evaluation.frames import continue_clips
from ebt_jax.evaluation.vision.baselines import gaussian_filter
from ebt_jax.evaluation.vision.denoise import filter_width, noiser, predictor
from ebt_jax.evaluation.vision.grids import heat, write_gif, write_grid
from ebt_jax.evaluation.vision.horizons import whole_clips
from ebt_jax.evaluation.vision.measures import psnr
from ebt_jax.interfaces import Batch, Objective
from ebt_jax.models.config import ModelConfig
from ebt_jax.models.image import energy_map
from ebt_jax.refine import PyTree
from ebt_jax.thinking import AS_TRAINED, Thinking

Decode = Callable[[ArrayLike], np.ndarray]  # what is predicted -> uint8 [..., h, w, 3]


def write_image_samples(
    folder: Path,
    model: ModelConfig,
    diffusion: DiffusionConfig,
    objective: Objective,
    params: PyTree,
    batch: Mapping[str, ArrayLike],
    decode: Decode,
    *,
    steps: Sequence[int],
    seed: int,
    count: int = 8,
    filtered: bool = True,
    captions: Sequence[str] = (),
) -> list[Path]:
    """Writes `samples.png` and, of an energy model, `energy_map.png`.

    Denoised images stand beside clean, noised and filtered ones; those that are made
    from noise alone, by captions, beside the images that the captions are of.

    Args:
      folder: to write into.
      model: of images, resolved.
      diffusion: how images are noised.
      objective: what predicts.
      params: its parameters.
      batch: of held-out images.
      decode: what makes pictures of what is predicted.
      steps: refinement steps to show the images after; a diffusion model shows its
        result.
      seed: of the noise, as in evaluation.
      count: images shown, at most.
      filtered: whether to show what a Gaussian filter makes of them, the one that suits
        just these images best; of pixels only.
      captions: of the images.

    Returns:
      The paths.
    """
    key = jax.random.key(seed)
    some = noiser(model, diffusion, key)(shown_rows(batch, count))
    from_noise = diffusion.noised_steps == diffusion.timesteps
    if from_noise:
        stages: dict[str, ArrayLike] = {"true": some["image"]}
    else:
        stages = {"clean": some["image"], "noised": some["noised"]}
    ways = {f"step {n}": Thinking(n) for n in steps}
    if model.kind != "ebt":
        ways = {model.kind: Thinking()}
    for name, thinking in ways.items():
        stages[name] = predictor(objective, params, key, thinking)(some)
    if filtered and not from_noise:
        stages["filter"] = gaussian_filter(some["noised"], filter_width([some]))
    note = "" if from_noise else f"PSNR in dB: {_psnrs(stages)}"
    shown = {name: decode(values) for name, values in stages.items()}
    written = [write_grid(folder / "samples.png", shown, captions[:count], note)]
    if model.kind == "ebt":
        stages.pop("filter", None)
        written.append(
            write_energy_maps(
                folder / "energy_map.png", model, params, some, stages, decode
            )
        )
    return written


def write_video_samples(
    folder: Path,
    objective: Objective,
    params: PyTree,
    batch: Mapping[str, ArrayLike],
    decode: Decode,
    *,
    context: int,
    given: int,
    frame_seconds: float,
    thinking: Thinking = AS_TRAINED,
    seed: int,
    count: int = 4,
) -> list[Path]:
    """Writes `samples.gif` and `samples.png`: true clips, below them continued ones.

    Args:
      folder: to write into.
      objective: predicts frames.
      params: of its model.
      batch: of held-out clips.
      decode: what makes pictures of frames.
      context: frames that the model sees.
      given: frames of a clip that are given; the others are predicted, one by one.
      frame_seconds: time between frames.
      thinking: how each frame is refined.
      seed: of what is drawn.
      count: clips shown, at most.

    Returns:
      The paths.
    """
    some = shown_rows(batch, count)
    clips = whole_clips(some)
    continued = continue_clips(
        objective,
        params,
        clips[:, :given],
        context=context,
        new_frames=clips.shape[1] - given,
        thinking=thinking,
        seed=seed,
        indices=some["index"].tolist(),
    ).frames
    # Given frames stand in both, as they are.
    made = np.concatenate([clips[:, :given], continued], axis=1)
    bands = {"true": decode(clips), "model": decode(made)}
    gif = write_gif(
        folder / "samples.gif", bands, given=given, frame_seconds=frame_seconds
    )
    # Clip by clip, the true one above; from the last given frame on.
    rows = np.stack(list(bands.values()), axis=1)[:, :, given - 1 :]
    rows = rows.reshape(-1, *rows.shape[2:])
    columns = {f"+{i}" if i else "given": rows[:, i] for i in range(rows.shape[1])}
    return [
        gif,
        write_grid(folder / "samples.png", columns, ["true", "model"] * len(clips)),
    ]


def write_energy_maps(
    path: Path,
    model: ModelConfig,
    params: PyTree,
    batch: Batch,
    stages: Mapping[str, ArrayLike],
    decode: Decode,
) -> Path:
    """Writes pictures under the energies of their patches.

    Colours mean the same energy in all of them. The mean over the patches of an image
    is its energy.

    Args:
      path: of the PNG.
      model: of images, resolved.
      params: its parameters.
      batch: what conditions the energies.
      stages: images `[batch, side, side, channels]` by what stands above them.
      decode: what makes pictures of them.
    """
    compiled = jax.jit(lambda params, image: energy_map(model, params, batch, image))
    maps = {
        name: np.asarray(compiled(params, jnp.asarray(images)))
        for name, images in stages.items()
    }
    # The middle 98 % of the patches: a few outliers would make all the others alike.
    low, high = np.percentile(np.stack(list(maps.values())), (1, 99))
    columns = {
        f"{name}: {energies.mean():.4g}": heat(
            decode(stages[name]), energies, float(low), float(high)
        )
        for name, energies in maps.items()
    }
    note = f"Energies of patches, {low:.3g} (dark) to {high:.3g} (bright); means above."
    return write_grid(path, columns, note=note)


def shown_rows(batch: Mapping[str, ArrayLike], count: int) -> dict[str, np.ndarray]:
    """The first rows of a batch that count, at most so many: others only fill it up."""
    weights = np.asarray(batch["weights"])
    rows = np.flatnonzero(weights.reshape(len(weights), -1).all(axis=1))[:count]
    return {name: np.asarray(values)[rows] for name, values in batch.items()}


def _psnrs(stages: Mapping[str, ArrayLike]) -> str:
    clean = np.asarray(stages["clean"])
    errors = {
        name: float(np.square(np.asarray(values) - clean).mean())
        for name, values in stages.items()
        if name != "clean"
    }
    return ", ".join(f"{name} {psnr(mse):.2f}" for name, mse in errors.items())
