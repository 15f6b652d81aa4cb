"""Batches of pictures and of clips, for training and for evaluation.

======= ================================== ===========================================
image   float32 [b, side, side, channels]  pictures: pixels in [-1, 1], or latents
label   int32 [b]                          pictures, where there are any: its class
caption float32 [b, condition_size]        pictures, where there are any
frames  float32 [b, s, frame_size]         clips
targets float32 [b, s, frame_size]         clips: the frame after each
weights float32 [b] or [b, s]              0 where a prediction does not count
index   int32 [b]                          names an example in its split
======= ================================== ===========================================

Order, epochs and processes are those of `ebt_jax.data.pipeline`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import grain
import numpy as np

from ebt_jax.data import corpus, latents, vision_split
from ebt_jax.data.config import DataConfig
from ebt_jax.data.items import Skipped
from ebt_jax.data.pipeline import (
    HeldOutBatches,
    TrainBatches,
    check_batch,
    local_size,
)
from ebt_jax.data.vision_config import VisionConfig
from ebt_jax.data.vision_examples import (
    ClipExamples,
    Examples,
    ImageExamples,
    InOrder,
    steps_of,
)
from ebt_jax.data.vision_split import MEMORY_BYTES, Origin, Split
from ebt_jax.errors import UserError

_CLOSEST = 0.99  # frames wanted may be so much closer than a clip's are


@dataclasses.dataclass(frozen=True)
class VisionData:
    """A split of pictures or clips.

    Attributes:
      examples: with random access, see `vision_examples`.
      image_shape: `(side, side, channels)` of a picture, or frame, as a model sees it.
      frame_size: numbers in a frame; 0 for pictures.
      condition_size: numbers in an encoded caption; 0 without captions.
      labels: name of each class, by number; empty without classes.
      captions: of each example; empty without captions.
      encode_captions: texts -> float32 `[texts, condition_size]`.
      decode: `[..., *image_shape]`, or `[..., frame_size]`, back to pictures, uint8
        `[..., height, width, 3]`; None where the encoder has no way back.
      origin: what `data.path` holds.
    """

    examples: Examples
    image_shape: tuple[int, ...]
    frame_size: int
    condition_size: int
    labels: tuple[str, ...]
    captions: Sequence[tuple[str, ...]]
    encode_captions: Callable[[Sequence[str]], np.ndarray]
    decode: Callable[[np.ndarray], np.ndarray] | None
    origin: Origin


def open_data(
    data: DataConfig,
    vision: VisionConfig,
    space: str,
    split: str,
    *,
    like: VisionData | None = None,
    progress: bool = True,
    limit_bytes: int = MEMORY_BYTES,
) -> VisionData:
    """Reads a split of `data.path`, or opens it where `ebt prepare` has encoded it.

    Args:
      data: what to read.
      vision: how.
      space: "image" or "video".
      split: "train", "held_out", or "all" of `data.path`.
      like: another split of the same; what is found and fitted for it serves again.
      progress: show bars on stderr once something takes longer than a second.
      limit_bytes: pixels that take more memory have to be prepared first.

    Raises:
      UserError: for whatever cannot be read, if too many files cannot be used, and if
        there is nothing in the split.
    """
    if like is None:
        base = _origin(data, vision, space, None, progress, limit_bytes)
    else:
        base = like.origin
    source, part = corpus.source_of(data, split)
    if source.path == data.path:
        origin = base
    else:
        origin = _origin(source, vision, space, base, progress, limit_bytes)
    found = origin.read(vision_split.members(origin.files, source.held_out, part))
    encoder, frame_size, decode = base.encoder, 0, base.encoder.decode
    if space == "video":
        cut = part if origin.files == 1 and source.held_out else "all"
        found, examples = _clips(found, origin.skipped, cut, source, vision)
        frame_size = math.prod(encoder.shape)
        if encoder.decode is not None:
            decode = functools.partial(_decode_frames, encoder.decode, encoder.shape)
    else:
        if origin.files == 1 and part != "all" and source.held_out:
            raise UserError(
                f"data.path: {source.path} is a single picture, of which nothing can "
                "be held out; set data.held_out_path"
            )
        examples = ImageExamples(found.encoded, _labels(found, base.classes))
    if not len(examples):
        raise UserError(
            f"data.path: {source.path}, split {part!r}, has nothing of {origin.files} "
            "files left; give more files or another data.held_out"
        )
    conditions = found.encoded[0].conditions
    return VisionData(
        examples=examples,
        image_shape=encoder.shape,
        frame_size=frame_size,
        condition_size=0 if conditions is None else conditions.shape[-1],
        labels=base.classes,
        captions=found.captions,
        encode_captions=base.encode_captions,
        decode=decode,
        origin=base,
    )


def train_batches(
    opened: VisionData,
    data: DataConfig,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    rows: Sequence[int] | None = None,
) -> TrainBatches:
    """Batches of a split, in an order that only it, `data` and the seed determine.

    Close them (`.close()`) when done, above all with `num_workers`.

    Args:
      opened: the training split.
      data: `shuffle`, `repeat` and `num_workers`.
      batch_size: examples per batch, over all processes.
      seed: of the order, which is another in every epoch, and of what is drawn.
      start: the first example.
      rows: which rows of each batch this process loads; None for all.

    Raises:
      UserError: if without `repeat` there are fewer examples than a batch has.
    """
    check_batch(data, batch_size, len(opened.examples), "pictures or clips")
    order = grain.MapDataset.range(len(opened.examples))
    if data.shuffle:
        order = order.shuffle(seed=seed % 2**32)
    if data.repeat:
        order = order.repeat()
    batches = TrainBatches(
        InOrder(opened.examples, order, seed),
        batch_size=batch_size,
        rows=range(batch_size) if rows is None else rows,
        num_workers=data.num_workers,
    )
    batches.seek(start)
    return batches


def held_out_batches(
    opened: VisionData,
    *,
    batch_size: int,
    sequences: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> HeldOutBatches:
    """Batches for evaluation: every example once, in a fixed order.

    Args:
      opened: the split.
      batch_size: examples per batch, over all processes.
      sequences: how many, from the first; 0: all.
      process_index: which of the processes this is.
      process_count: how many share each batch.
    """
    local_size(batch_size, process_count)
    count = len(opened.examples)
    count = min(sequences, count) if sequences else count
    return HeldOutBatches(
        opened.examples, count, batch_size, process_index, process_count
    )


def _origin(
    data: DataConfig,
    vision: VisionConfig,
    space: str,
    base: Origin | None,
    progress: bool,
    limit_bytes: int,
) -> Origin:
    """What `data.path` holds; encoded as `base` is, if that is given."""
    if latents.is_prepared(data.path):
        return latents.open_folder(data.path, vision, space, base)
    return vision_split.open_raw(data, vision, space, base, progress, limit_bytes)


def _labels(found: Split, classes: Sequence[str]) -> np.ndarray | None:
    """The number of each picture's class, int32 `[pictures]`."""
    if not found.classes or not classes:
        return None
    numbers = {name: number for number, name in enumerate(classes)}
    for name in found.classes:
        if name not in numbers:
            raise UserError(
                f"data.held_out_path has pictures of class {name!r}, but data.path has "
                f"none; its classes are {', '.join(classes[:5])}, ..."
            )
    return np.array([numbers[name] for name in found.classes], np.int32)


