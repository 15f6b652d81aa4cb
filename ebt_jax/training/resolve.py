"""What of a config follows from something else: sizes, schedules, counts."""

from __future__ import annotations

import dataclasses

from ebt_jax.errors import UserError
from ebt_jax.models.config import ModelConfig
from ebt_jax.training.config import Config


def resolve(config: Config, vocab_size: int) -> Config:
    """Fills in what follows from something else: vocabulary, landscapes, schedule.

    Args:
      config: a config as the user gave it.
      vocab_size: the tokenizer's.

    Raises:
      UserError: if the tokenizer's vocabulary is larger than the model's, or more of
        candidates is to be kept than there is.
    """
    if config.model.vocab_size and vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer {config.data.tokenizer!r} has {vocab_size} entries, but "
            f"model.vocab_size is {config.model.vocab_size}; raise it or leave it at 0"
        )
    model = dataclasses.replace(
        config.model,
        vocab_size=config.model.vocab_size or vocab_size,
        num_landscapes=config.refine.num_landscapes,
    )
    top_k = config.replay.top_k
    if config.replay.capacity and top_k >= model.vocab_size:
        raise UserError(
            f"replay.top_k is {top_k}, but candidates have {model.vocab_size} entries, "
            "one for each of the vocabulary; set it to 0 to keep all of them"
        )
    return scheduled(config, model)


def resolve_vision(
    config: Config,
    *,
    frame_size: int = 0,
    image_shape: tuple[int, int, int] = (0, 0, 0),
    condition_size: int = 0,
) -> Config:
    """As `resolve`, of images and video.

    Args:
      config: a config as the user gave it.
      frame_size: numbers in a frame; of video.
      image_shape: `(side, side, channels)` of what a model sees; of images.
      condition_size: numbers in an encoded caption; 0 where there are none.

    Raises:
      UserError: if the model's sizes are given and are not the data's, images are not
        square or no multiple of the patch, or there are no captions where they are to
        be the condition.
    """
    given, (height, width, channels) = config.model, image_shape
    if height != width:
        raise UserError(
            f"images of {config.data.path!r} are {height} x {width}, but have to be "
            "square; set vision.size"
        )
    if given.space == "image" and (height < given.patch or height % given.patch):
        raise UserError(
            f"images are {height} x {width}, which patches of model.patch "
            f"{given.patch} do not divide; change it or vision.size"
        )
    if given.condition == "caption" and not condition_size:
        raise UserError(
            f"model.condition is 'caption', but {config.data.path!r} has no captions; "
            "give pictures with captions, or set it to 'none'"
        )
    found = {
        "frame_size": frame_size,
        "image_size": height,
        "channels": channels,
        "condition_size": condition_size if given.condition == "caption" else 0,
    }
    for name, size in found.items():
        if getattr(given, name) not in (0, size):
            raise UserError(
                f"model.{name} is {getattr(given, name)}, but the data's is {size}; "
                "leave it at 0 to follow"
            )
    model = dataclasses.replace(
        given, num_landscapes=config.refine.num_landscapes, **found
    )
    return scheduled(config, model)


def resolve_like(config: Config, other: Config) -> Config:
    """As `resolve`, with what the data decide taken from a resolved config.

    Args:
      config: a config as the user gave it.
      other: a resolved one, of the same data or not.
    """
    given = config.model
    sizes = (
        "vocab_size",
        "frame_size",
        "image_size",
        "channels",
        "condition_size",
        "box_rows",
        "box_columns",
    )
    found = {name: getattr(given, name) or getattr(other.model, name) for name in sizes}
    model = dataclasses.replace(
        given, num_landscapes=config.refine.num_landscapes, **found
    )
    return scheduled(config, model)


def scheduled(config: Config, model: ModelConfig) -> Config:
    """With a resolved model, and a schedule as long as the run."""
    optim = dataclasses.replace(
        config.optim, schedule_steps=config.optim.schedule_steps or config.train.steps
    )
    return dataclasses.replace(config, model=model, optim=optim)


def scored_sequences(config: Config, devices: int = 1) -> int:
    """Sequences that an update is made from: those of the batch and the replayed ones.

    Args:
      config: of the run.
      devices: that share a batch.
    """
    parts = config.train.accumulation * devices
    rows = config.train.batch_size // parts
    replayed = config.replay.count(rows) if config.replay.capacity else 0
    return (rows + replayed) * parts
