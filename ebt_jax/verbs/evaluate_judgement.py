"""`ebt evaluate --uncertainty` and `--verification`: what energies are worth as scores.

Both are printed, and written to a folder of the workdir with a file for each text that
was scored, from which `ebt report` draws them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from ebt_jax.command import Flag
from ebt_jax.errors import UserError
from ebt_jax.verbs.common import POSITIVE, plain, results_folder

if TYPE_CHECKING:
    from ebt_jax.thinking import Thinking
    from ebt_jax.training.sharding import NumpyBatch
    from ebt_jax.verbs.model import Trained

# Names that say nothing without that of the folder before them.
SPLITS = ("train", "valid", "validation", "val", "dev", "test", "data")
CORRUPTIONS = 3  # of each kind and sequence
FLAGS = (
    Flag(
        "uncertainty",
        "whether energy tells which predictions are wrong",
        False,
        flags.DEFINE_boolean,
    ),
    Flag(
        "verification",
        "whether energy tells true text from corrupted",
        False,
        flags.DEFINE_boolean,
    ),
    Flag("corruptions", f"of each kind, else {CORRUPTIONS}", None, POSITIVE),
)


def check_flags(values: flags.FlagValues) -> None:
    """Refuses flags that have no part in what is asked for.

    Raises:
      UserError: for --corruptions without --verification.
    """
    if values.corruptions is not None and not values.verification:
        raise UserError(
            "--corruptions is of --verification, which is not given; give both"
        )


def run(
    values: flags.FlagValues,
    trained: Trained,
    batches: Iterable[NumpyBatch],
    about: Mapping[str, Any],
    thinking: Thinking,
) -> tuple[dict[str, float], list[str]]:
    """Judges what the flags ask for, and writes it to the workdir.

    Args:
      values: of the command line's flags.
      trained: what is judged.
      batches: of what is scored, to be iterated over more than once.
      about: what results are of.
      thinking: how predictions are refined.

    Returns:
      All numbers, their names after `uncertainty/` and `verification/`; and tables.

    Raises:
      UserError: where there is too little to judge, or it cannot be written.
    """
    numbers: dict[str, float] = {}
    tables = []
    about = {**about, "think": values.think}
    folder = None
    if values.uncertainty or values.verification:
        folder = results_folder(trained.path, values.out)
    if values.uncertainty:
        judged, curves, table = _uncertainty(trained, batches, thinking)
        content = {**about, "results": judged, "curves": curves}
        keep(folder, "uncertainty", values.data, content)
        numbers |= {f"uncertainty/{name}": value for name, value in judged.items()}
        tables.append(table)
    if values.verification:
        times = values.corruptions or CORRUPTIONS
        size = values.batch_size or trained.config.eval.batch_size
        verified, table = _verification(trained, batches, times, size, thinking)
        content = {**about, "results": verified}
        keep(folder, "verification", values.data, content)
        numbers |= {f"verification/{name}": value for name, value in verified.items()}
        tables.append(table)
    return numbers, tables


def keep(
    place: Path | None, folder: str, data: str | None, content: Mapping[str, Any]
) -> None:
    """Writes results to `PLACE/FOLDER/NAME.json`, in place of older ones.

    Args:
      place: of `results_folder`; None to write nothing.
      folder: of results of one kind.
      data: what was scored, as in --data; None for what the run has held out.
      content: of the file; numbers that are not finite become null.

    Raises:
      UserError: if it cannot be written.
    """
    from ebt_jax.training.workdir import replace_text
    from ebt_jax.training.writers import storage_explained

    if place is None:
        return
    file = place / folder / f"{data_name(data)}.json"
    text = json.dumps(plain(dict(content)), indent=1, allow_nan=False) + "\n"
    with storage_explained():
        file.parent.mkdir(exist_ok=True)
        replace_text(file, text)


def data_name(data: str | None) -> str:
    """A short name of what was scored, for a file: `held_out`, or the data's own.

    Args:
      data: as in --data; None for what the run has held out.
    """
    if data is None:
        return "held_out"
    *before, last = re.split(r"[/:]", data.rstrip("/*"))
    name = re.sub(r"(\.(txt|jsonl|parquet|gz|xz|zst))+$", "", last)
    if name in SPLITS and before:
        name = f"{before[-1]}_{name}"
    return re.sub(r"[^\w.-]+", "_", name).strip("_.") or "data"


def _uncertainty(
    trained: Trained, batches: Iterable[NumpyBatch], thinking: Thinking
) -> tuple[dict[str, float], dict[str, Any], str]:
    from ebt_jax.evaluation.uncertainty import (
        doubt_curves,
        find_doubts,
        judge,
        uncertainty_table,
    )
    from ebt_jax.verbs.model import Spread

    doubts = find_doubts(
        trained.objective,
        trained.params,
        Spread(batches, trained.mesh),
        seed=trained.config.eval.seed,
        thinking=thinking,
    )
    judged = judge(doubts)
    return judged, doubt_curves(doubts), uncertainty_table(judged)


def _verification(
    trained: Trained,
    batches: Iterable[NumpyBatch],
    times: int,
    batch_size: int,
    thinking: Thinking,
) -> tuple[dict[str, float], str]:
    from ebt_jax import models
    from ebt_jax.evaluation.tasks.likelihood import energy_of_targets
    from ebt_jax.evaluation.verification import (
        verification_table,
        verify,
        whole_sequences,
        word_starts,
    )
    from ebt_jax.interfaces import EnergyModel
    from ebt_jax.verbs.model import Spread

    config, tokenizer = trained.config, trained.tokenizer
    model = models.build(config.model)
    energy = None
    if isinstance(model, EnergyModel):
        energy = energy_of_targets(model, config.refine.num_landscapes)
    texts = [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]
    found = verify(
        trained.objective,
        trained.params,
        whole_sequences(batches),
        energy=energy,
        starts=word_starts(texts),
        times=times,
        batch_size=batch_size,
        seed=config.eval.seed,
        thinking=thinking,
        place=lambda batches: Spread(batches, trained.mesh),
    )
    return found, verification_table(found)
