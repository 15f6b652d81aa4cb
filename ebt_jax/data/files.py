"""Files of a folder, a glob or an archive, by name.

Archives are .tar, compressed or not, and .zip. What is in a plain .tar is read where it
lies, when it is needed; what is in a compressed archive is held in memory, undecoded.
"""

from __future__ import annotations

import glob
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ebt_jax.errors import UserError

_TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
ARCHIVES = (*_TARS, ".zip")
_DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
)


class File(NamedTuple):
    """A file, on its own or in an archive.

    Attributes:
      name: relative to the folder, or in the archive, with "/" between folders.
      path: of the file, or of the archive.
      offset: of its first byte in `path`; -1 for a file on its own.
      size: bytes.
      content: what it holds; None: to be read.
    """

    name: str
    path: str
    offset: int = -1
    size: int = 0
    content: bytes | None = None

    def read(self) -> bytes:
        """What the file holds.

        Raises:
          OSError: if it cannot be read.
        """
        if self.content is not None:
            return self.content
        with open(self.path, "rb") as file:
            if self.offset < 0:
                return file.read()
            file.seek(self.offset)
            return file.read(self.size)


def find(path: str, suffixes: Sequence[str]) -> list[File]:
    """The files of one part of `data.path` that end as wanted, sorted by name.

    Args:
      path: a folder, searched to its ground, archives in it included; an archive; a
        file; or a glob of any of them.
      suffixes: in lower case.

    Raises:
      UserError: if there is nothing of the name, it is of another kind, or damaged.
    """
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        found = list(_walk(path, suffixes))
    elif os.path.isfile(path):
        found = _expanded(path, os.path.basename(path), suffixes)
        if not found and not path.lower().endswith(ARCHIVES):
            raise UserError(
                f"data.path: {path} is of an unknown kind; known are folders, "
                f"{', '.join((*ARCHIVES, *suffixes))}"
            )
    elif glob.has_magic(path):
        matches = sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
        if not matches:
            raise UserError(f"data.path: no file matches {path!r}; mend the glob")
        top = os.path.commonpath([os.path.dirname(match) for match in matches])
        found = [
            file
            for match in matches
            for file in _expanded(match, _relative(match, top), suffixes)
        ]
    else:
        raise UserError(
            f"data.path: there is no file or folder {path!r}; mend the path"
        )
    if not found:
        raise UserError(
            f"data.path: {path} holds none of {', '.join(suffixes)}; give a source "
            "that does"
        )
    return sorted(found, key=lambda file: file.name)


def _walk(top: str, suffixes: Sequence[str]) -> Iterator[File]:
    for folder, folders, names in os.walk(top):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(folder, name)
            yield from _expanded(path, _relative(path, top), suffixes)


def _expanded(path: str, name: str, suffixes: Sequence[str]) -> list[File]:
    """A file, or those of an archive; nothing if of another kind."""
    lower = path.lower()
    try:
        if lower.endswith(_TARS):
            return list(_tar(path, suffixes))
        if lower.endswith(".zip"):
            return list(_zip(path, suffixes))
    except _DAMAGED as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"data.path: {path} is not an archive, or a damaged one ({reason}); "
            "replace it"
        ) from error
    except OSError as error:
        raise UserError(
            f"data.path: {path} cannot be read ({error.strerror or error}); replace it "
            "or check its permissions"
        ) from error
    return [File(name, path)] if _wanted(name, suffixes) else []


def _tar(path: str, suffixes: Sequence[str]) -> Iterator[File]:
    plain = path.lower().endswith(".tar")
    with tarfile.open(path) as archive:
        for member in archive:
            if not member.isfile() or not _wanted(member.name, suffixes):
                continue
            name = member.name.removeprefix("./")
            if plain:
                yield File(name, path, member.offset_data, member.size)
            else:
                stream = archive.extractfile(member)
                content = b"" if stream is None else stream.read()
                yield File(name, path, 0, member.size, content)


def _zip(path: str, suffixes: Sequence[str]) -> Iterator[File]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if not member.is_dir() and _wanted(member.filename, suffixes):
                content = archive.read(member)
                yield File(member.filename, path, 0, len(content), content)


def _wanted(name: str, suffixes: Sequence[str]) -> bool:
    """Whether a file is of a kind; hidden ones, such as macOS's `._x`, are not."""
    hidden = os.path.basename(name).startswith(".")
    return not hidden and name.lower().endswith(tuple(suffixes))


def _relative(path: str, top: str) -> str:
    return os.path.relpath(path, top or ".").replace(os.sep, "/")
