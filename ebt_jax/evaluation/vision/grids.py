"""Pictures side by side: grids as PNG, clips as GIF, energies as heat over pictures.

Pictures are uint8 `[..., height, width, 3]`, as the data's `decode` gives them. Small
ones are enlarged by a whole number, without blurring them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont

from ebt_jax.errors import UserError

SIDE = 96  # pixels that pictures are enlarged to, about
GAP = 4  # between pictures
LETTERS = 12  # height of text
LINE = 16  # height of a line of text
LETTER = 7  # width of a letter, about
PAPER, INK = (255, 255, 255), (40, 40, 40)
GIVEN, PREDICTED = (150, 150, 150), (192, 57, 43)  # frames of frames
HEAT = 0.55  # opacity of energies over a picture


def write_grid(
    path: Path,
    columns: Mapping[str, ArrayLike],
    rows: Sequence[str] = (),
    note: str = "",
) -> Path:
    """Writes a PNG: one row for each example, one column for each stage.

    Args:
      path: of the file.
      columns: pictures `[examples, height, width, 3]` by what stands above them.
      rows: what stands below each row, such as captions; none if empty.
      note: a line below all.

    Returns:
      The path.

    Raises:
      UserError: if there is no picture.
    """
    stages = {name: enlarged(pictures) for name, pictures in columns.items()}
    count, height, width = next(iter(stages.values())).shape[:3] if stages else (0,) * 3
    if not count:
        raise UserError(f"{path.name} would show no picture; give it some")
    # A column is as wide as its name wants, a row as wide as its caption may be.
    font = ImageFont.load_default(LETTERS)
    across = round(max(width, *map(font.getlength, stages))) + 2 * GAP
    down = height + GAP + (LINE if rows else 0)
    total = max(GAP + across * len(stages), round(font.getlength(note)) + 2 * GAP)
    paper = Image.new(
        "RGB", (total, LINE + GAP + down * count + LINE * bool(note)), PAPER
    )
    draw = ImageDraw.Draw(paper)
    for j, (name, pictures) in enumerate(stages.items()):
        left = GAP + j * across
        draw.text((left, 2), name, INK, font)
        for i, picture in enumerate(pictures):
            paper.paste(Image.fromarray(picture), (left, LINE + GAP + i * down))
    for i, caption in enumerate(rows):
        shown = shortened(caption, (total - 2 * GAP) // LETTER)
        draw.text((GAP, LINE + GAP + i * down + height), shown, INK, font)
    draw.text((GAP, LINE + GAP + count * down), note, INK, font)
    paper.save(path)
    return path


def write_gif(
    path: Path,
    clips: Mapping[str, ArrayLike],
    *,
    given: int,
    frame_seconds: float,
) -> Path:
    """Writes clips as one GIF that goes round and round: one column for each clip.

    Frames that were given have a grey frame, those that a model continued them with a
    red one, and each clip rests on its last frame for a moment.

    Args:
      path: of the file.
      clips: `[clips, time, height, width, 3]` by what stands beside them, from above to
        below, such as the true clips and their continuations.
      given: frames at the beginning that were not predicted; the first of `clips` is
        all given.
      frame_seconds: time between frames.

    Returns:
      The path.

    Raises:
      UserError: if there is no frame.
    """
    bands = {name: enlarged(pictures) for name, pictures in clips.items()}
    shape = next(iter(bands.values())).shape if bands else (0,) * 5
    count, length, height, width = shape[:4]
    if not count * length:
        raise UserError(f"{path.name} would show no frame; give it clips")
    font = ImageFont.load_default(LETTERS)
    margin = GAP + round(max(map(font.getlength, bands)))
    border = 2
    across, down = width + 2 * border + GAP, height + 2 * border + GAP
    size = (margin + GAP + across * count, LINE + down * len(bands) + GAP)
    frames = []
    for time in range(length):
        paper = Image.new("RGB", size, PAPER)
        draw = ImageDraw.Draw(paper)
        said = "given" if time < given else f"predicted, {time - given + 1}"
        draw.text((margin + GAP, 2), f"frame {time + 1} of {length}: {said}", INK, font)
        for i, (name, pictures) in enumerate(bands.items()):
            top = LINE + i * down
            draw.text((GAP, top + height // 2), name, INK, font)
            colour = PREDICTED if i and time >= given else GIVEN
            for j in range(count):
                left = margin + GAP + j * across
                corner = (left + width + 2 * border - 1, top + height + 2 * border - 1)
                draw.rectangle((left, top, *corner), outline=colour, width=border)
                picture = Image.fromarray(pictures[j, time])
                paper.paste(picture, (left + border, top + border))
        frames.append(paper)
    each = max(round(1000 * frame_seconds), 20)
    durations = [each] * (length - 1) + [each + 1000]
    first, *rest = frames
    first.save(path, save_all=True, append_images=rest, duration=durations, loop=0)
    return path


def heat(
    pictures: ArrayLike, energies: ArrayLike, low: float, high: float
) -> np.ndarray:
    """Pictures under the energies of their patches: dark is low, bright is high.

    Args:
      pictures: `[examples, height, width, 3]`.
      energies: `[examples, rows, columns]`, of patches that cover a picture.
      low: the energy of the darkest.
      high: the energy of the brightest.
    """
    pictures = np.asarray(pictures, np.uint8)
    share = (np.asarray(energies, float) - low) / max(high - low, 1e-30)
    colours = matplotlib.colormaps["inferno"](np.clip(share, 0, 1))[..., :3] * 255
    height, width = pictures.shape[1:3]
    rows, columns = colours.shape[1:3]
    colours = colours[:, np.arange(height) * rows // height]
    colours = colours[:, :, np.arange(width) * columns // width]
    grey = pictures.mean(axis=-1, keepdims=True)
    return np.round(HEAT * colours + (1 - HEAT) * grey).astype(np.uint8)


def enlarged(pictures: ArrayLike, side: int = SIDE) -> np.ndarray:
    """Pictures whose pixels are repeated until they have about so many on a side.

    Args:
      pictures: uint8 `[..., height, width, 3]`.
      side: pixels wanted; larger pictures stay as they are.
    """
    pictures = np.asarray(pictures, np.uint8)
    times = max(round(side / max(pictures.shape[-3:-1])), 1)
    return pictures.repeat(times, axis=-3).repeat(times, axis=-2)


def shortened(text: str, letters: int) -> str:
    """One line of text, cut off where it is longer."""
    line = " ".join(text.split())
    return line if len(line) <= letters else line[: max(letters - 3, 0)] + "..."
