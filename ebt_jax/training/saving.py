"""Saving checkpoints: in the background, tried again, sealed by a manifest."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from ebt_jax.errors import StorageError
from ebt_jax.training import manifest
from ebt_jax.training.checkpoint import agree, directory_of
from ebt_jax.training.config import CheckpointConfig, Config
from ebt_jax.training.monitor import say
from ebt_jax.training.step import TrainState, saved_form
from ebt_jax.training.workdir import checkpoint_steps

SCORES = ("eval/nll", "eval/smooth_l1")  # one of a run; the lower, the better
RETRY_SECONDS = 1.0  # before the first retry; then twice as long each time

# What Orbax and TensorStore raise when files cannot be written.
_FAILURES = (OSError, ValueError, RuntimeError)


@dataclasses.dataclass(frozen=True)
class Best(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the checkpoints with the lowest scores.

    Attributes:
      scores: step -> score; steps without one are not kept by this policy. Orbax's own
        policy forgets the scores when a run is started again.
      count: how many.
    """

    scores: dict[int, float]
    count: int

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: Any
    ) -> Sequence[bool]:
        """Which checkpoints are among the best."""
        steps = [c.step for c in checkpoints if c.step in self.scores]
        best = sorted(steps, key=self.scores.__getitem__)[: self.count]
        return [c.step in best for c in checkpoints]


