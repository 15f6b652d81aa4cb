"""How well noise is taken out, against what it costs in forward passes.

A pass is a refinement step of an energy model, or a step of a diffusion sampler. All
models get the same noised pictures: a draw depends on the seed and on a picture's index
alone. Pictures are compared as pixels, those of latents after decoding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ebt_jax.diffusion_config import DiffusionConfig
from ebt_jax.errors import UserError
from ebt_jax.evaluation.vision.baselines import choose_width, gaussian_filter
from ebt_jax.evaluation.vision.measures import add_quality, mean_quality
from ebt_jax.interfaces import Batch, Objective
from ebt_jax.models.config import ModelConfig
from ebt_jax.models.image import noising
from ebt_jax.randomness import fold_in, prediction_keys
from ebt_jax.refine import PyTree
from ebt_jax.refined_loss import CORRUPTION
from ebt_jax.thinking import AS_TRAINED, Thinking

HEAD = ("noise", "what", "passes", "PSNR dB", "MSE 0-255", "SSIM", "L1")


class Row(NamedTuple):
    """How good a set of pictures is.

    Attributes:
      noise_level: share of the noise schedule that they were noised by.
      what: `noised`, `filter WIDTH` (pixels), or the kind of the model.
      passes: forward passes of a prediction, 0 of what is no model.
      quality: see `measures.set_quality`.
    """

    noise_level: float
    what: str
    passes: int
    quality: dict[str, float]


def denoising_rows(
    model: ModelConfig,
    diffusion: DiffusionConfig,
    build: Callable[[DiffusionConfig], Objective],
    params: PyTree,
    batches: Iterable[Mapping[str, ArrayLike]],
    training: Iterable[Mapping[str, ArrayLike]],
    *,
    levels: Sequence[float],
    passes: Sequence[int],
    pixels: Callable[[ArrayLike], ArrayLike] | None,
    seed: int,
    thinking: Thinking = AS_TRAINED,
) -> list[Row]:
    """A row for each noise level and number of passes, after those of no model.

    Args:
      model: of images, resolved.
      diffusion: that it was trained with.
      build: the objective of the model with another one.
      params: of the model.
      batches: pictures to denoise; iterated over once for each level.
      training: pictures that the width of the Gaussian filter is chosen on, for each
        level; none of `batches`, to be fair.
      levels: shares of the noise schedule.
      passes: of each prediction, see `passing`.
      pixels: what makes values in [-1, 1] of what is predicted; None where that is
        pixels.
      seed: of the noise.
      thinking: how an energy model refines, but for the number of steps.

    Raises:
      UserError: for levels or passes that cannot be, before anything is computed.
    """
    plans = {
        level: {n: passing(model, at_level(diffusion, level), n) for n in passes}
        for level in levels
    }
    key = jax.random.key(seed)

    @functools.cache  # a program for each number of steps serves all noise levels
    def predicting(changed: DiffusionConfig, how: Thinking) -> Callable[..., jax.Array]:
        return predictor(build(changed), params, key, how)

    rows = []
    for level, ways in plans.items():
        noised = noiser(model, at_level(diffusion, level), key)
        restoring: dict[tuple[str, int], Callable[[Batch], ArrayLike]] = {}
        if level < 1:
            restoring["noised", 0] = lambda batch: batch["noised"]
        if level < 1 and pixels is None:
            width = filter_width(map(noised, training))
            restoring[f"filter {width:.2f}", 0] = functools.partial(_filtered, width)
        for count, changed in ways.items():
            how = thinking._replace(num_steps=count if model.kind == "ebt" else 0)
            if (
                model.kind == "ebt"
            ):  # noised images are given: its own diffusion has no part
                changed = diffusion
            restoring[model.kind, count] = predicting(changed, how)
        sums: dict[tuple[str, int], dict[str, float]] = {way: {} for way in restoring}
        shown = pixels or (lambda values: values)
        for batch in map(noised, batches):
            clean, weights = shown(batch["image"]), batch["weights"]
            for way, restore in restoring.items():
                restored = shown(restore(batch))
                sums[way] = add_quality(sums[way], restored, clean, weights)
        rows += [Row(level, *way, mean_quality(found)) for way, found in sums.items()]
    return rows


def at_level(diffusion: DiffusionConfig, level: float) -> DiffusionConfig:
    """A diffusion of images that are noised by another share of the schedule.

    Raises:
      UserError: for a share that there is not.
    """
    if level == diffusion.noise_level:
        return diffusion
    return dataclasses.replace(diffusion, noise_level=level, sampling_steps=0)


def passing(
    model: ModelConfig, diffusion: DiffusionConfig, passes: int
) -> DiffusionConfig:
    """How a prediction is made in so many forward passes.

    An energy model takes as many steps, and its diffusion stays what it is. A diffusion
    model takes as many steps of its sampler, up to one for each timestep; beyond, it is
    applied again to its own result.

    Args:
      model: of images.
      diffusion: at the noise level wanted.
      passes: how many.

    Raises:
      UserError: for fewer than one, and for a diffusion model and a number above its
        timesteps that is no multiple of them.
    """
    whole = diffusion.noised_steps
    if passes < 1:
        raise UserError(f"{passes} passes are asked for, but there has to be one")
    if model.kind == "ebt":
        return diffusion
    if passes <= whole:
        return dataclasses.replace(diffusion, sampling_steps=passes, repeats=1)
    if passes % whole:
        raise UserError(
            f"{passes} passes are asked for, but images of noise level "
            f"{diffusion.noise_level} are noised by {whole} timesteps; give at most "
            "those, or a multiple, for several applications"
        )
    return dataclasses.replace(diffusion, sampling_steps=0, repeats=passes // whole)


def trained_passes(
    model: ModelConfig, diffusion: DiffusionConfig, num_steps: int
) -> int:
    """Forward passes of a prediction as trained.

    Args:
      model: of images.
      diffusion: that it was trained with.
      num_steps: refinement steps that it was trained with; DiT has none.
    """
    if model.kind == "ebt":
        return num_steps
    return (diffusion.sampling_steps or diffusion.noised_steps) * diffusion.repeats


def noiser(
    model: ModelConfig, diffusion: DiffusionConfig, key: jax.Array
) -> Callable[[Mapping[str, ArrayLike]], Batch]:
    """`(batch) -> batch` with its `noised` images, those that `evaluate` starts from.

    Args:
      model: of images.
      diffusion: by how much.
      key: the seed of `Objective.evaluate`.
    """
    corrupt = noising(model, diffusion)

    @jax.jit
    def noised(batch: Batch) -> Batch:
        keys = prediction_keys(key, batch["index"], None)
        return corrupt(fold_in(keys, CORRUPTION), batch, False)

    return lambda batch: noised({name: jnp.asarray(x) for name, x in batch.items()})


def predictor(
    objective: Objective, params: PyTree, key: jax.Array, thinking: Thinking
) -> Callable[[Batch], jax.Array]:
    """`(batch) -> images`, compiled."""
    predict = jax.jit(
        lambda params, batch: objective.predict(params, batch, key, thinking)
    )
    return functools.partial(predict, params)


def filter_width(batches: Iterable[Batch]) -> float:
    """The best width of a Gaussian filter, see `baselines.choose_width`.

    Args:
      batches: of `noised` and clean images `image`, whose `weights` are not 0.
    """
    pairs = [
        (np.asarray(b["noised"])[counts], np.asarray(b["image"])[counts])
        for b in batches
        for counts in [np.asarray(b["weights"]) > 0]
    ]
    noised, clean = (np.concatenate(part) for part in zip(*pairs, strict=True))
    return choose_width(noised, clean)


def table(rows: Sequence[Row]) -> str:
    """Rows for people."""
    lines = [HEAD] + [
        (
            f"{row.noise_level:g}",
            row.what,
            str(row.passes),
            f"{row.quality['psnr']:.2f}",
            f"{row.quality['mse']:.1f}",
            f"{row.quality['ssim']:.4f}",
            f"{row.quality['l1']:.4f}",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) + 2 for column in zip(*lines, strict=True)]
    return "\n".join(
        "".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _filtered(width: float, batch: Batch) -> np.ndarray:
    return gaussian_filter(batch["noised"], width)
