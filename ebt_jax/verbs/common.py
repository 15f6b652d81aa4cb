"""What several verbs share: flags of the same meaning, and checks of them."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from ebt_jax.command import Flag
from ebt_jax.errors import UserError

if TYPE_CHECKING:
    from ebt_jax.data.config import DataConfig

INTEGER, FLOAT = flags.DEFINE_integer, flags.DEFINE_float
COUNT = functools.partial(flags.DEFINE_integer, lower_bound=0)
POSITIVE = functools.partial(flags.DEFINE_integer, lower_bound=1)

WORKDIR = Flag("workdir", "folder of the run")
TRAINED = Flag("workdir", "folder of the run, or its model in a file, see checkpoints")
CHECKPOINT = Flag("checkpoint", "step of a checkpoint; else the newest", None, INTEGER)
NUM_STEPS = Flag("num_steps", "refinement steps; 0 for the trained number", 0, COUNT)
RESULTS = Flag("out", "folder that results are kept in; else that of the run")
# No list flag of absl's: that takes no line breaks, which long lists of folders want.
RUNS = Flag("runs", "folders of runs, or globs, commas between")
LOSS = Flag("y", "a number of summary.json; else the held-out loss")
METHODS = Flag("by", "config keys whose values make methods", None, flags.DEFINE_list)
TEXT_KEY = Flag("text_key", "field of a record with the text; else the config's")


def required(values: flags.FlagValues, name: str, what: str) -> Any:
    """The value of a flag that has to be given.

    Args:
      values: of the command line's flags.
      name: of the flag.
      what: it has to be given, for the message.

    Raises:
      UserError: if it is missing or empty.
    """
    if not values[name].value:
        raise UserError(f"--{name} is missing; give it {what}")
    return values[name].value


def listed(text: str | None) -> list[str]:
    """What stands between commas, without spaces and line breaks around it."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def results_folder(path: Path, out: str | None) -> Path | None:
    """Where an evaluation keeps what it writes: --out, else the workdir.

    Args:
      path: of the workdir, or of a model in a file, which takes nothing in.
      out: of --out.

    Returns:
      None for nowhere, which is told.

    Raises:
      UserError: if --out is no folder.
    """
    if out is not None:
        folder = Path(out).expanduser()
        if not folder.is_dir():
            raise UserError(f"--out is {out!r}, but that is no folder; make it first")
        return folder
    if not path.is_file():
        return path
    print(f"not kept, as {path} is a file: give --out=FOLDER", file=sys.stderr)
    return None


def changed(data: DataConfig, **changes: str | None) -> DataConfig:
    """The config with those changes that are given."""
    given = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(data, **given)


def results_table(about: dict[str, Any], results: dict[str, float]) -> str:
    """Results for people, one line each."""
    notes = {
        "nll": "nats per token",
        "energy_gap": "before - after",
        "energy_rose": "share of predictions whose energy rose",
        "energy_gradients": "evaluations per token",
        "energy_evaluations": "without gradient, per token",
        "flops_per_token": "of thinking, by formula",
        "energy_spread": "of the candidates' minima, standard deviation",
        "tokens": "scored",
        "psnr": "dB, of values in [-1, 1]",
    }
    lines = [f"{name:<24}{value}" for name, value in about.items()]
    for name, value in results.items():
        number = f"{value:,.0f}" if name in ("tokens", "sequences") else f"{value:.5g}"
        lines.append(f"{name:<24}{number:<12}{notes.get(name, '')}".rstrip())
    return "\n".join(lines)


def plain(value: Any) -> Any:
    """None in place of numbers that are not finite, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
