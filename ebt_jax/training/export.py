"""Parameters of a checkpoint as one file that other programs read."""

from __future__ import annotations

import importlib
import os
import secrets
from pathlib import Path
from typing import Any

import numpy as np

from ebt_jax import interop
from ebt_jax.errors import UserError
from ebt_jax.training import checkpoint
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
    file = Path(out).expanduser()
    if file.suffix not in SUFFIXES:
        raise UserError(
            f"--out is {out!r}, but has to end with {' or '.join(SUFFIXES)}"
        )
    if not file.parent.is_dir():
        raise UserError(f"--out={out}: {file.parent} is not a directory; make it first")
    write = _writer(file.suffix)
    step = checkpoint.pick_step(path, step)
    params = checkpoint.load_params(path, step, config)
    if names == "published":
        arrays = interop.to_reference(params, config)
    else:
        arrays = {k: np.asarray(v) for k, v in checkpoint.named(params).items()}
    temporary = file.with_name(f".{secrets.token_hex(4)}{file.name}")
    try:
        write(str(temporary), arrays)
        os.replace(temporary, file)
    except OSError as error:
        raise UserError(
            f"--out={out} cannot be written: {error.strerror}; name another file"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    count = sum(array.size for array in arrays.values())
    return f"{file}: {len(arrays)} arrays, {count:,} numbers, of checkpoint {step}"


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
