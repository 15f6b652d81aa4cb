"""When updates are left out again and again: back to a checkpoint, or a report."""

from __future__ import annotations

import collections
import contextlib
import json
from pathlib import Path
from typing import Any, NoReturn

import jax

from ebt_jax.errors import TrainingDiverged
from ebt_jax.training import checkpoint, guard
from ebt_jax.training.config import TrainConfig
from ebt_jax.training.monitor import finite, say
from ebt_jax.training.saving import Saver
from ebt_jax.training.sharding import NumpyBatch
from ebt_jax.training.step import TrainState
from ebt_jax.training.workdir import checkpoint_steps, replace_text

RECORDS = 50  # of the last numbers, in a report


class Recent:
    """What a report would tell: the last numbers and batches, and the rollbacks."""

    def __init__(self, max_skipped: int) -> None:
        self._records: collections.deque[dict[str, Any]] = collections.deque(
            maxlen=RECORDS
        )
        batches = 2 * max_skipped + 2
        self._batches: collections.deque[dict[str, Any]] = collections.deque(
            maxlen=batches
        )
        self._rollbacks: list[dict[str, int]] = []

    def batch(self, step: int, batch: NumpyBatch) -> None:
        """Takes note of the sequences of an update, those of this process."""
        self._batches.append({"step": step, "ids": batch["index"].tolist()})

    def numbers(self, step: int, values: dict[str, float]) -> None:
        """Takes note of the numbers of an update."""
        self._records.append({"step": step, **finite(values)})

    def rollback(self, step: int, to: int) -> None:
        """Takes note that the run went back."""
        self._rollbacks.append({"from_step": step, "to_step": to})

    def write(self, file: Path, about: dict[str, Any]) -> None:
        """Writes the report; without a place for it, it is left out."""
        report = {
            **about,
            "rollbacks": self._rollbacks,
            "records": list(self._records),
            "batches": list(self._batches),
        }
        with contextlib.suppress(OSError):
            replace_text(file, json.dumps(report, indent=1) + "\n")


def too_many(config: TrainConfig, row: dict[str, float]) -> bool:
    """Whether so many updates in a row were left out that going on is of no use."""
    return row["train/skipped_in_a_row"] >= config.max_skipped


def roll_back(
    config: TrainConfig,
    path: Path,
    saver: Saver,
    recent: Recent,
    state: TrainState,
    target: TrainState,
    step: int,
    row: dict[str, float],
) -> tuple[TrainState, int]:
    """Goes back to the last checkpoint from before updates were left out.

    The place in the data stays where it is: what comes next has not been seen.

    Args:
      config: how often this may happen.
      path: the workdir.
      saver: of the run; its later checkpoints are deleted.
      recent: for the report.
      state: the present one, given up but for what it counts.
      target: shapes and shardings of a state.
      step: updates made when `row` was.
      row: numbers of that update.

    Returns:
      The state to go on with, and its step.

    Raises:
      TrainingDiverged: if there is no such checkpoint, or it was not the first time.
    """
    skipped, rollbacks = (
        int(row[f"train/{name}"]) for name in ("skipped_in_a_row", "rollbacks")
    )
    before = step - skipped  # the last update that was made
    saver.wait_until_finished()
    there = any(known <= before for known in checkpoint_steps(path))
    if rollbacks < config.max_rollbacks and there:
        saver.drop_after(before)
        good = checkpoint.recover(path)
        if good is not None:
            restored = checkpoint.restore(path, good, target).state
            shardings = jax.tree.map(lambda s: s.sharding, target.guard)
            carry_on = jax.jit(guard.after_rollback, out_shardings=shardings)
            counts = carry_on(restored.guard, state.guard)
            recent.rollback(step, good)
            say(
                f"warning: {skipped} updates in a row were left out, up to step {step} "
                f"({_in_short(row)}); back to checkpoint {good}, on with new data "
                f"(rollback {rollbacks + 1} of {config.max_rollbacks})"
            )
            return restored._replace(guard=counts), good
    _diverged(config, path, saver, recent, step, row)


def _diverged(
    config: TrainConfig,
    path: Path,
    saver: Saver,
    recent: Recent,
    step: int,
    row: dict[str, float],
) -> NoReturn:
    index = jax.process_index()
    file = path / ("divergence.json" if index == 0 else f"divergence-{index:05d}.json")
    skipped, rollbacks = (
        int(row[f"train/{name}"]) for name in ("skipped_in_a_row", "rollbacks")
    )
    good = saver.latest_step()
    recent.write(file, {"step": step, "skipped_in_a_row": skipped, "checkpoint": good})
    where = "there is no checkpoint"
    if good is not None:
        where = f"the last checkpoint is {checkpoint.directory_of(path, good)}"
    raise TrainingDiverged(
        f"training diverged: {skipped} updates in a row, up to step {step}, were left "
        f"out ({_in_short(row)}) after {rollbacks} rollbacks of at most "
        f"{config.max_rollbacks}; {where}; {file} names the batches; mend the data, or "
        "lower optim.peak_lr, optim.step_size_lr_multiplier or refine.step_size in "
        "another workdir"
    )


def _in_short(row: dict[str, float]) -> str:
    return f"loss {row['train/loss']:g}, gradient norm {row['train/gradient_norm']:g}"
