"""Parameters of a checkpoint as one file, for other programs or as a whole model."""

from __future__ import annotations

import dataclasses
import glob
import importlib
import math
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ebt_jax import interop
from ebt_jax.errors import UserError
from ebt_jax.training import checkpoint, manifest, packed
from ebt_jax.training.closing import read_summary
from ebt_jax.training.config import Config

SUFFIXES = (".safetensors", ".npz")


def export(path: Path, config: Config, step: int | None, out: str, names: str) -> str:
    """Writes the parameters of a checkpoint; the file appears when it is complete.

    Args:
      path: the workdir.
      config: its config.
      step: which checkpoint; None for the newest that is good.
      out: the file, `.safetensors` or `.npz`.
      names: "ours", such as `blocks/qkv/kernel`, or "published", see `interop`.

    Returns:
      A line that says what has been written.

    Raises:
      UserError: if the file cannot be written, or there is no such checkpoint or names.
    """
    file = _checked(out, SUFFIXES)
    write = _writer(file.suffix)
    step = checkpoint.pick_step(path, step)
    params = checkpoint.load_params(path, step, config)
    if names == "published":
        arrays = interop.to_reference(params, config)
    else:
        arrays = {k: np.asarray(v) for k, v in checkpoint.named(params).items()}
    _complete(file, out, lambda temporary: write(str(temporary), arrays))
    count = sum(array.size for array in arrays.values())
    return f"{file}: {len(arrays)} arrays, {count:,} numbers, of checkpoint {step}"


def pack(
    path: Path, config: Config, step: int | None, out: str, dtype: str, note: str
) -> str:
    """Writes a checkpoint as a model in one file, see `packed`.

    Args:
      path: the workdir.
      config: its config.
      step: which checkpoint; None for the newest that is good.
      out: the file, `.npz`.
      dtype: that parameters are stored in, float32 or float16.
      note: on data and licence, for who finds the file.

    Returns:
      A line that says what has been written.

    Raises:
      UserError: if the file cannot be written, there is no such checkpoint, or the
        model needs other files than that.
    """
    file = _checked(out, (packed.SUFFIX,))
    needed = {
        "data.tokenizer": config.data.tokenizer.removeprefix("bytes"),
        "vision.encoder_path": config.vision.encoder_path,
        "vision.caption_path": config.vision.caption_path,
    }
    for name, other in needed.items():
        if other:
            raise UserError(
                f"the run's {name} is {other!r}, a file that its model needs and that "
                "does not go into one with it; keep the workdir, or use `export`"
            )
    step = checkpoint.pick_step(path, step)
    params = checkpoint.load_params(path, step, config)
    whole = packed.Packed(
        arrays={k: np.asarray(v) for k, v in checkpoint.named(params).items()},
        config=_without_folders(config),
        step=step,
        files=packed.read(path).files if path.is_file() else _files(config),
        results=_results(path, step),
        note=note,
        dtype=dtype,
    )
    _complete(file, out, lambda temporary: packed.write(temporary, whole))
    size = file.stat().st_size
    return f"{file}\n{packed.describe(packed.read(file), size)}"


def _without_folders(config: Config) -> Config:
    """Without where files lay: it tells of somebody's machine, and helps nobody."""
    named = lambda path: ",".join(_name(part) for part in _parts(path))
    data = dataclasses.replace(
        config.data,
        path=named(config.data.path),
        held_out_path=named(config.data.held_out_path),
    )
    train = dataclasses.replace(config.train, init_from=named(config.train.init_from))
    log = dataclasses.replace(config.log, wandb_project="")
    return dataclasses.replace(config, data=data, train=train, log=log)


def _files(config: Config) -> tuple[str, ...]:
    """Names of the data's parts that are files or folders, and no names of data."""
    parts = [*_parts(config.data.path), *_parts(config.data.held_out_path)]
    outside = [
        _name(part)
        for part in parts
        if not part.startswith("tfds:")
        and (part != _name(part) or glob.has_magic(part) or Path(part).exists())
    ]
    return tuple(dict.fromkeys(outside))


def _parts(path: str) -> list[str]:
    return [part.strip() for part in path.split(",") if part.strip()]


def _name(part: str) -> str:
    return part if part.startswith("tfds:") else Path(part).name


def _results(path: Path, step: int) -> dict[str, float]:
    """Held-out numbers of a checkpoint; those of the run's end, if it is that."""
    if path.is_file():
        return packed.read(path).results
    summary = read_summary(path)
    if summary.pop("step", None) != step:
        summary = manifest.read(checkpoint.directory_of(path, step)).metrics
    return {
        name: value
        for name, value in summary.items()
        if name.startswith(("eval/", "thinking/")) and math.isfinite(value)
    }


def _checked(out: str, suffixes: tuple[str, ...]) -> Path:
    """The file that --out names, which can be made."""
    file = Path(out).expanduser()
    if file.suffix not in suffixes:
        raise UserError(
            f"--out is {out!r}, but has to end with {' or '.join(suffixes)}"
        )
    if not file.parent.is_dir():
        raise UserError(f"--out={out}: {file.parent} is not a directory; make it first")
    return file


def _complete(file: Path, out: str, write: Callable[[Path], None]) -> None:
    """Writes a file that appears when it is complete."""
    temporary = file.with_name(f".{secrets.token_hex(4)}{file.name}")
    try:
        write(temporary)
        os.replace(temporary, file)
    except OSError as error:
        raise UserError(
            f"--out={out} cannot be written: {error.strerror}; name another file"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _writer(suffix: str) -> Any:
    if suffix == ".npz":
        return lambda file, arrays: np.savez(file, **arrays)
    try:
        save_file = importlib.import_module("safetensors.numpy").save_file
    except ImportError as error:
        raise UserError(
            "writing .safetensors needs `pip install 'ebt-jax[torch]'`; or give .npz"
        ) from error
    return lambda file, arrays: save_file(arrays, file)
