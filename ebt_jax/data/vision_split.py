"""A split of pictures or clips, read into memory and encoded.

Which files are held out depends on their number and `data.held_out` alone, also when
some of them turn out to be corrupt. A single clip is cut: its end is held out.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ebt_jax.data import captions, corpus, encoding, images, items, video
from ebt_jax.data.config import DataConfig
from ebt_jax.data.encoding import Encoder
from ebt_jax.data.items import Items, Skipped
from ebt_jax.data.vision_config import VisionConfig
from ebt_jax.data.vision_examples import Chosen, Encoded, EncodedItems
from ebt_jax.errors import UserError

MEMORY_BYTES = 4 << 30  # pictures that take more have to be prepared
_FIT_ITEMS = 1024  # components are fitted to at most so many files


@dataclasses.dataclass(frozen=True)
class Split:
    """Pictures or clips of a split, intact ones only.

    Attributes:
      names: of each, for messages.
      encoded: of each.
      lengths: frames of each, int64 `[items]`.
      seconds: from one frame to the next, `[items]`; 0 for pictures.
      classes: name of each one's class; empty where there are none.
      captions: of each; empty where there are none.
    """

    names: list[str]
    encoded: EncodedItems
    lengths: np.ndarray
    seconds: np.ndarray
    classes: list[str]
    captions: list[tuple[str, ...]]

    def only(self, kept: Sequence[int]) -> Split:
        """Some of them."""
        if len(kept) == len(self.names):
            return self
        return Split(
            names=[self.names[item] for item in kept],
            encoded=Chosen(self.encoded, kept),
            lengths=self.lengths[list(kept)],
            seconds=self.seconds[list(kept)],
            classes=[self.classes[item] for item in kept] if self.classes else [],
            captions=[self.captions[item] for item in kept] if self.captions else [],
        )


class Origin(NamedTuple):
    """What a `data.path` holds.

    Attributes:
      files: their number, corrupt ones included.
      side: of their squares, pixels.
      encoder: what encodes them, or has.
      classes: names of all classes, in order.
      encode_captions: texts -> float32 `[texts, condition_size]`.
      skipped: takes those that cannot be used.
      read: the numbers of files -> the intact ones of them.
    """

    files: int
    side: int
    encoder: Encoder
    classes: tuple[str, ...]
    encode_captions: captions.Encode
    skipped: Skipped
    read: Callable[[np.ndarray], Split]


def find(data: DataConfig, vision: VisionConfig, space: str) -> Items:
    """The pictures ("image") or clips ("video") of `data.path`."""
    if space == "image":
        return images.find(data.path, vision)
    return video.find(data, vision)


def members(count: int, held_out: float, split: str) -> np.ndarray:
    """The files of a split, int64; a single one belongs to all of them.

    Args:
      count: number of files.
      held_out: `data.held_out`.
      split: "train", "held_out" or "all".
    """
    if count == 1 or split == "all" or (split == "train" and not held_out):
        return np.arange(count)
    chosen = corpus.held_out_documents(count, held_out)
    return np.flatnonzero(chosen == (split == "held_out"))


def open_raw(
    data: DataConfig,
    vision: VisionConfig,
    space: str,
    base: Origin | None,
    progress: bool,
    limit_bytes: int,
) -> Origin:
    """What `data.path` holds where it holds pictures or videos.

    Args:
      data: of the run; components are fitted to its training split.
      vision: how to read.
      space: "image" or "video".
      base: what gives size and encoder; None: nothing else does.
      progress: show bars on stderr.
      limit_bytes: what takes more memory is refused.

    Raises:
      UserError: for whatever cannot be found or read.
    """
    found = find(data, vision, space)
    side = items.side_of(found, vision) if base is None else base.side
    if base is None:
        encoder = encoder_of(data, vision, space, found, side)
        encode_captions = captions.encoder(vision)
    else:
        encoder, encode_captions = base.encoder, base.encode_captions
    skipped = Skipped(len(found), vision.max_corrupt)
    for stray in found.strays:
        skipped.add(stray, "has a caption, but is not there")
    return Origin(
        files=len(found),
        side=side,
        encoder=encoder,
        classes=tuple(class_names(found)),
        encode_captions=encode_captions,
        skipped=skipped,
        read=lambda chosen: read(
            found,
            chosen,
            side,
            encoder,
            encode_captions,
            vision,
            skipped,
            limit_bytes,
            progress,
        ),
    )


def read(
    found: Items,
    chosen: np.ndarray,
    side: int,
    encoder: Encoder,
    encode_captions: captions.Encode,
    vision: VisionConfig,
    skipped: Skipped,
    limit_bytes: int,
    progress: bool,
) -> Split:
    """Decodes and encodes pictures or clips.

    Args:
      found: where they are.
      chosen: which of them.
      side: of their squares, pixels.
      encoder: what encodes them.
      encode_captions: what encodes their captions.
      vision: how to read them.
      skipped: takes what cannot be used.
      limit_bytes: what takes more is refused.
      progress: show a bar on stderr once it takes longer than a second.

    Raises:
      UserError: if they are too many, or too many cannot be used.
    """
    number_bytes = 1 if vision.encoder == "none" else 4
    _check_size(len(chosen) * math.prod(encoder.shape) * number_bytes, limit_bytes)
    kept, apart, clips, total = [], [], [], 0
    with corpus.progress_bar("reading", len(chosen), progress, unit="") as bar:
        decoded = items.read_all(found, chosen, side, vision, skipped, bar)
        for index, seconds, frames in encoding.encode_items(encoder, decoded):
            kept.append(index)
            apart.append(seconds)
            clips.append(frames)
            total += frames.nbytes
            _check_size(total, limit_bytes)
    skipped.say_notes()
    texts = [found.captions[index] for index in kept] if found.captions else []
    told = captions.encode_all(encode_captions, texts)
    return Split(
        names=[found.names[index] for index in kept],
        encoded=[
            Encoded(frames, told[place] if told else None)
            for place, frames in enumerate(clips)
        ],
        lengths=np.array([len(frames) for frames in clips], np.int64),
        seconds=np.array(apart),
        classes=[found.classes[index] for index in kept] if found.classes else [],
        captions=texts,
    )


def encoder_of(
    data: DataConfig, vision: VisionConfig, space: str, found: Items, side: int
) -> Encoder:
    """The encoder; components are fitted to the training split of `data.path`.

    Args:
      data: of the run.
      vision: of the run.
      space: "image" or "video".
      found: what `data.path` holds.
      side: of the squares, pixels.
    """
    fit_on = functools.partial(_fit_pixels, data, vision, found, side)
    return encoding.make(vision, side, space == "video", fit_on)


def _fit_pixels(
    data: DataConfig, vision: VisionConfig, found: Items, side: int
) -> np.ndarray:
    """Frames of the training split, evenly spaced."""
    split = "train" if data.held_out else "all"
    chosen = members(len(found), data.held_out, split)
    most = max(encoding.FIT_NUMBERS // (side * side * vision.channels), 1)
    count = min(len(chosen), _FIT_ITEMS, most)
    places = np.linspace(0, len(chosen) - 1, count).round().astype(int)
    pixels = []
    for index in chosen[places].tolist():
        try:
            clip = items.decoded(found, index, side, vision).pixels
        except items.Corrupt:
            continue  # it is listed when the split is read
        if len(found) == 1 and split == "train":
            clip = clip[: corpus.cut_at(len(clip), data.held_out)]
        frames = np.linspace(0, len(clip) - 1, min(len(clip), max(most // count, 1)))
        pixels.append(clip[frames.round().astype(int)])
    if not pixels:
        raise UserError(
            f"data.path: nothing of {data.path} can be read, so vision.encoder 'pca' "
            "has nothing to be fitted to; replace the files"
        )
    return np.concatenate(pixels)


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise UserError(
            f"data.path: what it holds takes more than {limit / 2**30:.3g} GiB of "
            "memory; encode it once with `ebt prepare` and name what that writes"
        )


def class_names(found: Items) -> list[str]:
    """The names of all classes, in order; numbers by their value."""
    return sorted(set(found.classes), key=_natural)


def _natural(name: str) -> tuple[int, str]:
    """Numbers by their value, before names."""
    return (int(name), "") if name.isdecimal() else (1 << 62, name)
