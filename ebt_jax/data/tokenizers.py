"""Tokenizers: text to integers and back.

`bytes` needs no file: 256 entries, one for each byte of UTF-8. Everything else is a
Hugging Face `tokenizer.json` (also .gz), read by the `tokenizers` library.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np

from ebt_jax.data.sources import optional_package
from ebt_jax.errors import UserError

# Names under which published tokenizers keep these tokens: the file does not say.
_END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")
_PAD_TOKENS = ("<|padding|>", "<pad>", "[PAD]", "<|pad|>")

_PIECE_CHARS = 1 << 16  # a longer document is encoded in pieces of about this length
_BATCH_CHARS = 1 << 22  # text handed to the library at once
_SEAM_CHARS = 256  # text on both sides of a cut that has to encode the same without it


class Tokenizer(Protocol):
    """What the rest of the system knows of a tokenizer.

    Attributes:
      name: as the user gave it.
      digest: equal for equal tokenizers, wherever their files lie.
      vocab_size: entries; ids are below it.
      pad_id: fills up sequences; never counted.
      eos_id: stands after each document, None if the tokenizer has no such token.
    """

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def eos_id(self) -> int | None: ...

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int32 `[tokens]`, no special tokens added."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        ...

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each token stands for, int32 `[vocab]`; special tokens 0.

        Exact where tokens are made of bytes (byte-level or with byte fallback) and the
        tokenizer does not normalise; otherwise the length of the token as it is spelt.
        """
        ...

    def encode_documents(
        self, documents: Iterable[bytes], on_done: Callable[[int], Any]
    ) -> Iterator[np.ndarray]:
        """Ids of each document, int32 `[tokens]`.

        Args:
          documents: UTF-8 texts.
          on_done: called with the number of bytes that have been encoded.
        """
        ...


def load(name: str) -> Tokenizer:
    """The tokenizer called `name`.

    Args:
      name: "bytes", or the path of a `tokenizer.json` or `tokenizer.json.gz`.

    Raises:
      UserError: if there is no such file, or it is not a tokenizer.
    """
    if name == "bytes":
        return ByteTokenizer()
    path = os.path.expanduser(name)
    if not os.path.isfile(path):
        raise UserError(
            f"data.tokenizer: there is no file {name!r}; give 'bytes' or the path of a "
            "tokenizer.json"
        )
    library = optional_package("tokenizers", f"data.tokenizer {name!r}")
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            content = file.read()
        tokenizer = library.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises plain Exception
        if not isinstance(error, OSError | EOFError | zlib.error | UnicodeDecodeError):
            assert type(error) is Exception, error
        raise UserError(
            f"data.tokenizer: {name} is not a tokenizer.json ({error}); give the file "
            "that the tokenizers library writes"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    digest = hashlib.sha256(content).hexdigest()
    return JsonTokenizer(name, digest, tokenizer, json.loads(content))


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """One token for each byte of UTF-8."""

    name: str = "bytes"
    digest: str = "bytes"
    vocab_size: int = 256
    pad_id: int = 0
    eos_id: int | None = None

    def encode(self, text: str) -> np.ndarray:
        """See `Tokenizer`."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer`."""
        return bytes(int(i) for i in ids).decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        """See `Tokenizer`."""
        return np.ones(256, np.int32)

    def encode_documents(
        self, documents: Iterable[bytes], on_done: Callable[[int], Any]
    ) -> Iterator[np.ndarray]:
        """See `Tokenizer`."""
        for text in documents:
            yield np.frombuffer(text, np.uint8).astype(np.int32)
            on_done(len(text))


@dataclasses.dataclass(frozen=True)
class JsonTokenizer:
    """A Hugging Face tokenizer.

    Attributes:
      name: path of its file.
      digest: SHA-256 of the file's content, decompressed.
      tokenizer: the library's object.
      spec: the file's content, parsed.
    """

    name: str
    digest: str
    tokenizer: Any
    spec: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        """Entries, added tokens included."""
        # Ids may have gaps, and every id has to be below the size.
        return 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values())

    @property
    def eos_id(self) -> int | None:
        """The first of the usual end tokens that there is."""
        return self._first_id(_END_TOKENS)

    @property
    def pad_id(self) -> int:
        """The first of the usual padding tokens that there is, else the end token."""
        pad = self._first_id(_PAD_TOKENS)
        return next(i for i in (pad, self.eos_id, 0) if i is not None)

    def encode(self, text: str) -> np.ndarray:
        """See `Tokenizer`."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return np.array(ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer`."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        """See `Tokenizer`."""
        added = self.tokenizer.get_added_tokens_decoder()
        byte_level = '"ByteLevel"' in json.dumps(self.spec["decoder"])
        sizes = np.zeros(self.vocab_size, np.int32)
        for token, i in self.tokenizer.get_vocab(with_added_tokens=True).items():
            if i in added:
                sizes[i] = 0 if added[i].special else len(token.encode())
            elif byte_level:  # one printable character stands for each byte
                sizes[i] = len(token)
            elif re.fullmatch("<0x[0-9A-F]{2}>", token):
                sizes[i] = 1
            else:
                sizes[i] = len(
                    token.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()
                )
        return sizes

    def encode_documents(
        self, documents: Iterable[bytes], on_done: Callable[[int], Any]
    ) -> Iterator[np.ndarray]:
        """See `Tokenizer`. Long documents are cut where it changes nothing."""
        pieces = (piece for text in documents for piece in self._pieces(text.decode()))
        parts = []
        for batch in _batches(pieces):
            texts = [text for text, _ in batch]
            encodings = self.tokenizer.encode_batch_fast(
                texts, add_special_tokens=False
            )
            for (text, is_last), encoding in zip(batch, encodings, strict=True):
                parts.append(np.array(encoding.ids, np.int32))
                on_done(len(text.encode()))
                if is_last:
                    yield np.concatenate(parts)
                    parts = []

    def _first_id(self, names: tuple[str, ...]) -> int | None:
        ids = (self.tokenizer.token_to_id(name) for name in names)
        return next((i for i in ids if i is not None), None)

    def _pieces(self, text: str) -> Iterator[tuple[str, bool]]:
        """Cuts a document after line ends; flags its last piece.

        A cut is made only where the text around it encodes to the same ids with and
        without it, so a tokenizer that marks the start of a text is never cut.
        """
        start, cut = 0, 0
        while len(text) - start > _PIECE_CHARS:
            cut = text.find("\n", max(cut, start + _PIECE_CHARS)) + 1
            if not 0 < cut < len(text):
                break
            if self._is_seam(text, cut):
                yield text[start:cut], False
                start = cut
        yield text[start:], True

    def _is_seam(self, text: str, cut: int) -> bool:
        left = text[cut - _SEAM_CHARS : cut]
        right = text[cut : cut + _SEAM_CHARS]
        apart = np.concatenate([self.encode(left), self.encode(right)])
        return np.array_equal(apart, self.encode(left + right))


def _batches(
    pieces: Iterable[tuple[str, bool]],
) -> Iterator[list[tuple[str, bool]]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0])
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
