"""How well clips are continued, by how far ahead a frame is.

Each predicted frame is taken as the next one, as in generation, and compared with the
true one; so is the last frame that was given, which is what to beat.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike

from ebt_jax.errors import UserError
from ebt_jax.evaluation.frames import continue_clips
from ebt_jax.evaluation.vision.measures import psnr
from ebt_jax.interfaces import Objective
from ebt_jax.refine import PyTree
from ebt_jax.thinking import AS_TRAINED, Thinking

Decode = Callable[[np.ndarray], np.ndarray]  # [..., frame_size] -> uint8 [..., h, w, 3]


class Horizon(NamedTuple):
    """Errors of frames that lie so far ahead, means over clips.

    Attributes:
      ahead: frames, 1 for the first that was not given.
      model: `mse` and `smooth_l1` of frames as the model sees them, and `psnr` (dB) of
        the pictures they decode to, unless there is no way back to those.
      copying: the same, of the last given frame.
    """

    ahead: int
    model: dict[str, float]
    copying: dict[str, float]


def horizons(
    objective: Objective,
    params: PyTree,
    batches: Iterable[Mapping[str, ArrayLike]],
    *,
    context: int,
    ahead: int,
    decode: Decode | None,
    thinking: Thinking = AS_TRAINED,
    seed: int,
) -> list[Horizon]:
    """Errors of the last frames of clips, continued from all frames before.

    Args:
      objective: predicts frames.
      params: of its model.
      batches: of clips: `frames` and `targets` `[batch, seq, frame_size]`, `weights`
        `[batch, seq]`, `index` `[batch]`. Clips that are not weighed wholly are left
        out.
      context: frames that the model sees.
      ahead: how many frames are predicted; each clip, of seq + 1 frames, is given
        without those.
      decode: makes pictures of frames; None where nothing does.
      thinking: how each frame is refined.
      seed: of what is drawn.

    Raises:
      UserError: if no frame would be given, or there is no clip.
    """
    found: dict[str, dict[str, list[np.ndarray]]] = collections.defaultdict(
        lambda: collections.defaultdict(list)
    )
    for batch in batches:
        clips = whole_clips(batch)
        given = clips.shape[1] - ahead
        check_ahead(ahead, clips.shape[1])
        counted = (np.asarray(batch["weights"]) > 0).all(axis=1)
        clips, index = clips[counted], np.asarray(batch["index"])[counted]
        if not len(clips):
            continue
        continued = continue_clips(
            objective,
            params,
            clips[:, :given],
            context=context,
            new_frames=ahead,
            thinking=thinking,
            seed=seed,
            indices=index.tolist(),
        ).frames
        true = clips[:, given:]
        copied = np.broadcast_to(clips[:, given - 1, None], true.shape)
        for name, frames in (("model", continued), ("copying", copied)):
            for measure, errors in frame_errors(frames, true, decode).items():
                found[name][measure].append(errors)
    if not found:
        raise UserError(
            "there is no whole clip to continue; give the data more of them"
        )
    model, copying = (_per_frame(found[name]) for name in ("model", "copying"))
    return [
        Horizon(i + 1, *pair) for i, pair in enumerate(zip(model, copying, strict=True))
    ]


def check_ahead(ahead: int, frames: int) -> None:
    """Refuses to predict no frame, or all frames, of clips."""
    if not 1 <= ahead < frames:
        raise UserError(
            f"{ahead} frames ahead are asked for, but clips have {frames} frames, of "
            f"which at least one is given; give a number from 1 to {frames - 1}"
        )


def whole_clips(batch: Mapping[str, ArrayLike]) -> np.ndarray:
    """All frames `[batch, seq + 1, frame_size]`: the first, and what follows each."""
    frames, targets = (np.asarray(batch[name]) for name in ("frames", "targets"))
    return np.concatenate([frames[:, :1], targets], axis=1)


def frame_errors(
    frames: np.ndarray, true: np.ndarray, decode: Decode | None
) -> dict[str, np.ndarray]:
    """Mean errors of each frame, float64 `[clips, frames]`.

    Args:
      frames: `[clips, frames, frame_size]`.
      true: of the same shape.
      decode: makes pictures of frames; None where nothing does.

    Returns:
      `mse`, `smooth_l1`, and of pictures in [0, 255] `picture_mse`.
    """
    distance = np.abs(np.asarray(frames, np.float64) - true)
    smooth = np.where(distance < 1, 0.5 * distance**2, distance - 0.5)
    errors = {"mse": (distance**2).mean(-1), "smooth_l1": smooth.mean(-1)}
    if decode is not None:
        shown, right = (decode(x).astype(np.float64) for x in (frames, true))
        errors["picture_mse"] = np.square(shown - right).mean(axis=(-3, -2, -1))
    return errors


def table(rows: Sequence[Horizon]) -> str:
    """Horizons for people: the model's errors, and behind a stroke those of copying."""
    names = list(rows[0].model)
    heads = {"mse": "MSE", "smooth_l1": "smooth L1", "psnr": "PSNR dB"}
    lines = [["ahead", *(heads[name] for name in names), "| copying the last frame"]]
    for row in rows:
        numbers = [_number(name, row.model[name]) for name in names]
        copied = "  ".join(
            f"{heads[name]} {_number(name, row.copying[name])}" for name in names
        )
        lines.append([str(row.ahead), *numbers, f"| {copied}"])
    widths = [max(map(len, column)) + 2 for column in zip(*lines, strict=True)]
    return "\n".join(
        "".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _number(name: str, value: float) -> str:
    return f"{value:.2f}" if name == "psnr" else f"{value:.4g}"


def _per_frame(errors: Mapping[str, list[np.ndarray]]) -> list[dict[str, float]]:
    """Means over clips, for each frame."""
    means = {name: np.concatenate(parts).mean(axis=0) for name, parts in errors.items()}
    if "picture_mse" in means:
        pictures = means.pop("picture_mse")
        means["psnr"] = np.array([psnr(mse, peak=255) for mse in pictures])
    frames = zip(*means.values(), strict=True)
    return [dict(zip(means, map(float, frame), strict=True)) for frame in frames]
