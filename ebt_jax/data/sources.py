"""Where text comes from: documents, one after the other, from whatever `data.path` is.

==================== ==================================== ======================
data.path            a document is                        position in messages
==================== ==================================== ======================
pydoc                a topic of Python's own reference    -
arithmetic[:...]     a line, see `data.synthetic`         -
dyck[:...]           the same                             -
FILE.txt             the file                             byte
FILE.jsonl           a line's field `data.text_key`       line
FILE.parquet         a row's column `data.text_key`       row
tfds:NAME[:SPLIT]    an example's feature `data.text_key` example
==================== ==================================== ======================

Text and JSON lines may be compressed (.gz, .xz, .zst). Several sources are separated by
commas and read in that order; a glob's files in sorted order. A directory of token
shards (`ebt prepare`) is read by `ebt_jax.data.shards` instead.

Documents are UTF-8 bytes, so that a tokenizer of bytes has nothing to decode.
"""

from __future__ import annotations

import glob
import importlib
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from absl import logging
from tqdm.utils import CallbackIOWrapper

from ebt_jax.data import synthetic
from ebt_jax.data.config import DataConfig
from ebt_jax.errors import UserError

OnRead = Callable[[int], Any]

_CHUNK_BYTES = 1 << 20  # read from a file at once
_NAMED_RECORDS = 20  # malformed records that are named one by one
_FEW_RECORDS = 1000  # judge data.max_malformed on at least as many before the end
_TFDS = re.compile(
    r"tfds:(?P<name>[\w/.+=-]+?(:\d+\.\d+\.\d+)?)(:(?P<split>[^\d:].*))?"
)


class Malformed(NamedTuple):
    """A record without usable text."""

    where: str
    problem: str


def documents(
    config: DataConfig, on_read: OnRead = lambda count: None
) -> Iterator[bytes]:
    """The documents of `config.path`; empty ones are left out.

    Args:
      config: `path`, `text_key` and `max_malformed`.
      on_read: called with the number of bytes read from a source, before decompression.

    Raises:
      UserError: for a source that is missing, empty, corrupt or not text, and when more
        than `max_malformed` of the records are malformed.
    """
    records = malformed = 0
    first = None
    for entry in entries(config.path):
        empty = True
        for record in _records(entry, config.text_key, on_read):
            records += 1
            if isinstance(record, Malformed):
                malformed += 1
                first = first or record
                _stop_above(config.max_malformed, malformed, records, first, False)
                if malformed <= _NAMED_RECORDS:
                    logging.warning("skipped %s: %s", *record)
            elif record:
                empty = False
                yield record
        if empty:
            raise UserError(
                f"data.path: {entry} holds no text; give a source that does"
            )
    if first is not None:
        _stop_above(config.max_malformed, malformed, records, first, True)
        logging.warning("skipped %d of %d records as malformed", malformed, records)


def entries(path: str) -> list[str]:
    """The single sources of a `data.path`, globs expanded.

    Raises:
      UserError: for a file that does not exist, a glob without a match, a file of an
        unknown kind, or a setting that there is not of text that is made.
    """
    found = []
    for part in map(os.path.expanduser, synthetic.split(path)):
        if part == "pydoc" or part.startswith("tfds:"):
            found.append(part)
        elif synthetic.is_source(part):
            synthetic.parse(part)
            found.append(part)
        elif os.path.isfile(part):
            found.append(part)
        elif os.path.isdir(part):
            raise UserError(
                f"data.path: {part} is a directory without token shards; name its "
                f"files with a glob such as '{os.path.join(part, '*.txt')}'"
            )
        elif glob.has_magic(part):
            matches = sorted(filter(os.path.isfile, glob.glob(part, recursive=True)))
            if not matches:
                raise UserError(f"data.path: no file matches {part!r}; mend the glob")
            found.extend(matches)
        else:
            raise UserError(
                f"data.path: there is no file {part!r}; name a file, a glob, "
                "tfds:NAME, a directory of token shards, 'pydoc', 'arithmetic' or "
                "'dyck'"
            )
    for entry in found:
        if not synthetic.is_source(entry) and os.path.isfile(entry):
            _kind(entry)
    return found