class Saver:
    """Saves the checkpoints of one run; a context manager.

    A save goes on in the background while training does. Whether it worked is known
    when the next one begins, or from `failed`. The next one is then repeated until it
    works, waiting longer each time, at most `checkpoint.save_retries` times. What the
    config does not keep is deleted when a later checkpoint has been written.
    """

    def __init__(self, path: Path, config: CheckpointConfig) -> None:
        """Opens the checkpoints of a workdir, all of which are good or older.

        Args:
          path: the workdir.
          config: what is kept.
        """
        self.directory = path / "checkpoints"
        self._path, self._retries = path, config.save_retries
        self._scores = _read_scores(path)
        managers = ocp.checkpoint_managers
        policies = [
            managers.LatestN(config.keep_latest),
            Best(self._scores, config.keep_best),
        ]
        if config.keep_every:
            policies.append(managers.EveryNSteps(config.keep_every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
        )
        try:
            self._manager = ocp.CheckpointManager(
                self.directory, options=options, item_handlers=_handlers()
            )
        except OSError as error:
            raise StorageError(
                f"{self.directory} cannot be made or read: {_in_one_line(error)}; make "
                "room or repair the storage, and give the same command again"
            ) from error
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "seal")
        self._sealing: concurrent.futures.Future[None] | None = None
        self._step: int | None = None  # of the last save
        self._pending = False  # whether its outcome is not known to all processes yet
        self._problem: str | None = None  # why it failed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        problem = self._problem or self._outcome()
        self._thread.shutdown()
        self._close_manager()
        if problem and error is None:
            raise StorageError(self._message(problem, 1))
        if problem and not isinstance(error, StorageError):
            say(f"warning: checkpoint {self._step} could not be saved: {problem}")

    def save(
        self,
        step: int,
        state: TrainState,
        next_example: int,
        config: Config,
        metrics: dict[str, float] | None = None,
        *,
        wait: bool = False,
    ) -> None:
        """Starts to save a checkpoint. Of several processes all have to call this.

        Args:
          step: updates made; a step that is saved already is not saved again.
          state: may be donated as soon as this returns.
          next_example: the place in the data, see `pipeline.TrainBatches`.
          config: of the run.
          metrics: numbers of an evaluation at this step, if there was one; `eval/nll`
            decides which checkpoints are the best.
          wait: whether to return only when the checkpoint is complete.

        Raises:
          StorageError: if it could not be saved, also after trying again.
        """
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(saved_form(state)),
            data=ocp.args.JsonSave({"next_example": next_example}),
            config=ocp.args.JsonSave(dataclasses.asdict(config)),
        )
        self.wait_until_finished()
        if self._problem is None:
            if step == self.latest_step():
                return
            self._attempt(step, items, metrics or {})
            if wait:
                self.wait_until_finished()
        for attempt in range(self._retries):
            if self._problem is None:
                return
            seconds = RETRY_SECONDS * 2**attempt
            say(
                f"warning: checkpoint {self._step} could not be saved: {self._problem}"
                f"; trying again with step {step} in {seconds:g} s "
                f"({attempt + 1} of {self._retries})"
            )
            time.sleep(seconds)
            self._clean_up()
            self._attempt(step, items, metrics or {})
            self.wait_until_finished()
        if self._problem is not None:
            self._clean_up()
            raise StorageError(self._message(self._problem, self._retries + 1))

    def failed(self) -> bool:
        """Whether the last save has failed, so that another one is to be made now.

        Of several processes none knows of the others, so this is False; `save` finds
        out.
        """
        if jax.process_count() > 1:
            return False
        done = self._sealing is not None and self._sealing.done()
        return self._problem is not None or (
            done and self._sealing is not None and self._sealing.exception() is not None
        )

    def wait_until_finished(self) -> None:
        """Waits for a save; if it failed, the next one will tell. For all processes."""
        if self._pending and self._problem is None:
            self._problem = agree(self._outcome())
        self._pending = False

    def latest_step(self) -> int | None:
        """The newest checkpoint that is complete."""
        complete = [
            step
            for step in checkpoint_steps(self._path)
            if (directory_of(self._path, step) / manifest.NAME).exists()
        ]
        return max(complete, default=None)

    def drop_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps, which a run goes back behind.

        Of several processes all have to call this.
        """
        self.wait_until_finished()
        for later in [s for s in self._manager.all_steps() if s > step]:
            self._manager.delete(later)

    def _attempt(self, step: int, items: Any, metrics: dict[str, float]) -> None:
        self._step, self._pending = step, True
        self._problem = agree(self._start(step, items, metrics))

    def _start(self, step: int, items: Any, metrics: dict[str, float]) -> str | None:
        """Starts a save; returns what went wrong in this process."""
        if not self.directory.is_dir():
            return f"{self.directory} has vanished"
        if set(self._manager.all_steps()) - set(checkpoint_steps(self._path)):
            self._manager.reload()  # a damaged one was moved aside since
        try:
            self._manager.save(step, args=items, force=True)
        except _FAILURES as error:
            return _in_one_line(error)
        self._scores.pop(step, None)  # of a run that went back behind it
        score = score_of(metrics)
        if score is not None:
            self._scores[step] = score
        self._sealing = self._thread.submit(self._seal, step, metrics)
        return None

    def _seal(self, step: int, metrics: dict[str, float]) -> None:
        self._manager.wait_until_finished()
        if jax.process_index() == 0:
            directory = directory_of(self._path, step)
            manifest.write(directory, saved=time.time(), metrics=metrics)

    def _outcome(self) -> str | None:
        """Waits for a save; returns what went wrong in this process."""
        sealing, self._sealing = self._sealing, None
        if sealing is None:
            return None
        try:
            sealing.result()
        except _FAILURES as error:
            if not self.directory.is_dir():
                return f"{self.directory} has vanished"
            return _in_one_line(error)
        return None

    def _clean_up(self) -> None:
        """Removes what a failed save has left."""
        self._outcome()  # in another process it may have gone well
        try:
            self._manager.wait_until_finished()
        except _FAILURES:
            pass  # told already; Orbax raises it once in each thread
        if jax.process_index() == 0:
            for left in self.directory.glob(f"{self._step}*"):
                ours = left.name.split(".")[0] == str(self._step)
                if ours and not (left / manifest.NAME).exists():
                    shutil.rmtree(left, ignore_errors=True)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("a failed save is cleaned up")
        self._manager.reload()

    def _close_manager(self) -> None:
        try:
            self._manager.close()
        except _FAILURES:
            self._manager.close()  # the error of a save, told already, is raised once

    def _message(self, problem: str, attempts: int) -> str:
        good = self.latest_step()
        where = "there is none before" if good is None else f"{good} is good"
        return (
            f"checkpoint {self._step} could not be saved in {self.directory}, tried "
            f"{attempts} times: {problem}; {where}; make room or repair the storage, "
            "and give the same command again"
        )


def score_of(metrics: dict[str, float]) -> float | None:
    """What a checkpoint is judged by, of its evaluation; None if there was none."""
    found = [metrics[name] for name in SCORES if name in metrics]
    return found[0] if found else None


def _handlers() -> dict[str, Any]:
    """How the parts of a checkpoint are written."""
    return {
        # Compression saves a twelfth of the bytes and takes as long as all the rest.
        "state": ocp.PyTreeCheckpointHandler(use_compression=False),
        "data": ocp.JsonCheckpointHandler(),
        "config": ocp.JsonCheckpointHandler(),
    }


def _read_scores(path: Path) -> dict[int, float]:
    scores = {}
    for step in checkpoint_steps(path):
        try:
            metrics = manifest.read(directory_of(path, step)).metrics
        except (FileNotFoundError, manifest.DamagedManifest):
            continue  # an older one, which nobody asked for
        score = score_of(metrics)
        if score is not None:
            scores[step] = score
    return scores


def _in_one_line(error: BaseException) -> str:
    """The cause of a failure, out of what may be pages."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    code = re.search(r"os_error_code='(\d+)'", text)  # as TensorStore says it
    if code:
        return os.strerror(int(code[1]))
    return f"{type(error).__name__}: {text[:200]}"
