"""Pictures and clips as they are found: what there is of them before any is decoded.

A picture is a clip of one frame. What cannot be used is listed and skipped, up to
`vision.max_corrupt`.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
from absl import logging
from tqdm import tqdm

from ebt_jax.data import pictures
from ebt_jax.data.pictures import Corrupt
from ebt_jax.data.vision_config import VisionConfig
from ebt_jax.errors import UserError

Result = TypeVar("Result")

_NAMED = 20  # unusable files that are named one by one
_LISTED = 3  # of them in an error


class Frames(NamedTuple):
    """A picture or a clip while it is decoded.

    Attributes:
      seconds: from one frame to the next; 0 for a picture.
      images: Pillow's, frame by frame.
    """

    seconds: float
    images: Iterator[Any]


class Clip(NamedTuple):
    """A picture or a clip, decoded.

    Attributes:
      pixels: uint8 `[frames, side, side, channels]`.
      seconds: from one frame to the next; 0 for a picture.
      notes: how many frames needed what of `pictures.NOTES`.
    """

    pixels: np.ndarray
    seconds: float
    notes: Counter[str]


@dataclasses.dataclass(frozen=True)
class Items:
    """Pictures or clips.

    Attributes:
      names: of each, for messages.
      read: decodes one of them; raises `Corrupt` or `OSError`.
      classes: name of each one's class; empty where there are none.
      captions: of each; empty where there are none.
      strays: files that captions name, but that are not there.
      threads: that may decode at a time; each holds one of them in memory.
    """

    names: list[str]
    read: Callable[[int], Frames]
    classes: list[str] = dataclasses.field(default_factory=list)
    captions: list[tuple[str, ...]] = dataclasses.field(default_factory=list)
    strays: list[str] = dataclasses.field(default_factory=list)
    threads: int = 16

    def __len__(self) -> int:
        return len(self.names)


def joined(parts: Sequence[Items]) -> Items:
    """Several sources one after the other; classes and captions if all have them."""
    if len(parts) == 1:
        return parts[0]
    places = [(part, number) for part in parts for number in range(len(part))]

    def read(index: int) -> Frames:
        part, number = places[index]
        return part.read(number)

    def all_or_none(name: str) -> list[Any]:
        columns = [getattr(part, name) for part in parts]
        return [entry for column in columns for entry in column] if all(columns) else []

    names = [name for part in parts for name in part.names]
    strays = [file for part in parts for file in part.strays]
    return Items(
        names,
        read,
        all_or_none("classes"),
        all_or_none("captions"),
        strays,
        min(part.threads for part in parts),
    )


class Skipped:
    """What could not be used, or not as it is.

    Attributes:
      problems: name and reason of each that could not be used, listed once however
        often it is met.
      notes: how many frames needed what of `pictures.NOTES`, and were not yet told of.
      frames: how many there are of all that could be used since then.
    """

    def __init__(self, total: int, limit: float) -> None:
        """Nothing yet.

        Args:
          total: number of files, of which the limit is a share.
          limit: `vision.max_corrupt`.
        """
        self.total, self.limit = total, limit
        self.problems: dict[str, str] = {}
        self.notes, self.frames = Counter[str](), 0

    def add(self, name: str, problem: str) -> None:
        """Lists a file.

        Raises:
          UserError: if they are more than the limit.
        """
        if name in self.problems:
            return
        self.problems[name] = problem
        if len(self.problems) > self.limit * self.total:
            listed = itertools.islice(self.problems.items(), _LISTED)
            first = "; ".join(f"{name} {problem}" for name, problem in listed)
            more = ", ..." if len(self.problems) > _LISTED else ""
            raise UserError(
                f"data.path: {first}{more}: {len(self.problems)} unusable of "
                f"{self.total}, more than vision.max_corrupt ({self.limit}) allows; "
                "mend or remove them, or raise it"
            )
        if len(self.problems) <= _NAMED:
            logging.warning("skipped: %s %s", name, problem)

    def say_notes(self) -> None:
        """Tells what was done to pictures, once."""
        for note, count in sorted(self.notes.items()):
            done = pictures.NOTES[note]
            logging.warning("%d of %d pictures are %s", count, self.frames, done)
        self.notes, self.frames = Counter[str](), 0


def decoded(items: Items, index: int, side: int, vision: VisionConfig) -> Clip:
    """Decodes a picture or clip to squares.

    Args:
      items: where it is.
      index: of it.
      side: of the squares, pixels.
      vision: `channels` and `crop`; with `size` 0 frames have to be of that size
        already.

    Raises:
      Corrupt: if it cannot be decoded.
      UserError: if it is of another size than it has to be.
    """
    try:
        seconds, images = items.read(index)
        squares, notes = [], Counter[str]()
        for image in images:
            if not vision.size and image.size != (side, side):
                raise UserError(
                    f"{items.names[index]} has {image.width} x {image.height} pixels, "
                    f"but the first picture {side} x {side}; set vision.size to what "
                    "all are to be made"
                )
            flat, done = pictures.flattened(image, vision.channels)
            squares.append(pictures.squared(flat, side, vision.crop))
            notes.update(done)
    except OSError as error:
        raise Corrupt(f"cannot be read ({error.strerror or error})") from error
    if not squares:
        raise Corrupt("has no frames")
    return Clip(np.stack(squares), seconds, notes)


def side_of(items: Items, vision: VisionConfig) -> int:
    """Pixels of a side: `vision.size`, or the first readable picture's.

    Raises:
      UserError: if that picture is not square, or none can be read.
    """
    if vision.size:
        return vision.size
    for index in range(len(items)):
        try:
            image = next(items.read(index).images)
        except (Corrupt, OSError, StopIteration):
            continue  # it is listed when it is its turn
        if image.width != image.height:
            raise UserError(
                f"{items.names[index]} has {image.width} x {image.height} pixels, "
                "which is not square; set vision.size to what all are to be made"
            )
        return image.width
    raise UserError(
        f"data.path: none of {len(items)} files can be read, such as {items.names[0]}; "
        "replace them"
    )


def read_all(
    items: Items,
    chosen: Iterable[int],
    side: int,
    vision: VisionConfig,
    skipped: Skipped,
    bar: tqdm,
) -> Iterator[tuple[int, Clip]]:
    """Decodes several; what cannot be is skipped.

    Args:
      items: where they are.
      chosen: which of them.
      side: of the squares, pixels.
      vision: see `decoded`.
      skipped: takes note of what cannot be used, or not as it is.
      bar: moves on by one for each.

    Yields:
      Index and clip of each that can be used.

    Raises:
      UserError: if too many cannot.
    """

    def attempt(index: int) -> tuple[int, Clip | Corrupt]:
        try:
            return index, decoded(items, index, side, vision)
        except Corrupt as error:
            return index, error

    for index, clip in _ahead(attempt, chosen, items.threads):
        if isinstance(clip, Corrupt):
            skipped.add(items.names[index], str(clip))
        else:
            skipped.notes.update(clip.notes)
            skipped.frames += len(clip.pixels)
            yield index, clip
        bar.update()


def _ahead(
    function: Callable[[int], Result], numbers: Iterable[int], threads: int
) -> Iterator[Result]:
    """Results in order; threads work on those to come. Pillow leaves the lock free."""
    threads = min(threads, os.cpu_count() or 1)
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for number in numbers:
            waiting.append(pool.submit(function, number))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
