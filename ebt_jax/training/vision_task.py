"""What images and video bring to a run, see `task.Task`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import numpy as np

from ebt_jax.data import pipeline, vision_pipeline
from ebt_jax.data.vision_pipeline import VisionData
from ebt_jax.evaluation.vision import samples
from ebt_jax.interfaces import Objective
from ebt_jax.refine import PyTree
from ebt_jax.thinking import Thinking
from ebt_jax.training.config import Config
from ebt_jax.training.resolve import resolve_vision
from ebt_jax.training.sharding import NumpyBatch
from ebt_jax.training.task import Show, Task

SHOWN_STEPS = 3  # refinement steps that are shown, at least


def open_vision_task(config: Config) -> Task:
    """The task of a config whose `model.space` is image or video.

    Raises:
      UserError: for pictures that cannot be read or do not suit the model.
    """
    opened = open_split(config, "train")
    config = resolve_pictures(config, opened)

    def train_batches(rows: Sequence[int]) -> pipeline.TrainBatches:
        return vision_pipeline.train_batches(
            opened,
            config.data,
            batch_size=config.train.batch_size,
            seed=config.train.seed,
            rows=rows,
        )

    held_out = open_split(config, "held_out", opened)

    def held_out_batches() -> Iterable[NumpyBatch]:
        return vision_pipeline.held_out_batches(
            held_out,
            batch_size=config.eval.batch_size,
            sequences=config.eval.sequences,
        )

    show = show_pictures(config, held_out)
    return Task(config, train_batches, held_out_batches, show)


def open_split(
    config: Config, split: str, like: VisionData | None = None
) -> VisionData:
    """Pictures or clips of a config, see `vision_pipeline.open_data`."""
    return vision_pipeline.open_data(
        config.data,
        config.vision,
        config.model.space,
        split,
        like=like,
        progress=jax.process_index() == 0,
    )


def resolve_pictures(config: Config, opened: VisionData) -> Config:
    """`resolve_vision` with the sizes of opened data."""
    video = config.model.space == "video"
    height, width, channels = opened.image_shape
    return resolve_vision(
        config,
        frame_size=opened.frame_size,
        image_shape=(0, 0, 0) if video else (height, width, channels),
        condition_size=opened.condition_size,
    )


def show_pictures(config: Config, held_out: VisionData) -> Show:
    """Writes `samples.png`, `energy_map.png` or `samples.gif`, as far as they apply."""

    def show(
        objective: Objective, params: PyTree, batches: Iterable[NumpyBatch], path: Path
    ) -> str:
        decode = held_out.decode
        if decode is None:
            return (
                f"no samples: what vision.encoder {config.vision.encoder!r} makes of "
                "pictures cannot be made pictures again"
            )
        pictures = lambda values: decode(np.asarray(values))
        batch, seed = next(iter(batches)), config.eval.seed
        trained = config.eval.num_steps or config.refine.num_steps
        if config.model.space == "video":
            context = config.data.context
            written = samples.write_video_samples(
                path,
                objective,
                params,
                batch,
                pictures,
                context=context,
                given=(context + 2) // 2,
                frame_seconds=config.vision.frame_seconds,
                thinking=Thinking(config.eval.num_steps),
                seed=seed,
            )
        else:
            written = samples.write_image_samples(
                path,
                config.model,
                config.diffusion,
                objective,
                params,
                batch,
                pictures,
                steps=range(1, max(trained, SHOWN_STEPS) + 1),
                seed=seed,
                filtered=config.vision.encoder == "none",
                captions=[
                    texts[0] for texts in held_out.captions[: len(batch["index"])]
                ],
            )
        return f"samples  {', '.join(str(file) for file in written)}"

    return show
