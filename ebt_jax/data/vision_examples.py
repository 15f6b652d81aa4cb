"""Examples of pictures and clips, one at a time, as batches are made of.

An example of evaluation is the same each time (`examples[index]`): a clip's middle, a
picture's first caption. One of training depends on seed, epoch and index besides
(`examples.draw`): where in its clip it begins, which caption it has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast

import grain
import numpy as np

from ebt_jax.data.pictures import to_floats

Example = dict[str, np.ndarray]


class Encoded(NamedTuple):
    """A picture or a clip as a model sees it.

    Attributes:
      frames: float32, or uint8 where it sees pixels, `[frames, *shape]`.
      conditions: its captions, float32 `[captions, condition_size]`; None without.
    """

    frames: np.ndarray
    conditions: np.ndarray | None


class EncodedItems(Protocol):
    """Pictures or clips in memory or on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Encoded: ...


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Some of several pictures or clips.

    Attributes:
      items: all of them.
      kept: which.
    """

    items: EncodedItems
    kept: Sequence[int]

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> Encoded:
        """One of those that are kept."""
        return self.items[self.kept[index]]


class Examples(Protocol):
    """Examples of a split."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """The example of evaluation."""
        ...

    def draw(self, index: int, rng: np.random.Generator) -> Example:
        """An example of training."""
        ...


@dataclasses.dataclass(frozen=True)
class ImageExamples:
    """Pictures.

    Each is `image` float32 `[side, side, channels]`, `weights` 1, `index`, and, where
    there are any, `label` int32 and `caption` float32 `[condition_size]`.

    Attributes:
      pictures: of one frame each.
      labels: int32 `[pictures]`; None without.
    """

    pictures: EncodedItems
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Example:
        """A picture with its first caption."""
        return self._example(index, None)

    def draw(self, index: int, rng: np.random.Generator) -> Example:
        """A picture with any one of its captions."""
        return self._example(index, rng)

    def _example(self, index: int, rng: np.random.Generator | None) -> Example:
        picture = self.pictures[index]
        example = {
            "image": _floats(picture.frames[0]),
            "weights": np.ones((), np.float32),
            "index": np.array(index, np.int32),
        }
        if self.labels is not None:
            example["label"] = self.labels[index]
        if picture.conditions is not None:
            chosen = 0 if rng is None else int(rng.integers(len(picture.conditions)))
            example["caption"] = picture.conditions[chosen]
        return example


@dataclasses.dataclass(frozen=True)
class ClipExamples:
    """Clips, cut to the frames of an example.

    Each is `frames` and `targets` float32 `[context, frame_size]`, frames that follow
    each other and the frame after each, `weights` float32 `[context]`, all 1, and
    `index`.

    Attributes:
      clips: whole.
      firsts: the first frame of each that may be used, int64 `[clips]`.
      stops: the frame after the last, int64 `[clips]`.
      strides: frames from one of an example to the next, `[clips]`.
      context: frames that are given.
    """

    clips: EncodedItems
    firsts: np.ndarray
    stops: np.ndarray
    strides: np.ndarray
    context: int

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Example:
        """The middle of a clip."""
        return self._example(index, None)

    def draw(self, index: int, rng: np.random.Generator) -> Example:
        """A clip from any of its frames on."""
        return self._example(index, rng)

    def _example(self, index: int, rng: np.random.Generator | None) -> Example:
        steps = steps_of(self.context, self.strides[index])
        room = int(self.stops[index] - self.firsts[index] - steps[-1])
        start = room // 2 if rng is None else int(rng.integers(room))
        chosen = self.clips[index].frames[self.firsts[index] + start + steps]
        # Channel after channel, as published models of VAE latents were trained.
        frames = np.moveaxis(_floats(chosen), -1, 1).reshape(self.context + 1, -1)
        return {
            "frames": frames[:-1],
            "targets": frames[1:],
            "weights": np.ones(self.context, np.float32),
            "index": np.array(index, np.int32),
        }


def steps_of(context: int, stride: float) -> np.ndarray:
    """Which frames, from the first of an example, it has: int64 `[context + 1]`."""
    return np.round(stride * np.arange(context + 1)).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class InOrder:
    """Examples of training, one epoch after the other, as Grain wants a source.

    Attributes:
      examples: of the split.
      order: which of them comes when.
      seed: of what is drawn.
    """

    examples: Examples
    order: grain.MapDataset
    seed: int

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> Example:
        index = int(cast(int, self.order[place]))
        epoch = place // len(self.examples)
        rng = np.random.default_rng([self.seed, epoch, index])
        return self.examples.draw(index, rng)


def _floats(frames: np.ndarray) -> np.ndarray:
    return to_floats(frames) if frames.dtype == np.uint8 else frames