def size(config: DataConfig) -> int | None:
    """Bytes that `on_read` will add up to, None where that is not known."""
    files = entries(config.path)
    if all(os.path.isfile(entry) for entry in files):
        return sum(os.path.getsize(entry) for entry in files)
    return None


def optional_package(name: str, purpose: str, extra: str = "text") -> ModuleType:
    """Imports a package, or a module of it, of one of our extras.

    Args:
      name: of the module.
      purpose: what needs it, for the message.
      extra: the one that installs it.

    Raises:
      UserError: if it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{purpose} needs the package {name.partition('.')[0]!r}, which is not "
            f"installed; run pip install 'ebt-jax[{extra}]'"
        ) from error


def _records(entry: str, key: str, on_read: OnRead) -> Iterator[bytes | Malformed]:
    if entry == "pydoc":
        return _pydoc(on_read)
    if entry.startswith("tfds:"):
        return _tfds(entry, key, on_read)
    if synthetic.is_source(entry):
        return synthetic.documents(synthetic.parse(entry))
    kind, _ = _kind(entry)
    if kind == ".txt":
        return iter([_text_file(entry, on_read)])
    if kind == ".jsonl":
        return _json_lines(entry, key, on_read)
    return _parquet(entry, key, on_read)


def _kind(path: str) -> tuple[str, str]:
    """The kind of a file and its compression, both as suffixes."""
    stem, suffix = os.path.splitext(path)
    compression = suffix if suffix in (".gz", ".xz", ".zst") else ""
    kind = os.path.splitext(stem)[1] if compression else suffix
    if kind in (".txt", ".jsonl") or (kind == ".parquet" and not compression):
        return kind, compression
    raise UserError(
        f"data.path: {path} is of an unknown kind; known are .txt and .jsonl, each "
        "also .gz, .xz or .zst, and .parquet"
    )


def _stop_above(
    limit: float, malformed: int, records: int, first: Malformed, at_end: bool
) -> None:
    """Raises when too many records are malformed, as soon as that can be judged."""
    judged = records if at_end else max(records, _FEW_RECORDS)
    if malformed > limit * judged:
        raise UserError(
            f"{first.where}: {first.problem}; {malformed} of {records} records are "
            f"malformed, more than data.max_malformed ({limit}) allows; mend the data "
            "or raise the limit"
        )


def _pydoc(on_read: OnRead) -> Iterator[bytes]:
    topics = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        text = topics[name].encode()
        on_read(len(text))
        yield text


def _text_file(path: str, on_read: OnRead) -> bytes:
    text = b"".join(_chunks(path, on_read))
    at = text.find(b"\0")
    problem = f"byte {at} is NUL" if at >= 0 else ""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        problem = problem or f"byte {error.start} is not UTF-8"
    if problem:
        raise UserError(
            f"data.path: {path} is not a text file ({problem}); give UTF-8 text"
        )
    return text


def _json_lines(path: str, key: str, on_read: OnRead) -> Iterator[bytes | Malformed]:
    for number, line in enumerate(_lines(_chunks(path, on_read)), 1):
        if line.strip():
            try:
                yield _field(json.loads(line.decode()), key)
            except (ValueError, RecursionError) as error:
                yield Malformed(f"{path}, line {number}", _problem(error))


def _parquet(path: str, key: str, on_read: OnRead) -> Iterator[bytes | Malformed]:
    parquet = optional_package("pyarrow.parquet", f"{path} (parquet)")
    arrow = optional_package("pyarrow", f"{path} (parquet)")
    with _opened(path) as raw:
        try:
            file = parquet.ParquetFile(CallbackIOWrapper(on_read, raw, "read"))
            columns = file.schema_arrow.names
            if key not in columns:
                raise UserError(
                    f"data.path: {path} has no column {key!r}; set data.text_key to "
                    f"one of {columns}"
                )
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[key]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    try:
                        yield _field({key: value}, key)
                    except ValueError as error:
                        yield Malformed(f"{path}, row {row}", _problem(error))
        except (arrow.ArrowException, OSError) as error:
            raise UserError(
                f"data.path: {path} is not a readable parquet file "
                f"({_first_line(error)}); replace it"
            ) from error


def tfds_examples(entry: str) -> Sequence[dict[str, Any]]:
    """The examples of `tfds:NAME[:SPLIT]`, with random access; nothing is downloaded.

    Raises:
      UserError: if the name is malformed, or nothing has been prepared under it.
    """
    match = _TFDS.fullmatch(entry)
    if not match:
        raise UserError(f"data.path: {entry!r} is not of the form tfds:NAME[:SPLIT]")
    tfds = importlib.import_module("tensorflow_datasets")
    split = match["split"] or "train"
    try:
        return tfds.data_source(match["name"], split=split, download=False)
    except Exception as error:  # tfds has no common base for what it raises
        raise UserError(
            f"data.path: tensorflow-datasets cannot read {match['name']!r}, split "
            f"{split!r} ({_first_line(error)}); prepare it first, with "
            "file_format='array_record'"
        ) from error


def _tfds(entry: str, key: str, on_read: OnRead) -> Iterator[bytes | Malformed]:
    source = tfds_examples(entry)
    for number in range(len(source)):
        example = source[number]
        if number == 0 and key not in example:
            raise UserError(
                f"data.path: {entry} has no feature {key!r}; set data.text_key to one "
                f"of {sorted(example)}"
            )
        try:
            text = _field(example, key)
            on_read(len(text))
            yield text
        except ValueError as error:
            yield Malformed(f"{entry}, example {number}", _problem(error))


def _field(record: Any, key: str) -> bytes:
    """The text of a record, UTF-8; ValueError (or a subclass) if there is none."""
    if not isinstance(record, dict):
        raise ValueError("is not an object")
    if key not in record:
        raise ValueError(f"has no field {key!r} (data.text_key)")
    text = record[key]
    if isinstance(text, bytes):
        text = text.decode()
    if not isinstance(text, str):
        raise ValueError(f"field {key!r} is not text but {type(text).__name__}")
    return text.encode()


def _problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError | RecursionError):
        return f"is not JSON ({error})"
    if isinstance(error, UnicodeDecodeError | UnicodeEncodeError):
        return f"is not UTF-8 ({error.reason})"
    return str(error)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _chunks(path: str, on_read: OnRead) -> Iterator[bytes]:
    """A file's bytes, decompressed, in pieces."""
    _, compression = _kind(path)
    with _opened(path) as raw:
        if not compression:
            while data := raw.read(_CHUNK_BYTES):
                on_read(len(data))
                yield data
            return
        start, failures = _decompressor(path, compression)
        stream = None
        while data := raw.read(_CHUNK_BYTES):
            on_read(len(data))
            while data:
                if stream is None or stream.eof:
                    stream = start()
                try:
                    yield stream.decompress(data)
                except failures as error:
                    raise UserError(
                        f"data.path: {path} is not a {compression} file, or a corrupt "
                        f"one ({error}); replace it"
                    ) from error
                # What follows a stream: padding with zeros, or another stream.
                data = stream.unused_data.lstrip(b"\0") if stream.eof else b""
        if stream is not None and not stream.eof:
            raise UserError(f"data.path: {path} ends too early; replace it")


def _decompressor(
    path: str, compression: str
) -> tuple[Callable[[], Any], type[Exception]]:
    """How to start on a compressed stream, and what a corrupt one raises."""
    if compression == ".gz":
        return lambda: zlib.decompressobj(wbits=31), zlib.error
    if compression == ".xz":
        return lzma.LZMADecompressor, lzma.LZMAError
    zstd = optional_package("zstandard", f"{path} (.zst)")
    start = lambda: zstd.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
    return start, zstd.ZstdError


def _opened(path: str) -> Any:
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(
            f"data.path: {path} cannot be read ({error.strerror}); check its "
            "permissions"
        ) from error
