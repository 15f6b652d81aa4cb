"""Captions of pictures: JSON lines, and numbers made of them.

    {"file": "cat.png", "caption": "a cat"}
    {"file": "dog.jpg", "captions": ["a dog", "a brown dog runs"]}

A file is named as in its folder or archive, or by its last part alone. Where a
`data.path` has no pictures beside such a file, those it names are read from its folder.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import os
import posixpath
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from ebt_jax.data.encoding import in_batches
from ebt_jax.data.files import File
from ebt_jax.data.vision_config import VisionConfig
from ebt_jax.errors import UserError

Encode = Callable[[Sequence[str]], np.ndarray]  # to float32 [texts, condition_size]

SUFFIXES = (".jsonl", ".jsonl.gz")
_BATCH = 16  # captions that CLIP takes at a time
_PIECE = 3  # letters of a piece of a word


def read(texts: Sequence[File]) -> dict[str, tuple[str, ...]]:
    """The captions of each file that is named.

    Raises:
      UserError: for a line that is not as above, naming it.
    """
    told: dict[str, tuple[str, ...]] = {}
    for text in texts:
        for number, line in enumerate(_content(text).splitlines(), 1):
            if line.strip():
                file, added = _line(line, f"{text.path}, line {number}")
                told[file] = (*told.get(file, ()), *added)
    return told


def beside(texts: Sequence[File], told: dict[str, tuple[str, ...]]) -> list[File]:
    """The named files that lie in the folder of their captions, sorted by name."""
    folders = dict.fromkeys(os.path.dirname(text.path) for text in texts)
    found = [
        File(name, os.path.join(folder, name))
        for name in sorted(told)
        for folder in folders
        if os.path.isfile(os.path.join(folder, name))
    ]
    if texts and not found:
        raise UserError(
            f"data.path: {texts[0].path} has captions, but none of the pictures that "
            "it names lies beside it; name the pictures too, as in "
            "data.path=images.tar.gz,captions.jsonl"
        )
    return found


def match(
    told: dict[str, tuple[str, ...]], names: Sequence[str]
) -> tuple[list[tuple[str, ...]], list[str]]:
    """Brings captions to their pictures.

    Args:
      told: see `read`.
      names: of the pictures.

    Returns:
      The captions of each picture, of some perhaps none, and the named files that are
      not there.
    """
    bases = Counter(posixpath.basename(name) for name in names)
    keys = [
        name
        if name in told or bases[posixpath.basename(name)] > 1
        else posixpath.basename(name)
        for name in names
    ]
    present = set(keys)
    strays = [file for file in told if file not in present]
    return [told[key] if key in told else () for key in keys], strays


def encoder(vision: VisionConfig) -> Encode:
    """What makes numbers of captions; weights are read when the first is encoded.

    Args:
      vision: `caption_encoder` and what belongs to it. Of CLIP it is the features of
        the token which ends the text.
    """
    if vision.caption_encoder == "hashed":
        return functools.partial(hashed, features=vision.caption_features)
    opened = functools.cache(lambda: _clip(vision.caption_path))
    return lambda texts: opened()(texts)


def _clip(path: str) -> Encode:
    from ebt_jax.models.encoders.clip_bpe import load_clip_bpe
    from ebt_jax.models.encoders.clip_text import load_clip_text
    from ebt_jax.models.encoders.weights import compiled

    clip = load_clip_text(path)
    tokenizer = load_clip_bpe(os.path.dirname(os.path.abspath(path)))
    if len(tokenizer.ids) != clip.config.vocab:
        raise UserError(
            f"vision.caption_path: {path} has {clip.config.vocab} tokens, but the "
            f"vocabulary beside it {len(tokenizer.ids)}; take both of one model"
        )
    features = compiled(clip.encode, clip.params)

    def encode(texts: Sequence[str]) -> np.ndarray:
        tokens = tokenizer.batch(texts, clip.config.context)
        return in_batches(lambda rows: features(rows).pooled, _BATCH, tokens)

    return encode


def encode_all(encode: Encode, captions: Sequence[tuple[str, ...]]) -> list[np.ndarray]:
    """The captions of each picture, float32 `[captions, condition_size]`."""
    if not captions:
        return []
    encoded = encode([text for texts in captions for text in texts])
    ends = np.cumsum([len(texts) for texts in captions])
    return np.split(encoded, ends[:-1])


def hashed(texts: Sequence[str], features: int) -> np.ndarray:
    """Words and pieces of words, counted under hashes: equal texts, equal numbers.

    Every word adds +1 or -1 to one of the numbers; its pieces of three letters weigh as
    much together, so "smiling" and "smile" are alike. The sum is divided by its norm.

    Args:
      texts: captions.
      features: numbers of each.

    Returns:
      float32 `[texts, features]`; 0 for a caption without a word.
    """
    table = np.zeros((len(texts), features), np.float32)
    for row, text in zip(table, texts, strict=True):
        for word in re.findall(r"\w+", text.casefold()):
            framed = f"<{word}>"
            pieces = [framed[i : i + _PIECE] for i in range(len(framed) - _PIECE + 1)]
            _add(row, word, 1.0)
            for piece in pieces:
                _add(row, piece, len(pieces) ** -0.5)
    norms = np.linalg.norm(table, axis=1, keepdims=True)
    return table / np.where(norms > 0, norms, 1)


def _add(row: np.ndarray, part: str, weight: float) -> None:
    """Adds a weight; its place and its sign are those of the part's hash."""
    digest = hashlib.blake2b(part.encode(), digest_size=9).digest()
    place = int.from_bytes(digest[:8], "little") % len(row)
    row[place] += weight if digest[8] & 1 else -weight


def _content(text: File) -> str:
    try:
        content = text.read()
        if text.name.lower().endswith(".gz"):
            content = gzip.decompress(content)
        return content.decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(
            f"data.path: the captions {text.path} cannot be read ({error}); replace "
            "the file"
        ) from error


def _line(line: str, where: str) -> tuple[str, tuple[str, ...]]:
    """File and captions of a line."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(
            f"data.path: {where} is not JSON ({error}); mend the captions"
        ) from error
    if isinstance(record, dict) and "file" in record:
        found = record["captions"] if "captions" in record else []
        found = [record["caption"]] if "caption" in record else found
        if isinstance(found, list) and all(isinstance(text, str) for text in found):
            return str(record["file"]), tuple(text for text in found if text.strip())
    raise UserError(
        f"data.path: {where} is no caption; a line has to be such as "
        '{"file": "cat.png", "caption": "a cat"}'
    )
