"""Items of a benchmark task, from its files or a TFDS data set.

A record is what a file holds, as JSON has it; an item is what a model is asked. What is
no item is named, with its file and line, and counted.
"""

from __future__ import annotations

import glob
import gzip
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ebt_jax.data.sources import tfds_examples
from ebt_jax.errors import UserError

COMPRESSIONS = ("", ".gz", ".xz")
_NAMED = 20  # malformed records that are named one by one


class Item(NamedTuple):
    """A question with its right answer.

    A prompt ends where the space or line end before the answer begins, which belongs
    to the answer: tokenizers join it to the word behind it.

    Attributes:
      prompt: what the model is given.
      answers: the right one, whose likelihood is scored, then others that count as
        right, too.
      choices: answers to choose from, of which the right one is one; empty if none.
      id: names the item; its draws depend on it.
      kinds: what each character of prompt and right answer is, where results are told
        apart by that, "" for what is not; empty if they are not told apart.
    """

    prompt: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    id: str = ""
    kinds: tuple[str, ...] = ()


class Items(NamedTuple):
    """What was found.

    Attributes:
      items: in the order of the files.
      sources: the files, or the TFDS name.
      malformed: records that are no item.
      unanswered: records without an answer, which are left out.
    """

    items: list[Item]
    sources: list[str]
    malformed: int
    unanswered: int


def find_files(task: str, patterns: Sequence[str], data: str) -> list[str]:
    """The files of a task.

    Args:
      task: its name.
      patterns: globs below a folder, without compression suffixes, the best first.
      data: that folder, or the one that has the files themselves, or a file.

    Returns:
      All that match the first pattern that any file matches, sorted.

    Raises:
      UserError: saying which files are looked for, if there are none.
    """
    data = os.path.expanduser(data)
    if os.path.isfile(data):
        return [data]
    for pattern in patterns:
        for name in (pattern, os.path.basename(pattern)):
            path = os.path.join(glob.escape(data), name)
            found = [file for end in COMPRESSIONS for file in glob.glob(path + end)]
            if found:
                return sorted(found)
    wanted = " or ".join(patterns)
    what = "there is no folder" if not os.path.isdir(data) else "nothing is there in"
    raise UserError(
        f"task {task}: {what} {data!r}; the task looks for {wanted} in the folder that "
        "--data names, also .gz or .xz"
    )


def read_items(
    sources: Sequence[str],
    parse: Callable[[Any], Item | None],
    *,
    nested: Sequence[str] = (),
    limit: int = 0,
    warn: Callable[[str], None],
) -> Items:
    """Reads items.

    Args:
      sources: files, .jsonl or .json, or one `tfds:NAME[:SPLIT]`.
      parse: makes an item of a record; None for one without an answer. Raises a
        ValueError that says what is wrong with it.
      nested: fields of a .json file whose lists hold records, from the outside.
      limit: how many items; 0 for all. No more is read than it takes.
      warn: is told which records are malformed.

    Raises:
      UserError: for a file that cannot be read, and if there is no item.
    """
    items: list[Item] = []
    malformed = unanswered = 0
    first = ""
    for where, record in _all_records(sources, nested):
        try:
            item = _item(record, parse)
        except ValueError as error:
            malformed += 1
            first = first or f"{where}: {error}"
            if malformed <= _NAMED:
                warn(f"skipped {where}: {error}")
            continue
        if item is None:
            unanswered += 1
            continue
        items.append(item if item.id else item._replace(id=os.path.basename(where)))
        if len(items) == limit:
            break
    if malformed > _NAMED:
        warn(f"skipped {malformed} malformed items in all")
    if not items:
        problem = f"all {malformed} are malformed, the first: {first}"
        raise UserError(
            f"{', '.join(sources)} has no item that can be scored"
            f"{'; ' + problem if malformed else ''}; mend or replace it"
        )
    return Items(items, list(sources), malformed, unanswered)


def read_text(path: str) -> str:
    """A text file.

    Raises:
      UserError: if it cannot be read, or is not UTF-8.
    """
    try:
        with _opened(path) as file:
            return file.read().decode()
    except _FAILURES as error:
        raise _unreadable(path, error) from error


_FAILURES = (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError)


def _item(record: Any, parse: Callable[[Any], Item | None]) -> Item | None:
    if isinstance(record, ValueError):
        raise record
    item = parse(record)
    if item is not None:
        try:  # JSON can spell half a character
            "".join((item.prompt, *item.answers, *item.choices)).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise ValueError(f"holds {half!r}, which is no character") from error
    return item


def _all_records(
    sources: Sequence[str], nested: Sequence[str]
) -> Iterator[tuple[str, Any]]:
    """Records and where they are; a ValueError in place of what is not JSON."""
    for source in sources:
        if source.startswith("tfds:"):
            examples = tfds_examples(source)
            for number in range(len(examples)):
                yield f"{source}, example {number}", _plain(examples[number])
        elif source.removesuffix(".gz").removesuffix(".xz").endswith(".jsonl"):
            yield from _lines(source)
        else:
            try:
                document = json.loads(read_text(source))
            except (ValueError, RecursionError) as error:
                raise _unreadable(source, error) from error
            yield from _unfold(document, nested, source)


def _lines(path: str) -> Iterator[tuple[str, Any]]:
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        record = json.loads(line)
                    except UnicodeDecodeError as error:
                        record = ValueError(f"is not UTF-8 ({error.reason})")
                    except (ValueError, RecursionError) as error:
                        record = ValueError(f"is not JSON ({error})")
                    yield f"{path}, line {number}", record
    except _FAILURES as error:
        raise _unreadable(path, error) from error


def _unfold(
    record: Any, nested: Sequence[str], where: str
) -> Iterator[tuple[str, Any]]:
    """Records in nested lists, each with the fields that stand beside the lists."""
    if not nested:
        yield where, record
        return
    name, *inner = nested
    if not isinstance(record, dict) or not isinstance(record.get(name), list):
        yield where, ValueError(f"has no list {name!r}")
        return
    beside = {key: value for key, value in record.items() if key != name}
    for number, each in enumerate(record[name], 1):
        whole = beside | each if isinstance(each, dict) else each
        yield from _unfold(whole, inner, f"{where}, {name} {number}")


def _plain(value: Any) -> Any:
    """A TFDS example as JSON would have it."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
        return _plain(value) if isinstance(value, bytes | list) else value
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _opened(path: str) -> Any:
    openers = {".gz": gzip.open, ".xz": lzma.open}
    suffix = os.path.splitext(path)[1]
    return openers[suffix](path, "rb") if suffix in openers else open(path, "rb")


def _unreadable(path: str, error: Exception) -> UserError:
    problem = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"{path} cannot be read ({problem}); replace it")
