"""`ebt evaluate` of a run that predicts images or video."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags

from ebt_jax.command import Flag
from ebt_jax.errors import UserError
from ebt_jax.verbs import evaluate_judgement
from ebt_jax.verbs.common import COUNT, plain, results_table
from ebt_jax.verbs.model import Loaded, Spread, load_resolved, parse_mesh
from ebt_jax.verbs.thinking import check_thinks

if TYPE_CHECKING:
    import numpy as np

    from ebt_jax.data.vision_pipeline import VisionData
    from ebt_jax.diffusion_config import DiffusionConfig
    from ebt_jax.interfaces import Objective
    from ebt_jax.thinking import Thinking
    from ebt_jax.training.config import Config

_LIST = flags.DEFINE_list
FLAGS = (
    Flag("noise_levels", "images: shares of the noise, as 0.1,0.2", None, _LIST),
    Flag("passes", "images: forward passes to compare, as 1,2,3", None, _LIST),
    Flag("probe", "images: do features tell labels?", False, flags.DEFINE_boolean),
    Flag("fid", "images: Frechet distance, by the DINOv2 of these weights"),
    Flag("retrieval", "images: the caption with least energy of so many", 0, COUNT),
    Flag("horizons", "video: so many frames, each from those predicted", 0, COUNT),
)
_OF = {
    "image": ("noise_levels", "passes", "probe", "fid", "retrieval"),
    "video": ("horizons",),
    "text": ("text_key", "packing", *(flag.name for flag in evaluate_judgement.FLAGS)),
}
LEAST_STEPS = 3  # refinement steps that a table goes up to, at least
FILTERED = 256  # training pictures that the width of a filter is chosen on


class Asked(NamedTuple):
    """What the parts of an evaluation work with.

    Attributes:
      values: of the flags.
      config: of the run.
      loaded: its checkpoint.
      opened: the pictures or clips that are scored.
      batches: of them.
      training: `(count) -> batches` of the run's first training pictures; 0: of all.
      thinking: of --think.
      extract: of --fid, see `features.extractor`; None without.
    """

    values: flags.FlagValues
    config: Config
    loaded: Loaded
    opened: VisionData
    batches: Spread
    training: Callable[[int], Spread]
    thinking: Thinking
    extract: Callable[[np.ndarray], np.ndarray] | None


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


def check_space(values: flags.FlagValues, space: str) -> None:
    """Refuses flags of what the run does not predict.

    Raises:
      UserError: naming the first one.
    """
    for other, names in _OF.items():
        for name in names:
            if other != space and values[name].value:
                raise UserError(
                    f"--{name} is of {other}, but the run is of {space}; leave it out"
                )


def run(
    values: flags.FlagValues, path: Path, config: Config, thinking: Thinking
) -> None:
    """Scores pictures or clips with a checkpoint and prints the results.

    They are kept in the workdir, too, for `ebt report`.

    Args:
      values: of the flags.
      path: the workdir.
      config: of the run.
      thinking: of --think.
    """
    from ebt_jax.data import vision_pipeline
    from ebt_jax.evaluation.metrics import evaluate
    from ebt_jax.evaluation.vision.features import extractor

    space, data = config.model.space, config.data
    check_space(values, space)
    check_thinks(values.think, thinking, config)
    _check_images(values, config)
    known = None
    if values.data is not None:
        # It is read in place of the held-out part, and encoded as in training.
        known = vision_pipeline.open_data(data, config.vision, space, "train")
        data = dataclasses.replace(data, held_out_path=values.data, held_out=0.0)
    opened = vision_pipeline.open_data(
        data, config.vision, space, "held_out", like=known
    )
    _check_data(values, config, opened)
    extract = extractor(values.fid) if values.fid else None
    config = dataclasses.replace(config, mesh=parse_mesh(values.mesh))
    loaded = load_resolved(path, config, values.checkpoint)
    size = values.batch_size or config.eval.batch_size

    def spread(opened: VisionData, count: int) -> Spread:
        batches = vision_pipeline.held_out_batches(
            opened, batch_size=size, sequences=count
        )
        return Spread(batches, loaded.mesh)

    def training(count: int) -> Spread:
        whole = known or vision_pipeline.open_data(
            config.data, config.vision, space, "train", like=opened
        )
        return spread(whole, count)

    batches = spread(opened, values.sequences)
    asked = Asked(values, config, loaded, opened, batches, training, thinking, extract)
    results = evaluate(
        loaded.objective,
        loaded.params,
        batches,
        seed=config.eval.seed,
        thinking=thinking,
        progress=sys.stderr.isatty(),
    )
    parts = [make(asked) for make in _wanted(asked)]
    about = {
        "workdir": str(path),
        "checkpoint": loaded.step,
        "data": values.data or f"held-out part of {data.held_out_path or data.path}",
    }
    numbers = about | results | {part.name: part.numbers for part in parts}
    content = numbers | {"think": values.think}
    evaluate_judgement.keep(path, "vision", values.data, content)
    if values.json:
        print(json.dumps(plain(numbers), allow_nan=False))
    else:
        print(
            "\n\n".join([results_table(about, results), *(part.text for part in parts)])
        )


def _wanted(asked: Asked) -> list[Callable[[Asked], Part]]:
    """The parts that the flags ask for."""
    values = asked.values
    if asked.config.model.space == "video":
        return [_horizons] if values.horizons else []
    made = {"probe": _probe, "fid": _fid, "retrieval": _retrieval}
    wanted = [make for name, make in made.items() if values[name].value]
    # Features that cannot be decoded are no pictures.
    return wanted if asked.opened.decode is None else [_denoising, *wanted]


def _denoising(asked: Asked) -> Part:
    import numpy as np

    from ebt_jax.data.pictures import to_floats
    from ebt_jax.evaluation.vision import denoise

    config, decode = asked.config, asked.opened.decode
    assert decode is not None
    rows = denoise.denoising_rows(
        config.model,
        config.diffusion,
        lambda diffusion: _objective(config, diffusion),
        asked.loaded.params,
        asked.batches,
        asked.training(FILTERED),
        levels=_levels(asked.values, config),
        passes=_passes(asked.values, config, asked.thinking),
        pixels=None
        if config.vision.encoder == "none"
        else lambda values: to_floats(decode(np.asarray(values))),
        seed=config.eval.seed,
        thinking=asked.thinking,
    )
    numbers = [{**row._asdict(), **row.quality} for row in rows]
    for row in numbers:
        del row["quality"]
    return Part("denoising", numbers, denoise.table(rows))


def _probe(asked: Asked) -> Part:
    import jax

    from ebt_jax.evaluation.vision.features import labelled_features
    from ebt_jax.evaluation.vision.probe import (
        fit_probe,
        neighbour_accuracy,
        probe_accuracy,
    )

    model, classes = asked.config.model, len(asked.opened.labels)
    training = asked.training(0)
    start = asked.loaded.objective.init(jax.random.key(asked.config.train.seed))
    numbers, lines = {}, [f"{'features':<12}{'top 1':>8}{'top 5':>8}{'k-NN':>8}"]
    for name, params in (("trained", asked.loaded.params), ("untrained", start)):
        known = labelled_features(model, params, training)
        asked_of = labelled_features(model, params, asked.batches)
        found = probe_accuracy(fit_probe(*known, classes), *asked_of)
        found["neighbours"] = neighbour_accuracy(*known, *asked_of)
        numbers[name] = found
        cells = (f"{found[n]:8.1%}" if n in found else f"{'-':>8}" for n in _PROBED)
        lines.append(f"{name:<12}{''.join(cells)}")
    about = f"Linear probe of {classes} classes and nearest neighbours, accuracy"
    return Part("probe", numbers, "\n".join([about, *lines]))


_PROBED = ("top_1", "top_5", "neighbours")


def _fid(asked: Asked) -> Part:
    import jax
    import numpy as np

    from ebt_jax.evaluation.vision.denoise import noiser, predictor
    from ebt_jax.evaluation.vision.fid import frechet_distance, moments

    config, decode, extract = asked.config, asked.opened.decode, asked.extract
    assert decode is not None and extract is not None
    key = jax.random.key(config.eval.seed)
    noised = noiser(config.model, config.diffusion, key)
    predict = predictor(
        asked.loaded.objective, asked.loaded.params, key, asked.thinking
    )
    features: dict[str, list[np.ndarray]] = {"image": [], "noised": [], "predicted": []}
    for batch in map(noised, asked.batches):
        counts = np.asarray(batch["weights"]) > 0
        shown = {**batch, "predicted": predict(batch)}
        for name, found in features.items():
            found.append(extract(decode(np.asarray(shown[name])))[counts])
    true, *others = (moments(np.concatenate(found)) for found in features.values())
    distances = dict(
        zip(
            ("noised", "predicted"),
            (frechet_distance(true, other) for other in others),
            strict=True,
        )
    )
    count = sum(len(found) for found in features["image"])
    lines = [f"{name:<12}{distance:.4f}" for name, distance in distances.items()]
    about = (
        f"Frechet distance to {count} true pictures, by DINOv2; it is larger the fewer "
        "there are"
    )
    return Part("fid", {**distances, "pictures": count}, "\n".join([about, *lines]))


def _retrieval(asked: Asked) -> Part:
    from ebt_jax import models
    from ebt_jax.evaluation.vision.retrieval import retrieve
    from ebt_jax.interfaces import EnergyModel

    config = asked.config
    model = models.build(config.model, config.diffusion)
    assert isinstance(model, EnergyModel)
    found = retrieve(
        model,
        asked.loaded.params,
        asked.batches,
        choices=asked.values.retrieval,
        seed=config.eval.seed,
    )
    text = (
        f"The right caption of {found.choices} has the lowest energy for "
        f"{found.accuracy:.1%} of {found.pictures} pictures ({found.low:.1%} to "
        f"{found.high:.1%} by bootstrap); chance is {found.chance:.1%}"
    )
    return Part("retrieval", found._asdict(), text)


def _horizons(asked: Asked) -> Part:
    from ebt_jax.evaluation.vision import horizons

    config = asked.config
    rows = horizons.horizons(
        asked.loaded.objective,
        asked.loaded.params,
        asked.batches,
        context=config.data.context,
        ahead=asked.values.horizons,
        decode=asked.opened.decode,
        thinking=asked.thinking,
        seed=config.eval.seed,
    )
    return Part("horizons", [row._asdict() for row in rows], horizons.table(rows))


def _check_images(values: flags.FlagValues, config: Config) -> None:
    """Refuses what no data is needed to refuse."""
    from ebt_jax.evaluation.vision.denoise import at_level, passing
    from ebt_jax.thinking import AS_TRAINED

    if config.model.space != "image":
        return
    for level in _levels(values, config):
        for count in _passes(values, config, AS_TRAINED):
            passing(config.model, at_level(config.diffusion, level), count)
    if values.retrieval and config.model.kind != "ebt":
        raise UserError(
            f"--retrieval is by energy, which a {config.model.kind} does not have; "
            "leave it out"
        )
    if values.retrieval and config.model.condition != "caption":
        raise UserError(
            "--retrieval is of captions, but the run's model.condition is "
            f"{config.model.condition!r}; train with 'caption', or leave it out"
        )


def _check_data(values: flags.FlagValues, config: Config, opened: VisionData) -> None:
    """Refuses what the data does not have."""
    from ebt_jax.evaluation.vision.horizons import check_ahead
    from ebt_jax.evaluation.vision.retrieval import check_choices

    if config.model.condition == "caption" and not opened.condition_size:
        raise UserError(
            "the run's model.condition is 'caption', but the pictures have no "
            "captions; give pictures with captions"
        )
    if values.retrieval:
        texts = opened.captions[: values.sequences or None]
        check_choices(values.retrieval, len({first for first, *_ in texts}))
    if values.horizons:
        check_ahead(values.horizons, config.data.context + 1)
    if values.probe and "label" not in opened.examples[0]:
        raise UserError(
            "--probe needs labels, but the pictures have none; give a folder for each "
            "class, or leave it out"
        )
    if values.fid and opened.decode is None:
        raise UserError(
            "--fid is of pictures, but the run's vision.encoder cannot make pictures "
            "of what is predicted; leave it out"
        )


def _levels(values: flags.FlagValues, config: Config) -> list[float]:
    return _numbers(values, "noise_levels", float) or [config.diffusion.noise_level]


def _passes(values: flags.FlagValues, config: Config, thinking: Thinking) -> list[int]:
    """Forward passes to compare: 1, 2, 3 of an energy model, if nothing is asked."""
    from ebt_jax.evaluation.vision.denoise import trained_passes

    asked = _numbers(values, "passes", int)
    steps = thinking.num_steps or config.refine.num_steps
    whole = trained_passes(config.model, config.diffusion, steps)
    if asked or config.model.kind != "ebt":
        return asked or [whole]
    return list(range(1, max(whole, LEAST_STEPS) + 1))


def _numbers(values: flags.FlagValues, name: str, kind: type) -> list[Any]:
    """The numbers of a flag that lists some."""
    found = []
    for word in values[name].value or ():
        try:
            found.append(kind(word))
        except ValueError:
            rule = "whole numbers" if kind is int else "numbers"
            raise UserError(
                f"--{name} has {word!r}, but takes {rule} with commas between"
            ) from None
    return found


def _objective(config: Config, diffusion: DiffusionConfig) -> Objective:
    from ebt_jax.training.objective import build_objective

    return build_objective(dataclasses.replace(config, diffusion=diffusion))
