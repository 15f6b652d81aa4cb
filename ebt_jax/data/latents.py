"""Pictures and clips encoded once (`ebt prepare`), as ArrayRecord files.

    DIR/latents.json                what is encoded, and how; see `Index`
    DIR/encoder.npz                 what was fitted, of principal components
    DIR/part-00000.array_record     a record for each picture or clip of the part
    DIR/part-00000.json             which those are, see `Part`

A record is a picture's or clip's frames, little-endian, and its captions' numbers,
float32. A part is there when its .json is: so several processes can write parts, in any
order, and a process that was stopped goes on with those that are missing.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from typing import Any

import grain
import numpy as np

from ebt_jax.data import captions, encoding
from ebt_jax.data.items import Skipped
from ebt_jax.data.shards import Records
from ebt_jax.data.vision_config import VisionConfig
from ebt_jax.data.vision_examples import Encoded
from ebt_jax.data.vision_split import Origin, Split
from ebt_jax.errors import UserError

INDEX = "latents.json"
ENCODER = "encoder.npz"
FORMAT = "ebt-jax latents"
VERSION = 1
# Settings that latents depend on; others are those of whoever reads them.
_MADE_WITH = ("channels", "crop", "encoder")
_OF_ENCODER = {
    "none": (),
    "pca": ("encoder_features",),
    "vae": ("encoder_scale",),
    "dinov2": ("encoder_size",),
}
_OF_CAPTIONS = {
    "hashed": ("caption_encoder", "caption_features"),
    "clip": ("caption_encoder",),
}


@dataclasses.dataclass(frozen=True)
class Index:
    """What a folder of latents holds."""

    format: str  # FORMAT
    version: int  # VERSION
    space: str  # image | video
    path: str  # the data.path they were made of
    files: int  # pictures or clips, corrupt ones included
    part_files: int  # of each part; the last has what is left
    side: int  # of their squares, pixels
    shape: list[int]  # of an encoded frame
    dtype: str  # of its numbers, as NumPy names it
    condition_size: int  # numbers in an encoded caption; 0: there are none
    classes: list[str]  # names, in order
    strays: list[str]  # files that captions name, but that are not there
    settings: dict[str, Any]  # of vision, that they depend on

    @property
    def parts(self) -> int:
        """How many there are when all are."""
        return -(-self.files // self.part_files)


@dataclasses.dataclass(frozen=True)
class Part:
    """What a part holds, a list entry for each of its records."""

    numbers: list[int]  # of the pictures or clips among all
    names: list[str]
    frames: list[int]  # how many each has
    seconds: list[float]  # from one frame to the next; 0 for a picture
    classes: list[str]  # empty where there are none
    captions: list[list[str]]  # empty where there are none
    skipped: list[list[str]]  # name and reason of those that could not be used


@dataclasses.dataclass(frozen=True)
class Stored:
    """Latents on disk, read when they are needed.

    Attributes:
      records: of the folder.
      chosen: which of them.
      shape: of an encoded frame.
      dtype: of its numbers.
      frames: how many each of the chosen has.
      condition_size: numbers in an encoded caption.
    """

    records: Records
    chosen: np.ndarray
    shape: tuple[int, ...]
    dtype: str
    frames: np.ndarray
    condition_size: int

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Encoded:
        """A picture or clip."""
        record = self.records[int(self.chosen[index])]
        count = int(self.frames[index]) * math.prod(self.shape)
        frames = np.frombuffer(record, self.dtype, count)
        frames = frames.reshape(-1, *self.shape)
        if not self.condition_size:
            return Encoded(frames, None)
        conditions = np.frombuffer(record, "<f4", offset=frames.nbytes)
        return Encoded(frames, conditions.reshape(-1, self.condition_size))


def is_prepared(path: str) -> bool:
    """Whether a `data.path` names a folder of latents."""
    return os.path.isfile(os.path.join(os.path.expanduser(path), INDEX))


def part_path(folder: str, part: int, suffix: str) -> str:
    """A part's file of records (".array_record") or of what they are (".json")."""
    return os.path.join(folder, f"part-{part:05}{suffix}")


def open_folder(
    path: str, vision: VisionConfig, space: str, base: Origin | None
) -> Origin:
    """What a folder of latents holds.

    Args:
      path: of the folder.
      vision: has to be what they were made with, as far as they depend on it.
      space: "image" or "video".
      base: what they have to be encoded like; None: nothing.

    Raises:
      UserError: for a folder that is not complete or damaged, and for latents of
        another kind.
    """
    folder = os.path.expanduser(path)
    index = read_index(folder)
    _check_settings(folder, index, vision, space)
    table = [_read_part(folder, index, part) for part in range(index.parts)]
    encoder = _encoder(folder, index, vision)
    if base is not None and not _alike(encoder.params, base.encoder.params):
        raise UserError(
            f"data.held_out_path: the latents in {folder} were made by an encoder that "
            "was fitted to other pictures than data.path's; prepare both with the same "
            "one, such as vae"
        )
    skipped = Skipped(index.files, vision.max_corrupt)
    for name, problem in [
        *((stray, "has a caption, but is not there") for stray in index.strays),
        *((name, problem) for part in table for name, problem in part.skipped),
    ]:
        skipped.add(name, problem)
    return Origin(
        files=index.files,
        side=index.side,
        encoder=encoder,
        classes=tuple(index.classes),
        encode_captions=captions.encoder(vision),
        skipped=skipped,
        read=functools.partial(_read, folder, index, table),
    )


