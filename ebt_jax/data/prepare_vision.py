"""Encodes pictures or videos once, into latents (`ebt_jax.data.latents`)."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from ebt_jax.data import captions, corpus, encoding, items, latents, vision_split
from ebt_jax.data.config import DataConfig
from ebt_jax.data.items import Items, Skipped
from ebt_jax.data.latents import Index, Part
from ebt_jax.data.vision_config import VisionConfig
from ebt_jax.errors import StorageError, UserError

PART_FILES = {"image": 1024, "video": 16}


def prepare_vision(
    data: DataConfig,
    vision: VisionConfig,
    space: str,
    output: str,
    *,
    process_index: int = 0,
    process_count: int = 1,
    part_files: int = 0,
    progress: bool = True,
) -> bool:
    """Encodes `data.path` into the folder `output`, part by part.

    Parts that are there already stay; so the same call goes on where another was
    stopped, and several processes share the work: process i of n makes the parts
    i, i + n, ... Clips keep all their frames.

    Args:
      data: `path`; components are fitted to what `held_out` does not hold out of it.
      vision: how to read and to encode.
      space: "image" or "video".
      output: a folder, made if it is not there.
      process_index: which of the processes this is.
      process_count: how many share the work.
      part_files: pictures or clips in a part; 0: 1,024 or 16.
      progress: show a bar with the remaining time on stderr.

    Returns:
      Whether all parts of all processes are there now.

    Raises:
      StorageError: if storage is full; what is there stays.
      UserError: if `output` is something else, was begun with other settings or cannot
        be written, or what is read cannot be.
    """
    if not 0 <= process_index < process_count:
        raise UserError(
            f"process_index is {process_index} of {process_count} processes, but has "
            "to be between 0 and their number - 1"
        )
    if latents.is_prepared(data.path):
        raise UserError(f"data.path: {data.path} holds latents already; use it")
    output = os.path.abspath(os.path.expanduser(output))
    if not latents.is_prepared(output) and _occupied(output):
        raise UserError(f"{output} exists and holds no latents; name a new folder")
    found = vision_split.find(data, vision, space)
    side = items.side_of(found, vision)
    try:
        os.makedirs(output, exist_ok=True)
        encoder = _kept_encoder(data, vision, space, found, side, output)
        tell = captions.encoder(vision)
        told = tell(["a"]).shape[-1] if found.captions else 0
        shape = list(encoder.shape)
        index = _index(data, vision, space, found, side, shape, told, part_files)
        _begin(output, index)
        mine = range(process_index, index.parts, process_count)
        _write_parts(output, index, found, encoder, tell, vision, mine, progress)
    except OSError as error:
        raise UserError(
            f"{output} cannot be written ({error.strerror or error}); choose another "
            "folder"
        ) from error
    return not _missing(output, range(index.parts))


def _kept_encoder(
    data: DataConfig,
    vision: VisionConfig,
    space: str,
    found: Items,
    side: int,
    output: str,
) -> encoding.Encoder:
    """The encoder; what is fitted is fitted once, by whichever process is first."""
    path = os.path.join(output, latents.ENCODER)
    if not os.path.isfile(path):
        encoder = vision_split.encoder_of(data, vision, space, found, side)
        if not encoder.params:
            return encoder
        partial = f"{path}.partial-{os.getpid()}"
        with open(partial, "wb") as file:
            np.savez(file, allow_pickle=False, **encoder.params)
        os.rename(partial, path)
    with np.load(path) as arrays:
        return encoding.principal(dict(arrays), side)


def _index(
    data: DataConfig,
    vision: VisionConfig,
    space: str,
    found: Items,
    side: int,
    shape: list[int],
    condition_size: int,
    part_files: int,
) -> Index:
    return Index(
        format=latents.FORMAT,
        version=latents.VERSION,
        space=space,
        path=data.path,
        files=len(found),
        part_files=part_files or PART_FILES[space],
        side=side,
        shape=shape,
        dtype="|u1" if vision.encoder == "none" else "<f4",
        condition_size=condition_size,
        classes=vision_split.class_names(found),
        strays=list(found.strays),
        settings=latents.settings(vision, space, condition_size > 0),
    )


def _begin(output: str, index: Index) -> None:
    """Writes the index, or compares it with the one that is there."""
    if not latents.is_prepared(output):
        _write_json(os.path.join(output, latents.INDEX), index)
        return
    there = latents.read_index(output)
    for field in dataclasses.fields(Index):
        old, new = getattr(there, field.name), getattr(index, field.name)
        if old != new:
            raise UserError(
                f"{output} was begun with {field.name} {_short(old)}, but now it is "
                f"{_short(new)}; give the same settings, or name a new folder"
            )


def _write_parts(
    output: str,
    index: Index,
    found: Items,
    encoder: encoding.Encoder,
    tell: captions.Encode,
    vision: VisionConfig,
    mine: range,
    progress: bool,
) -> None:
    left = _missing(output, mine)
    total = sum(len(_members(index, part)) for part in mine)
    to_do = sum(len(_members(index, part)) for part in left)
    skipped = Skipped(index.files, vision.max_corrupt)
    with corpus.progress_bar(
        "encoding", total, progress, unit="", done=total - to_do
    ) as bar:
        for part in left:
            _write_part(output, part, index, found, encoder, tell, vision, skipped, bar)
    skipped.say_notes()


def _write_part(
    output: str,
    part: int,
    index: Index,
    found: Items,
    encoder: encoding.Encoder,
    tell: captions.Encode,
    vision: VisionConfig,
    skipped: Skipped,
    bar: tqdm,
) -> None:
    before = len(skipped.problems)
    chosen = _members(index, part)
    texts = [found.captions[number] for number in chosen] if found.captions else []
    told = captions.encode_all(tell, texts)
    path = latents.part_path(output, part, ".array_record")
    for left in glob.glob(f"{glob.escape(path)}.partial-*"):
        os.remove(left)  # of a process that was stopped
    partial = f"{path}.partial-{os.getpid()}"
    done = Part([], [], [], [], [], [], [])
    # One record per group, so that a record can be read alone.
    writer = ArrayRecordWriter(partial, "group_size:1")
    decoded = items.read_all(found, chosen, index.side, vision, skipped, bar)
    for number, seconds, frames in encoding.encode_items(encoder, decoded):
        record = frames.astype(index.dtype).tobytes()
        if told:
            record += told[number - chosen.start].astype("<f4").tobytes()
            done.captions.append(list(texts[number - chosen.start]))
        if found.classes:
            done.classes.append(found.classes[number])
        with _storage_explained(partial):
            writer.write(record)
        done.numbers.append(number)
        done.names.append(found.names[number])
        done.frames.append(len(frames))
        done.seconds.append(seconds)
    with _storage_explained(partial):
        writer.close()
    os.rename(partial, path)
    done.skipped.extend(
        [list(problem) for problem in skipped.problems.items()][before:]
    )
    _write_json(latents.part_path(output, part, ".json"), done)


@contextlib.contextmanager
def _storage_explained(partial: str) -> Iterator[None]:
    """Removes a file that cannot be written, so that there is room, and says so."""
    try:
        yield
    except RuntimeError as error:  # what the writer raises
        with contextlib.suppress(OSError):
            os.remove(partial)
        reason = " ".join(str(error).split())
        raise StorageError(
            f"{partial} cannot be written ({reason}); make room and give the same "
            "command again, it goes on with what is missing"
        ) from error


def _members(index: Index, part: int) -> range:
    """The files of a part."""
    first = part * index.part_files
    return range(first, min(first + index.part_files, index.files))


def _missing(output: str, parts: range) -> list[int]:
    """Those that are not there."""
    paths = [(part, latents.part_path(output, part, ".json")) for part in parts]
    return [part for part, path in paths if not os.path.isfile(path)]


def _occupied(folder: str) -> bool:
    """Whether something else than a beginning of latents lies there."""
    if not os.path.isdir(folder):
        return os.path.exists(folder)
    return any(not name.startswith(latents.ENCODER) for name in os.listdir(folder))


def _write_json(path: str, values: Any) -> None:
    partial = f"{path}.partial-{os.getpid()}"
    with open(partial, "w", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(values), indent=1) + "\n")
    os.rename(partial, path)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
