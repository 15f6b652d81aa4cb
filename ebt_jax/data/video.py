"""Where clips come from: whatever `data.path` is.

=========================== ========================================================
data.path                   clips
=========================== ========================================================
moving_digits               2,000 clips of two of scikit-learn's digits that move
.mkv .mp4 .avi .gif ...     one each; also several, a glob, a folder or an archive
FOLDER, .tar, .tar.gz, .zip each folder in it with pictures: its frames, in the order
                            of their names
=========================== ========================================================

Several are separated by commas. A video's frames lie 1 / its rate apart; those that lie
as pictures `1 / vision.frame_rate`, times the `stride` that a JSON list beside the
archive (train.json beside train.tar.gz) or in the folder (clips.json) may give for
each: `[{"video": NAME OF THE FOLDER, "stride": 2}, ...]`.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import posixpath
from collections.abc import Iterator, Sequence
from typing import Any

from ebt_jax.data import defaults, files, pictures
from ebt_jax.data.config import DataConfig
from ebt_jax.data.files import File
from ebt_jax.data.items import Frames, Items, joined
from ebt_jax.data.pictures import Corrupt
from ebt_jax.data.sources import optional_package
from ebt_jax.data.vision_config import VisionConfig
from ebt_jax.errors import UserError

SUFFIXES = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
_FRAMES = tuple(suffix for suffix in pictures.SUFFIXES if suffix != ".gif")
_THREADS = 2  # that decode clips
_DIGIT_FRAMES = 2  # frames of a clip of moving digits / those of an example


def find(data: DataConfig, vision: VisionConfig) -> Items:
    """The clips of `data.path`.

    Raises:
      UserError: for whatever cannot be found, is of no known kind, or damaged.
    """
    parts, listed = [], []
    for part in filter(None, map(str.strip, data.path.split(","))):
        if part == "pydoc":  # the default
            continue
        elif part == "moving_digits":
            frames = _DIGIT_FRAMES * (data.context + 1)
            parts.append(
                defaults.moving_digits(
                    vision.size, vision.frame_seconds, frames, data.held_out
                )
            )
        else:
            listed += files.find(part, (*SUFFIXES, *pictures.SUFFIXES))
    if listed:
        parts.append(_files(listed, vision.frame_rate))
    if not parts:
        raise UserError(
            f"data.path is {data.path!r}; name videos, such as a folder, or "
            "'moving_digits'"
        )
    # Clips are large, and decoders have threads of their own.
    return dataclasses.replace(joined(parts), threads=_THREADS)


def _files(listed: Sequence[File], rate: float) -> Items:
    """Videos, and folders of frames; sorted by name."""
    clips: dict[str, list[File]] = {}
    for file in listed:
        frame = file.name.lower().endswith(_FRAMES)
        name = posixpath.dirname(file.name) if frame else file.name
        clips.setdefault(name, []).append(file)
    names = sorted(clips)
    strides = {}
    for path in dict.fromkeys(_beside(file) for file in listed):
        strides |= _strides(path)

    def read(index: int) -> Frames:
        found = clips[names[index]]
        if not found[0].name.lower().endswith(_FRAMES):
            return _video(found[0])
        stride = strides[names[index]] if names[index] in strides else 1
        return Frames(stride / rate, (pictures.opened(file.read()) for file in found))

    return Items([name or _folder(clips[name]) for name in names], read)


def _folder(frames: Sequence[File]) -> str:
    """What a clip is called whose frames lie in no folder of their own."""
    return os.path.dirname(os.path.abspath(frames[0].path))


def _video(file: File) -> Frames:
    """The frames of a video file, at its own rate."""
    av = optional_package("av", "reading videos", "vision")
    content = file.read() if file.content is not None or file.offset >= 0 else None
    try:
        container = av.open(file.path if content is None else io.BytesIO(content))
        if not container.streams.video:
            container.close()
            raise Corrupt("has no video in it")
        stream = container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate
    except av.FFmpegError as error:
        raise Corrupt(f"is corrupt ({error.strerror})") from error
    if not rate:
        container.close()
        raise Corrupt("does not tell its frames per second")

    def images() -> Iterator[Any]:
        with container:
            count = 0
            try:
                for frame in container.decode(stream):
                    count += 1
                    yield frame.to_image()
            except av.FFmpegError as error:
                raise Corrupt(
                    f"is corrupt after {count} frames ({error.strerror})"
                ) from error

    return Frames(float(1 / rate), images())


def _beside(file: File) -> str:
    """Where the strides of a frame may be told."""
    for suffix in files.ARCHIVES:
        if file.path.lower().endswith(suffix):
            return file.path[: -len(suffix)] + ".json"
    folder = os.path.dirname(os.path.dirname(os.path.abspath(file.path)))
    return os.path.join(folder, "clips.json")


def _strides(path: str) -> dict[str, float]:
    """The stride of each clip that a file tells; none if there is no such file."""
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            return {clip["video"]: float(clip["stride"]) for clip in json.load(file)}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"data.path: {path} does not tell what frames are apart "
            f"({type(error).__name__}: {error}); it has to be such as "
            '[{"video": "clip", "stride": 2}], or absent'
        ) from error