def read_index(folder: str) -> Index:
    """The index of a folder of latents.

    Raises:
      UserError: if it is not one, or of another version.
    """
    path = os.path.join(folder, INDEX)
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
        if (values["format"], values["version"]) == (FORMAT, VERSION):
            return Index(**values)
        problem = f"format {values['format']!r}, version {values['version']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise UserError(
        f"data.path: {path} is not an index of latents of version {VERSION} "
        f"({problem}); prepare them again"
    )


def settings(vision: VisionConfig, space: str, captioned: bool) -> dict[str, Any]:
    """What latents depend on, by the name of the setting."""
    names = [*_MADE_WITH, *_OF_ENCODER[vision.encoder]]
    if vision.encoder == "pca" and space == "image":
        names.append("encoder_patch")
    if captioned:
        names += _OF_CAPTIONS[vision.caption_encoder]
    return {name: getattr(vision, name) for name in names}


def _check_settings(
    folder: str, index: Index, vision: VisionConfig, space: str
) -> None:
    if index.space != space:
        raise UserError(
            f"data.path: {folder} holds latents of {index.space}, but model.space is "
            f"{space!r}; set it to {index.space!r}, or name others"
        )
    made = index.settings | {"size": index.side}
    given = settings(vision, space, bool(index.condition_size))
    given["size"] = vision.size or index.side
    for name, value in given.items():
        # What an encoder depends on comes after the encoder's own name.
        if made[name] != value:
            raise UserError(
                f"data.path: the latents in {folder} were made with vision.{name} "
                f"{made[name]!r}, but it is {value!r}; set it to that, or prepare them "
                "again"
            )


def _encoder(folder: str, index: Index, vision: VisionConfig) -> encoding.Encoder:
    if vision.encoder != "pca":
        whole = index.space == "video"
        return encoding.make(vision, index.side, whole, lambda: np.zeros(0, np.uint8))
    path = os.path.join(folder, ENCODER)
    try:
        with np.load(path) as arrays:
            return encoding.principal(dict(arrays), index.side)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"data.path: {path} cannot be read ({error}); prepare the latents again"
        ) from error


def _read_part(folder: str, index: Index, part: int) -> Part:
    path = part_path(folder, part, ".json")
    if not os.path.isfile(path):
        there = sum(
            os.path.isfile(part_path(folder, number, ".json"))
            for number in range(index.parts)
        )
        raise UserError(
            f"data.path: {folder} has {there} of its {index.parts} parts; give the "
            "same `ebt prepare` again, it goes on with those that are missing"
        )
    try:
        with open(path, encoding="utf-8") as file:
            return Part(**json.load(file))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"data.path: {path} is damaged ({error}); remove it and give the same "
            "`ebt prepare` again"
        ) from error


def _read(folder: str, index: Index, table: list[Part], chosen: np.ndarray) -> Split:
    """The files of those numbers."""
    numbers = np.array([n for part in table for n in part.numbers], np.int64)
    kept = np.flatnonzero(np.isin(numbers, chosen))
    frames = np.array([n for part in table for n in part.frames], np.int64)[kept]
    stored = Stored(
        _open_parts(folder, table),
        kept,
        tuple(index.shape),
        index.dtype,
        frames,
        index.condition_size,
    )
    names = [name for part in table for name in part.names]
    classes = [name for part in table for name in part.classes]
    told = [tuple(texts) for part in table for texts in part.captions]
    seconds = np.array([s for part in table for s in part.seconds])
    return Split(
        names=[names[record] for record in kept],
        encoded=stored,
        lengths=frames,
        seconds=seconds[kept],
        classes=[classes[record] for record in kept] if classes else [],
        captions=[told[record] for record in kept] if told else [],
    )


def _open_parts(folder: str, table: list[Part]) -> Records:
    paths, sources = [], []
    for number, part in enumerate(table):
        if not part.numbers:
            continue  # nothing in it could be used
        path = part_path(folder, number, ".array_record")
        try:
            source: Any = grain.sources.ArrayRecordDataSource(path)
            intact = len(source) == len(part.numbers)
        except Exception:  # the reader raises plain RuntimeError and others
            source, intact = None, False
        if not intact:
            raise UserError(
                f"data.path: {path} is missing or damaged; remove its .json and give "
                "the same `ebt prepare` again"
            )
        paths.append(path)
        sources.append(source)
    ends = np.cumsum([len(source) for source in sources], dtype=np.int64)
    return Records(paths, sources, ends)


def _alike(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> bool:
    return ours.keys() == theirs.keys() and all(
        np.array_equal(ours[name], theirs[name]) for name in ours
    )
