"""Where pictures come from: whatever `data.path` is.

================================ ===================================================
data.path                        pictures
================================ ===================================================
digits                           scikit-learn's 1,797 handwritten digits, 8 x 8, grey
photographs                      scikit-learn's two photographs, cut into squares
FOLDER, .tar, .tar.gz, .zip      all in it, to its ground; also several, or a glob
x-images-idx3-ubyte[.gz]         MNIST's format, with x-labels-idx1-ubyte[.gz] beside
                                 it; also a folder of such files
tfds:NAME[:SPLIT]                the feature `image`; labels in `label`
FILE.jsonl[.gz]                  those it has captions of (`ebt_jax.data.captions`)
================================ ===================================================

Several are separated by commas. Classes are the folders that pictures lie in, if those
are several. A folder of latents (`ebt prepare`) is read by `ebt_jax.data.latents`.
"""

from __future__ import annotations

import gzip
import os
import posixpath
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from ebt_jax.data import captions, defaults, files, pictures, sources
from ebt_jax.data.files import File
from ebt_jax.data.items import Frames, Items, joined
from ebt_jax.data.vision_config import VisionConfig
from ebt_jax.errors import UserError

_IDX = ("-images-idx3-ubyte", "-images-idx3-ubyte.gz")
_IDX_IMAGES, _IDX_LABELS = 0x00000803, 0x00000801  # what such files begin with


def find(path: str, vision: VisionConfig) -> Items:
    """The pictures of a `data.path`.

    Raises:
      UserError: for whatever cannot be found, is of no known kind, or damaged.
    """
    parts, listed = [], []
    for part in filter(None, map(str.strip, path.split(","))):
        if part == "pydoc":  # the default
            continue
        elif part == "digits":
            parts.append(defaults.digits())
        elif part == "photographs":
            parts.append(defaults.photographs(vision.size))
        elif part.startswith("tfds:"):
            parts.append(_tfds(part))
        elif idx := _idx_files(os.path.expanduser(part)):
            parts += map(_idx, idx)
        else:
            listed += files.find(part, (*pictures.SUFFIXES, *captions.SUFFIXES))
    if listed:
        parts.append(_files(listed))
    if not parts:
        raise UserError(
            f"data.path is {path!r}; name pictures, such as a folder, or 'digits'"
        )
    return joined(parts)


def _files(listed: Sequence[File]) -> Items:
    """Pictures, and their captions if there are files of them."""
    texts = [file for file in listed if file.name.lower().endswith(captions.SUFFIXES)]
    images = [file for file in listed if file not in texts]
    told = captions.read(texts)
    if not images:
        images = captions.beside(texts, told)
    names = [image.name for image in images]
    matched, strays = captions.match(told, names) if texts else ([], [])

    def read(index: int) -> Frames:
        content = images[index].read()
        if texts and not matched[index]:
            raise pictures.Corrupt("has no caption")
        return Frames(0.0, iter([pictures.opened(content)]))

    return Items(names, read, classes(names), matched, strays)


def classes(names: Sequence[str]) -> list[str]:
    """The folder of each, without what all have in common; empty if that is all."""
    folders = [posixpath.dirname(name) for name in names]
    if len(set(folders)) < 2:
        return []
    common = posixpath.commonpath(folders) if all(folders) else ""
    return [posixpath.relpath(folder or ".", common or ".") for folder in folders]


def _idx_files(path: str) -> list[str]:
    """The files of IDX pictures that are or lie in a path."""
    if os.path.isdir(path):
        return [
            os.path.join(path, name)
            for name in sorted(os.listdir(path))
            if name.endswith(_IDX)
        ]
    return [path] if path.endswith(_IDX) else []


def _idx(path: str) -> Items:
    count, rows, columns, pixels = _idx_file(path, _IDX_IMAGES, 3)
    images = pixels.reshape(count, rows, columns)
    beside = path.replace("-images-idx3-", "-labels-idx1-")
    labels: list[str] = []
    if os.path.isfile(beside):
        number, found = _idx_file(beside, _IDX_LABELS, 1)
        if number != count:
            raise UserError(
                f"data.path: {path} has {count} pictures, but {beside} {number} "
                "labels; give files that belong together"
            )
        labels = [str(label) for label in found.tolist()]
    name = os.path.basename(path)
    names = [f"{name}, picture {number}" for number in range(count)]
    read = lambda index: Frames(0.0, iter([pictures.of_array(images[index])]))
    return Items(names, read, labels)


def _idx_file(path: str, magic: int, axes: int) -> tuple[Any, ...]:
    """The sizes that an IDX file declares, and its bytes."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"data.path: {path} cannot be read ({error}); replace it"
        ) from error
    head = 4 * (axes + 1)
    whole = content[:head] if len(content) >= head else b""
    numbers = [int(number) for number in np.frombuffer(whole, ">u4")]
    if not numbers or numbers[0] != magic:
        raise UserError(
            f"data.path: {path} is not an IDX file of {axes} axes of bytes; replace it"
        )
    values = np.frombuffer(content, np.uint8, offset=head)
    if len(values) != np.prod(numbers[1:]):
        raise UserError(
            f"data.path: {path} declares {np.prod(numbers[1:])} bytes, but has "
            f"{len(values)}; replace it"
        )
    return *numbers[1:], values


def _tfds(entry: str) -> Items:
    examples = sources.tfds_examples(entry)
    if not len(examples) or "image" not in examples[0]:
        known = sorted(examples[0]) if len(examples) else "no examples"
        raise UserError(
            f"data.path: {entry} has no feature 'image' ({known}); name a data set of "
            "pictures"
        )
    names = [f"{entry}, example {number}" for number in range(len(examples))]
    labels: list[str] = []
    if "label" in examples[0]:
        numbers = [int(examples[number]["label"]) for number in range(len(examples))]
        # A feature of classes has their names; one that is just a number has not.
        info: Any = examples
        called = getattr(info.dataset_info.features["label"], "names", None)
        labels = [called[number] if called else str(number) for number in numbers]

    def read(index: int) -> Frames:
        return Frames(0.0, iter([pictures.of_array(examples[index]["image"])]))

    return Items(names, read, labels)
