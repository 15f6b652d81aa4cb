"""SHA-256 sums of a checkpoint: what was saved is what is read, or it is told.

The format of checkpoints has no sums: a flipped bit in an array would be read as a
parameter. So each checkpoint gets a `manifest.json` with the size and the sum of every
file. It is written last, in one go, hence a checkpoint without one was not finished;
and it holds a sum of itself, hence a damaged manifest is told from damaged data.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

NAME = "manifest.json"
UNFINISHED = f"{NAME} is missing: the checkpoint was not finished"
FORMAT = "ebt-jax checkpoint manifest 1"
READ_WAITS = (0.5, 2.0)  # seconds before a file is read again
THREADS = 4  # that read and hash files at a time


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of.

    Attributes:
      saved: when, seconds since 1970.
      metrics: numbers of an evaluation at its step; empty if there was none.
      files: name below the checkpoint's directory -> bytes, SHA-256 sum in hexadecimal.
    """

    saved: float
    metrics: dict[str, float]
    files: dict[str, tuple[int, str]]

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(size for size, _ in self.files.values())


class DamagedManifest(ValueError):
    """A manifest that is not what was written."""


def write(directory: Path, *, saved: float, metrics: dict[str, float]) -> Manifest:
    """Hashes every file of a checkpoint and writes its manifest.

    Args:
      directory: of the checkpoint; nothing in it may change any more.
      saved: when it was saved, seconds since 1970.
      metrics: numbers of an evaluation at its step; those not finite are left out.

    Raises:
      OSError: if a file cannot be read, or the manifest not be written.
    """
    names = list_files(directory)
    sums = _in_threads(lambda name: _sum(directory / name), names)
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    manifest = Manifest(saved, finite, dict(zip(names, sums, strict=True)))
    temporary = directory / f".{NAME}.{os.getpid()}"
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(render(manifest))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, directory / NAME)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    return manifest


def read(directory: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
      FileNotFoundError: if it has none.
      DamagedManifest: if it is not what was written.
    """
    try:
        text = (directory / NAME).read_bytes().decode()
        values = json.loads(text)["manifest"]
        files = {
            name: (size, digest) for name, (size, digest) in values["files"].items()
        }
        manifest = Manifest(values["saved"], values["metrics"], files)
        intact = render(manifest) == text
    except (ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise DamagedManifest(f"{NAME} is damaged: it does not fit its own sum")
    return manifest


def verify(directory: Path, *, share: int = 0, shares: int = 1) -> list[str]:
    """Compares a checkpoint with its manifest.

    Several processes can share the work: each reads the contents of its files.

    Args:
      directory: of the checkpoint.
      share: which of the shares is looked at, from 0; names, sizes and the manifest are
        looked at with the first.
      shares: how many there are.

    Returns:
      Every damage found, each with the file's name; empty if there is none. A file that
      cannot be read, also after waiting, is one.
    """
    try:
        manifest = _patiently(read, directory)
        found = set(_patiently(list_files, directory))
    except FileNotFoundError:
        return [UNFINISHED]
    except DamagedManifest as error:
        return [str(error)]
    except OSError as error:
        return [_unreadable(error)]
    known = sorted(manifest.files)
    problems = [f"{name} is missing" for name in known if name not in found]
    problems += [f"{name} is not in {NAME}" for name in sorted(found - set(known))]
    whole = []
    for name in (name for name in known if name in found):
        size, expected = (directory / name).stat().st_size, manifest.files[name][0]
        if size == expected:
            whole.append(name)
        else:
            problems.append(f"{name} has {size} bytes, not {expected}")
    if share:
        problems = []

    def compare(name: str) -> str | None:
        try:
            digest = _patiently(_sum, directory / name)[1]
        except OSError as error:
            return _unreadable(error)
        intact = digest == manifest.files[name][1]
        return None if intact else f"{name} has another content than was saved"

    return problems + [p for p in _in_threads(compare, whole[share::shares]) if p]


def list_files(directory: Path) -> list[str]:
    """Names of all files below a checkpoint's directory, sorted, but its manifest."""
    names = []
    for folder, _, files in os.walk(directory, onerror=_raise):
        names += [
            (Path(folder) / name).relative_to(directory).as_posix() for name in files
        ]
    return sorted(name for name in names if name != NAME)


def render(manifest: Manifest) -> str:
    """The text of a manifest, with a sum of what it says."""
    values = dataclasses.asdict(manifest)
    said = json.dumps(values, sort_keys=True)
    content = {"format": FORMAT, "manifest": values, "sha256": _digest(said.encode())}
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _sum(file: Path) -> tuple[int, str]:
    with file.open("rb", buffering=0) as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
        return opened.tell(), digest


def _patiently(function: Callable[[Path], Any], path: Path) -> Any:
    """Reads something; again, a little later, if that fails."""
    for wait in READ_WAITS:
        try:
            return function(path)
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(wait)
    return function(path)


def _unreadable(error: OSError) -> str:
    return f"{error.filename} cannot be read: {error.strerror}"


def _in_threads(function: Callable[[str], Any], names: Sequence[str]) -> list[Any]:
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, names))


def _raise(error: OSError) -> None:
    raise error
