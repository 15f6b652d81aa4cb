"""`ebt generate` of a run that predicts images or video: pictures in a file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from ebt_jax.command import Flag
from ebt_jax.errors import UserError
from ebt_jax.verbs.model import load_resolved, parse_mesh

if TYPE_CHECKING:
    from ebt_jax.thinking import Thinking
    from ebt_jax.training.config import Config
    from ebt_jax.verbs.model import Loaded

FLAGS = (
    Flag("out", "of images and video: the .png or .gif to write; else in --workdir"),
)
_OF_TEXT = ("draft", "stop", "stream", "json")
CLIPS = 4  # held-out ones that are continued where none are given


def run(
    values: flags.FlagValues, path: Path, config: Config, thinking: Thinking
) -> None:
    """Draws captions, or continues clips, and prints the file's name.

    Args:
      values: of the flags.
      path: the workdir.
      config: of the run, resolved.
      thinking: of --think.
    """
    from ebt_jax.training import packed

    video = config.model.space == "video"
    for name in _OF_TEXT:
        if values[name].value:
            raise UserError(
                f"--{name} is of text, but the run is of {config.model.space}; leave "
                "it out"
            )
    kind = ".gif" if video else ".png"
    if values.out is None and path.is_file():
        raise UserError(f"--out is missing; {path} is a file: name a {kind} to write")
    out = path / f"generated{kind}" if values.out is None else Path(values.out)
    if out.suffix != kind:
        raise UserError(f"--out is {str(out)!r}, but this writes a {kind} file")
    if not out.parent.is_dir():
        raise UserError(f"--out is {str(out)!r}, but {out.parent} is no folder")
    if not video and config.model.condition != "caption":
        raise UserError(
            "the run denoises images, it draws none from a prompt; look at its "
            "samples.png, or let `ebt evaluate --data=PICTURES` denoise others"
        )
    if not video and not values.prompt:
        raise UserError("--prompt is missing; give a caption to draw, once or more")
    packed.check_data(path, "generate with the workdir that it was packed from")
    config = dataclasses.replace(config, mesh=parse_mesh(values.mesh))
    loaded = load_resolved(path, config, values.checkpoint)
    (_continue if video else _draw)(values, config, loaded, thinking, out)
    print(out)


def _draw(
    values: flags.FlagValues,
    config: Config,
    loaded: Loaded,
    thinking: Thinking,
    out: Path,
) -> None:
    """A row for each caption, a column for each sample."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from ebt_jax.evaluation.vision.denoise import predictor
    from ebt_jax.evaluation.vision.grids import write_grid
    from ebt_jax.training.vision_task import open_split

    opened = open_split(config, "train")
    if opened.decode is None:
        raise UserError(
            f"vision.encoder is {config.vision.encoder!r}, whose features cannot be "
            "made pictures again"
        )
    prompts, samples = values.prompt, values.samples
    count, shape = len(prompts) * samples, opened.image_shape
    told = opened.encode_captions(prompts)
    batch = {
        "image": jnp.zeros((count, *shape)),  # nothing is to be compared with it
        "caption": jnp.asarray(np.repeat(told, samples, axis=0)),
        "weights": jnp.ones(count),
        "index": jnp.arange(count),
    }
    key = jax.random.key(values.seed)
    predict = predictor(loaded.objective, loaded.params, key, thinking)
    images = np.asarray(predict(batch)).reshape(len(prompts), samples, *shape)
    columns = {f"sample {i + 1}": opened.decode(images[:, i]) for i in range(samples)}
    write_grid(out, columns, prompts)


def _continue(
    values: flags.FlagValues,
    config: Config,
    loaded: Loaded,
    thinking: Thinking,
    out: Path,
) -> None:
    """Clips of --prompt, or held-out ones, go on by --new frames."""
    import numpy as np

    from ebt_jax.data import vision_pipeline
    from ebt_jax.evaluation.frames import continue_clips
    from ebt_jax.evaluation.vision.grids import write_gif
    from ebt_jax.training.vision_task import open_split

    if len(values.prompt or ()) > 1:
        raise UserError("--prompt is given twice; give one folder or glob of clips")
    known = None
    if values.prompt:
        known = open_split(config, "train")
        data = dataclasses.replace(
            config.data, held_out_path=values.prompt[0], held_out=0.0
        )
        config = dataclasses.replace(config, data=data)
    opened = vision_pipeline.open_data(
        config.data, config.vision, "video", "held_out", like=known
    )
    if opened.decode is None:
        raise UserError(
            f"vision.encoder is {config.vision.encoder!r}, whose features cannot be "
            "made pictures again"
        )
    count = min(len(opened.examples), CLIPS)
    (batch,) = vision_pipeline.held_out_batches(
        opened, batch_size=count, sequences=count
    )
    clips = np.asarray(batch["frames"])
    context = config.data.context
    made = continue_clips(
        loaded.objective,
        loaded.params,
        clips,
        context=context,
        new_frames=values.new,
        thinking=thinking,
        samples=values.samples,
        seed=values.seed,
    ).frames
    begun = np.repeat(clips, values.samples, axis=0)
    shown = opened.decode(np.concatenate([begun, made], axis=1))
    write_gif(
        out,
        {"model": shown},
        given=context,
        frame_seconds=config.vision.frame_seconds,
    )
