"""The parts of an evaluation of images or video: numbers, and a table of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike

from ebt_jax import models
from ebt_jax.data.pictures import to_floats
from ebt_jax.data.vision_pipeline import VisionData
from ebt_jax.diffusion_config import DiffusionConfig
from ebt_jax.evaluation.vision import denoise
from ebt_jax.evaluation.vision import horizons as by_horizon
from ebt_jax.evaluation.vision.features import labelled_features
from ebt_jax.evaluation.vision.fid import frechet_distance, moments
from ebt_jax.evaluation.vision.probe import (
    fit_probe,
    neighbour_accuracy,
    probe_accuracy,
)
from ebt_jax.evaluation.vision.retrieval import retrieve
from ebt_jax.interfaces import EnergyModel, Objective
from ebt_jax.refine import PyTree
from ebt_jax.thinking import Thinking
from ebt_jax.training.config import Config
from ebt_jax.training.objective import build_objective

Batches = Iterable[Mapping[str, ArrayLike]]
FILTERED = 256  # training pictures that the width of a filter is chosen on
PROBED = ("top_1", "top_5", "neighbours")


class Asked(NamedTuple):
    """What is evaluated, and how.

    Attributes:
      config: of the run, resolved.
      objective: of the run.
      params: of its model.
      opened: the pictures or clips that are scored.
      batches: of them; can be iterated over more than once.
      training: `(count) -> batches` of the run's first training pictures; 0: of all.
      thinking: how predictions are refined.
    """

    config: Config
    objective: Objective
    params: PyTree
    opened: VisionData
    batches: Batches
    training: Callable[[int], Batches]
    thinking: Thinking


class Part(NamedTuple):
    """A part of the results.

    Attributes:
      name: in JSON.
      numbers: for JSON.
      text: for people.
    """

    name: str
    numbers: Any
    text: str


def denoising(asked: Asked, levels: Sequence[float], passes: Sequence[int]) -> Part:
    """Quality of denoised images at noise levels against forward passes.

    Args:
      asked: of images that can be decoded.
      levels: see `denoise.denoising_rows`.
      passes: see there.
    """
    config, decode = asked.config, asked.opened.decode
    assert decode is not None
    rows = denoise.denoising_rows(
        config.model,
        config.diffusion,
        lambda changed: _objective(config, changed),
        asked.params,
        asked.batches,
        asked.training(FILTERED),
        levels=levels,
        passes=passes,
        pixels=None
        if config.vision.encoder == "none"
        else lambda values: to_floats(decode(np.asarray(values))),
        seed=config.eval.seed,
        thinking=asked.thinking,
    )
    numbers = [
        {
            "noise_level": row.noise_level,
            "what": row.what,
            "passes": row.passes,
            **row.quality,
        }
        for row in rows
    ]
    return Part("denoising", numbers, denoise.table(rows))


def probe(asked: Asked) -> Part:
    """What features of images tell about labels, and those of an untrained model.

    Raises:
      UserError: if there are no labels, or too few.
    """
    model, classes = asked.config.model, len(asked.opened.labels)
    training = asked.training(0)
    untrained = jax.jit(asked.objective.init)(jax.random.key(asked.config.train.seed))
    numbers, lines = {}, [f"{'features':<12}{'top 1':>8}{'top 5':>8}{'k-NN':>8}"]
    for name, params in (("trained", asked.params), ("untrained", untrained)):
        known = labelled_features(model, params, training)
        tests = labelled_features(model, params, asked.batches)
        found = probe_accuracy(fit_probe(*known, classes), *tests)
        found["neighbours"] = neighbour_accuracy(*known, *tests)
        numbers[name] = found
        cells = (f"{found[n]:8.1%}" if n in found else f"{'-':>8}" for n in PROBED)
        lines.append(f"{name:<12}{''.join(cells)}")
    about = f"Linear probe of {classes} classes and nearest neighbours, accuracy"
    return Part("probe", numbers, "\n".join([about, *lines]))


def frechet(asked: Asked, extract: Callable[[np.ndarray], np.ndarray]) -> Part:
    """Frechet distance of predicted and of noised images to the true ones.

    Args:
      asked: of images that can be decoded.
      extract: see `features.extractor`.

    Raises:
      UserError: for fewer than two pictures.
    """
    config, decode = asked.config, asked.opened.decode
    assert decode is not None
    key = jax.random.key(config.eval.seed)
    noised = denoise.noiser(config.model, config.diffusion, key)
    predict = denoise.predictor(asked.objective, asked.params, key, asked.thinking)
    features: dict[str, list[np.ndarray]] = {"image": [], "noised": [], "predicted": []}
    for batch in map(noised, asked.batches):
        counts = np.asarray(batch["weights"]) > 0
        shown = {**batch, "predicted": predict(batch)}
        for name, found in features.items():
            found.append(extract(decode(np.asarray(shown[name])))[counts])
    true = moments(np.concatenate(features.pop("image")))
    numbers: dict[str, float] = {
        name: frechet_distance(true, moments(np.concatenate(found)))
        for name, found in features.items()
    }
    count = sum(len(found) for found in features["predicted"])
    lines = [f"{name:<12}{distance:.4f}" for name, distance in numbers.items()]
    about = (
        f"Frechet distance to {count} true pictures, by DINOv2; it is larger the fewer "
        "there are"
    )
    return Part("fid", numbers | {"pictures": count}, "\n".join([about, *lines]))


def retrieval(asked: Asked, choices: int) -> Part:
    """How often the right caption has the lowest energy.

    Args:
      asked: of an energy model whose images have captions.
      choices: captions that each image is scored with.

    Raises:
      UserError: for fewer than two, or more than there are.
    """
    config = asked.config
    model = models.build(config.model, config.diffusion)
    assert isinstance(model, EnergyModel)
    found = retrieve(
        model, asked.params, asked.batches, choices=choices, seed=config.eval.seed
    )
    text = (
        f"The right caption of {found.choices} has the lowest energy for "
        f"{found.accuracy:.1%} of {found.pictures} pictures ({found.low:.1%} to "
        f"{found.high:.1%} by bootstrap); chance is {found.chance:.1%}"
    )
    return Part("retrieval", found._asdict(), text)


def horizons(asked: Asked, ahead: int) -> Part:
    """Errors of continued clips, frame by frame.

    Args:
      asked: of clips.
      ahead: frames that are predicted, one after the other.

    Raises:
      UserError: if none would be given.
    """
    config = asked.config
    rows = by_horizon.horizons(
        asked.objective,
        asked.params,
        asked.batches,
        context=config.data.context,
        ahead=ahead,
        decode=asked.opened.decode,
        thinking=asked.thinking,
        seed=config.eval.seed,
    )
    numbers = [row._asdict() for row in rows]
    return Part("horizons", numbers, by_horizon.table(rows))


def _objective(config: Config, diffusion: DiffusionConfig) -> Objective:
    return build_objective(dataclasses.replace(config, diffusion=diffusion))
