"""CLIP's byte-pair tokenizer, from the public files of its vocabulary.

    tokenizer = load_clip_bpe("bpe_simple_vocab_16e6.txt.gz")
    tokenizer.batch(["a pink flower"])    # int32 [1, 77]

Texts are normalised as Hugging Face's CLIPTokenizer does: composed (NFC), white space
collapsed, lower case. OpenAI's code repairs mojibake and HTML entities besides.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import pathlib
import re
import unicodedata
import zlib
from collections.abc import Iterable

import numpy as np

from ebt_jax.errors import UserError

START, END = "<|startoftext|>", "<|endoftext|>"

_MERGES = 49152 - 256 - 2  # of OpenAI's file, which goes on after those in use
_OPENAI_FILE = "bpe_simple_vocab_16e6.txt.gz"
# What is a word whatever surrounds it; then words by the kinds of their characters.
_FIXED = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d")
_RUNS = re.compile(r"L+|N|O+")
_SPACE = re.compile(r"[^\S\x1c-\x1f]+")  # Unicode's White_Space


@dataclasses.dataclass(frozen=True)
class ClipBpe:
    """The tokenizer.

    Attributes:
      ids: tokens to their numbers.
      ranks: pairs of tokens to the order in which they are merged.
    """

    ids: dict[str, int]
    ranks: dict[tuple[str, str], int]
    _known: dict[str, tuple[int, ...]] = dataclasses.field(
        default_factory=dict, repr=False, compare=False
    )  # ids of the words met so far

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without the tokens that start and end it."""
        return [i for word in _words(_normalised(text)) for i in self._word(word)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        tokens = {number: token for token, number in self.ids.items()}
        letters = {letter: byte for byte, letter in _letters().items()}
        text = "".join(tokens[int(i)] for i in ids).replace("</w>", " ")
        read = bytes(letters[c] if c in letters else ord(" ") for c in text)
        return read.decode(errors="replace").strip()

    def batch(self, texts: Iterable[str], length: int = 77) -> np.ndarray:
        """Tokens of texts as CLIP's text encoder takes them.

        Args:
          texts: any.
          length: of a row; longer texts are cut.

        Returns:
          int32 `[batch, length]`: each row starts with START and ends with END, which
          pads it too.

        Raises:
          UserError: if the length leaves no room for a token.
        """
        if length < 3:
            raise UserError(
                f"texts cut to {length} tokens keep none between start and end; take "
                "at least 3"
            )
        texts = list(texts)
        rows = np.full((len(texts), length), self.ids[END], np.int32)
        for row, text in zip(rows, texts, strict=True):
            ids = [self.ids[START], *self.encode(text)][: length - 1]
            row[: len(ids)] = ids
        return rows

    def _word(self, word: str) -> tuple[int, ...]:
        if word in (START, END):
            return (self.ids[word],)
        if word not in self._known:
            letters = _letters()
            parts = [letters[byte] for byte in word.encode(errors="replace")]
            merged = self._merged((*parts[:-1], parts[-1] + "</w>"))
            self._known[word] = tuple(self.ids[part] for part in merged)
        return self._known[word]

    def _merged(self, parts: tuple[str, ...]) -> tuple[str, ...]:
        """Merges the pair of the lowest rank wherever it stands, as long as any is."""
        while len(parts) > 1:
            pairs = zip(parts, parts[1:], strict=False)
            best = min(pairs, key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                break
            merged, i = [], 0
            while i < len(parts):
                found = parts[i : i + 2] == best
                merged.append("".join(best) if found else parts[i])
                i += 2 if found else 1
            parts = tuple(merged)
        return parts


def load_clip_bpe(path: str) -> ClipBpe:
    """The tokenizer of a public vocabulary.

    Args:
      path: OpenAI's `bpe_simple_vocab_16e6.txt.gz`, Hugging Face's `merges.txt` with
        `vocab.json` beside it, or a folder that holds the one or the other.

    Raises:
      UserError: if there are no such files, or they do not hold such a vocabulary.
    """
    file = pathlib.Path(path).expanduser()
    if file.is_dir():
        choices = [file / _OPENAI_FILE, file / "merges.txt"]
        found = [choice for choice in choices if choice.is_file()]
        if not found:
            raise UserError(
                f"CLIP vocabulary: the folder {path!r} has neither {_OPENAI_FILE} nor "
                "merges.txt with vocab.json; fetch one of them"
            )
        file = found[0]
    if not file.is_file():
        raise UserError(
            f"CLIP vocabulary: there is no file {path!r}; give {_OPENAI_FILE}, or "
            "merges.txt with vocab.json beside it"
        )
    vocab = file.with_name("vocab.json")
    if file.name == "merges.txt" and not vocab.is_file():
        raise UserError(
            f"CLIP vocabulary: there is no vocab.json beside {str(file)!r}; both "
            "belong together"
        )
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as opened:
            lines = opened.read().decode().split("\n")[1:]  # after a line of comment
        merges = [tuple(line.split()) for line in lines[:_MERGES] if line.strip()]
        if file.name == "merges.txt":
            ids = json.loads(vocab.read_text(encoding="utf-8"))
        else:
            ids = _ids(merges)
        if any(len(pair) != 2 for pair in merges):
            raise ValueError("a line is not a pair of tokens")
        missing = {START, END, *map("".join, merges)} - set(ids)
        if missing:
            raise ValueError(f"no number for {min(missing)!r}")
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(
            f"CLIP vocabulary: {file} cannot be read ({error}); fetch it again"
        ) from error
    return ClipBpe(ids, {(a, b): rank for rank, (a, b) in enumerate(merges)})


def _ids(merges: list[tuple[str, ...]]) -> dict[str, int]:
    """Numbers in OpenAI's order: bytes, bytes that end a word, merges, specials."""
    letters = list(_letters().values())
    words = [letter + "</w>" for letter in letters]
    tokens = [*letters, *words, *map("".join, merges), START, END]
    return {token: number for number, token in enumerate(tokens)}


@functools.cache
def _letters() -> dict[int, str]:
    """A visible character for each byte: itself where it is one."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in visible]
    letters = {byte: chr(byte) for byte in visible}
    return letters | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _normalised(text: str) -> str:
    text = _SPACE.sub(" ", unicodedata.normalize("NFC", text))
    # By character: lower() of a whole text minds whether a sigma ends its word.
    return "".join(character.lower() for character in text)


def _words(text: str) -> Iterable[str]:
    """Letters, single numerals, and runs of anything else but spaces."""
    kinds = "".join(_kind(character) for character in text)
    at = 0
    while at < len(text):
        match = _FIXED.match(text, at) or _RUNS.match(kinds, at)
        if match is None:  # a space
            at += 1
            continue
        yield text[at : match.end()]
        at = match.end()


def _kind(character: str) -> str:
    if _SPACE.match(character):
        return " "
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "O"