def _clips(
    found: Split, skipped: Skipped, cut: str, data: DataConfig, vision: VisionConfig
) -> tuple[Split, ClipExamples]:
    """The clips that are long enough, and their examples.

    Args:
      found: clips.
      skipped: takes those that are too short.
      cut: of a single clip: "train" for its beginning, "held_out" for its end, "all".
      data: `context` and `held_out`.
      vision: `frame_seconds`.
    """
    firsts, stops = np.zeros_like(found.lengths), found.lengths.copy()
    if cut != "all":
        at = [corpus.cut_at(int(length), data.held_out) for length in found.lengths]
        (stops if cut == "train" else firsts)[:] = at
    strides = vision.frame_seconds / found.seconds
    kept = []
    for clip, stride in enumerate(strides.tolist()):
        name, seconds = found.names[clip], found.seconds[clip]
        if stride < _CLOSEST:
            raise UserError(
                f"vision.frame_seconds is {vision.frame_seconds}, but the frames of "
                f"{name} are {seconds:.4g} seconds apart; raise it"
            )
        frames = int(stops[clip] - firsts[clip])
        if frames > steps_of(data.context, stride)[-1]:
            kept.append(clip)
            continue
        skipped.add(
            name,
            f"is too short: {frames} frames, {frames * seconds:.3g} seconds, but "
            f"data.context {data.context} needs {data.context + 1} frames, "
            f"{vision.frame_seconds} seconds apart (vision.frame_seconds)",
        )
    found = found.only(kept)
    return found, ClipExamples(
        found.encoded, firsts[kept], stops[kept], strides[kept], data.context
    )


def _decode_frames(
    decode: Callable[[np.ndarray], np.ndarray],
    shape: tuple[int, ...],
    frames: np.ndarray,
) -> np.ndarray:
    """uint8 `[..., height, width, 3]` of `[..., frame_size]`, channel after channel."""
    height, width, channels = shape
    apart = np.reshape(frames, (*np.shape(frames)[:-1], channels, height, width))
    return decode(np.moveaxis(apart, -3, -1))
