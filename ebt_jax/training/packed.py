"""A trained model in one file: its parameters, its config, and what it came to.

`ebt checkpoints pack` makes such a file of a workdir, and whatever takes a workdir to
predict with takes the file in its place. It is an `.npz`: an array for each parameter,
and `about`, JSON in UTF-8, with a SHA-256 sum of it and of all arrays. Nothing in it is
pickled.

Parameters may be halved to float16. There is no bfloat16: NumPy's format does not have
it, and float16 keeps three more bits of a number that is far inside its range, as
weights are. What may not be, step sizes and noise, are scalars and stay float32.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ebt_jax.errors import UserError
from ebt_jax.training.config import Config, from_json, to_json

SUFFIX = ".npz"
FORMAT = "ebt-jax model 1"
ABOUT = "about"  # which no parameter is called
_PLAIN = ("step", "results", "note", "dtype")  # fields that are JSON as they are
_UNREADABLE = (
    OSError,
    ValueError,  # as of what is pickled
    EOFError,
    KeyError,
    NotImplementedError,
    zipfile.BadZipFile,  # as of a CRC-32 sum
    zlib.error,
)


class Packed(NamedTuple):
    """What a file holds.

    Attributes:
      arrays: name, such as `blocks/qkv/kernel` -> float32 array.
      config: of the run, resolved; its paths are names without their folders.
      step: updates made.
      files: names of the training data, where those are files, which are not in it.
      results: held-out numbers of the run, before anything was rounded.
      note: on data and licence, by who packed it.
      dtype: that parameters are stored in, float32 or float16.
    """

    arrays: dict[str, np.ndarray]
    config: Config
    step: int
    files: tuple[str, ...]
    results: dict[str, float]
    note: str
    dtype: str


def write(file: Path, packed: Packed) -> None:
    """Writes a file; equal contents make equal files.

    Raises:
      UserError: for a parameter that float16 cannot hold.
      OSError: if it cannot be written.
    """
    stored = {k: _stored(k, a, packed.dtype) for k, a in packed.arrays.items()}
    about = {
        "format": FORMAT,
        **{name: getattr(packed, name) for name in _PLAIN},
        "files": list(packed.files),
        "config": json.loads(to_json(packed.config)),
    }
    about["sha256"] = _sum(about, stored)
    text = json.dumps(about, indent=1, sort_keys=True).encode()
    whole = {ABOUT: np.frombuffer(text, np.uint8), **stored}
    with file.open("wb") as opened:
        np.savez_compressed(opened, **whole)


def read(file: Path) -> Packed:
    """Reads a file.

    Raises:
      UserError: if there is none, it is damaged, of another kind or another version.
    """
    arrays = _arrays(file)
    if ABOUT not in arrays:
        raise UserError(
            f"{file} holds arrays, but no model that says what it is; make one with "
            "`ebt checkpoints pack`, or begin a run with them: train.init_from"
        )
    try:
        about = json.loads(arrays.pop(ABOUT).tobytes().decode())
        kind, expected = about["format"], about.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged: {ABOUT} is not readable") from error
    if kind != FORMAT:
        raise UserError(
            f"{file} is of format {kind!r}, but this version reads {FORMAT!r}; use the "
            "version it was made with"
        )
    if _sum(about, arrays) != expected:
        raise UserError(
            f"{file} is damaged: its arrays do not fit its own SHA-256 sum; get "
            "another copy"
        )
    try:
        config = from_json(json.dumps(about["config"]))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(
            f"the config in {file} is none of this version: {error}"
        ) from error
    values = {name: about[name] for name in _PLAIN}
    whole = {name: array.astype(np.float32) for name, array in arrays.items()}
    return Packed(arrays=whole, config=config, files=tuple(about["files"]), **values)


def holds_model(file: str) -> bool:
    """Whether it is a file that `read` reads, as far as its list of contents says."""
    try:
        with zipfile.ZipFile(Path(file).expanduser()) as archive:
            return f"{ABOUT}.npy" in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False


def check_data(path: Path, remedy: str) -> None:
    """Refuses a packed model where the files that it was trained on are needed.

    Args:
      path: of a file, or a workdir, which knows where they are.
      remedy: for the message.

    Raises:
      UserError: if they are files. What ships with a package is there again.
    """
    if not path.is_file():
        return
    if files := read(path).files:
        raise UserError(
            f"{path} does not hold the data of its run, {', '.join(files)}; {remedy}"
        )


def describe(packed: Packed, size: int) -> str:
    """What `ebt checkpoints list` tells of a file, a line for each thing.

    Args:
      packed: of `read`.
      size: of the file, in bytes.
    """
    config = packed.config
    count = sum(array.size for array in packed.arrays.values())
    lines = {
        "model": f"{config.model.kind} {config.model.size} of {config.model.space}, "
        f"{count:,} parameters in {packed.dtype}, {size / 1e6:.2f} MB",
        "trained": f"{packed.step} steps of {config.train.batch_size} on "
        f"{_data_of(config)}, seed {config.train.seed}",
        "note": packed.note,
    }
    shown = (
        "eval/nll",
        "eval/perplexity",
        "eval/smooth_l1",
        "eval/psnr",
        "eval/solved",
    )
    lines |= {k: f"{packed.results[k]:.4f}" for k in shown if k in packed.results}
    return "\n".join(f"{name:<18}{text}" for name, text in lines.items() if text)


def _data_of(config: Config) -> str:
    """What a model was trained on, in words."""
    if config.model.space == "board":
        return f"boards of {config.board.digits} x {config.board.digits}, made"
    return config.data.path


def _stored(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    whole = np.asarray(array, np.float32)
    if not whole.ndim:
        return whole
    with np.errstate(over="ignore"):
        stored = whole.astype(dtype)
    if not (np.isfinite(stored) == np.isfinite(whole)).all():
        raise UserError(
            f"--dtype is {dtype}, but {name} reaches {np.abs(whole).max():.3g}, which "
            "that cannot hold; take float32"
        )
    return stored


def _arrays(file: Path) -> dict[str, np.ndarray]:
    if not file.is_file():
        raise UserError(f"there is no file {file}; mend the path")
    try:
        # A path that is no zip to its end would be left open by `np.load`.
        with file.open("rb") as content:
            opened = np.load(content, allow_pickle=False)
            if isinstance(opened, np.lib.npyio.NpzFile):
                return dict(opened)
    except _UNREADABLE as error:
        told = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{file} is damaged, or no file of `ebt checkpoints pack` ({told}); get "
            "another copy, or name a workdir"
        ) from error
    raise UserError(f"{file} is one array, but has to be a model of many")


def _sum(about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of what is said and of names, types, shapes and contents of arrays."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"\n{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
