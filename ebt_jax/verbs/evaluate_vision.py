"""`ebt evaluate` of a run that predicts images or video."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from ebt_jax.command import Flag
from ebt_jax.errors import UserError
from ebt_jax.verbs import evaluate_board, evaluate_judgement
from ebt_jax.verbs.common import COUNT, plain, results_folder, results_table
from ebt_jax.verbs.model import Spread, load_resolved, parse_mesh
from ebt_jax.verbs.thinking import check_thinks

if TYPE_CHECKING:
    import numpy as np

    from ebt_jax.data.vision_pipeline import VisionData
    from ebt_jax.evaluation.vision import parts
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
    "board": tuple(flag.name for flag in evaluate_board.FLAGS),
    "text": ("text_key", "packing", *(flag.name for flag in evaluate_judgement.FLAGS)),
}
LEAST_STEPS = 3  # refinement steps that a table goes up to, at least


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

    They are kept in a folder, too, for `ebt report`.

    Args:
      values: of the flags.
      path: the workdir.
      config: of the run.
      thinking: of --think.
    """
    from ebt_jax.data import vision_pipeline
    from ebt_jax.evaluation.metrics import evaluate
    from ebt_jax.evaluation.vision import parts
    from ebt_jax.evaluation.vision.features import extractor
    from ebt_jax.training import packed

    space, data = config.model.space, config.data
    check_space(values, space)
    check_thinks(values.think, thinking, config)
    _check_images(values, config)
    packed.check_data(path, "evaluate the workdir that it was packed from")
    place = results_folder(path, values.out)
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
    asked = parts.Asked(
        config,
        loaded.objective,
        loaded.params,
        opened,
        batches,
        training,
        thinking,
    )
    results = evaluate(
        loaded.objective,
        loaded.params,
        batches,
        seed=config.eval.seed,
        thinking=thinking,
        progress=sys.stderr.isatty(),
    )
    made = list(_wanted(values, asked, extract))
    about = {
        "workdir": str(path),
        "checkpoint": loaded.step,
        "data": values.data or f"held-out part of {data.held_out_path or data.path}",
    }
    numbers = about | results | {part.name: part.numbers for part in made}
    content = numbers | {"think": values.think}
    evaluate_judgement.keep(place, "vision", values.data, content)
    if values.json:
        print(json.dumps(plain(numbers), allow_nan=False))
    else:
        tables = (part.text for part in made)
        print("\n\n".join([results_table(about, results), *tables]))


def _wanted(
    values: flags.FlagValues,
    asked: parts.Asked,
    extract: Callable[[np.ndarray], np.ndarray] | None,
) -> Iterator[parts.Part]:
    """The parts that the flags ask for."""
    from ebt_jax.evaluation.vision import parts

    if values.horizons:
        yield parts.horizons(asked, values.horizons)
    if asked.config.model.space == "image" and asked.opened.decode is not None:
        levels = _levels(values, asked.config)
        passes = _passes(values, asked.config, asked.thinking)
        yield parts.denoising(asked, levels, passes)
    if values.probe:
        yield parts.probe(asked)
    if extract is not None:
        yield parts.frechet(asked, extract)
    if values.retrieval:
        yield parts.retrieval(asked, values.retrieval)


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
