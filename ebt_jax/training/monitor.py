"""What a run says: numbers to files, a progress line to the terminal.

Of several processes only the first says anything.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax

from ebt_jax.errors import StorageError, UserError
from ebt_jax.training.config import Config, LogConfig
from ebt_jax.training.workdir import replace_text
from ebt_jax.training.writers import Lines, TensorBoard, check_there

RATES = {  # and what a progress line calls them
    "tokens_per_second": "tok",
    "frames_per_second": "frames",
    "images_per_second": "images",
}
PROGRESS_SECONDS = 10.0  # between progress lines, where they cannot be rewritten


def check_logging(config: LogConfig) -> None:
    """Checks that what is asked for is installed.

    Raises:
      UserError: naming what to install.
    """
    if config.wandb_project and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"log.wandb_project is {config.wandb_project!r}, but wandb is not "
            "installed; pip install 'ebt-jax[wandb]', or leave it empty"
        )


def say(text: str) -> None:
    """Prints a line to stderr, in the first process."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


class Monitor:
    """The voice of one run; a context manager.

    Numbers go to `metrics.jsonl` (one object per line, appended), to TensorBoard files
    in `tensorboard/` and to Weights & Biases, as `config.log` says. Lines of a run that
    went on after its last checkpoint are dropped when it is continued: the file then
    equals that of a run that was never interrupted, but for what is measured in seconds
    or bytes.

    While the files cannot be written, as on a full disk, numbers are kept in memory and
    written when it works again. A workdir that has vanished ends the run.
    """

    def __init__(
        self,
        workdir: Path,
        config: Config,
        *,
        start: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Opens the files.

        Args:
          workdir: of the run.
          config: of the run; `log` says what to write.
          start: updates made before; what was written of later ones is dropped.
          clock: seconds.

        Raises:
          StorageError: if they cannot be.
        """
        self._workdir = workdir
        self._steps = config.train.steps
        self._clock = clock
        self._in_place = sys.stderr.isatty()
        self._line_open = False  # a progress line that is not ended yet
        self._shown = -math.inf  # when a progress line was last printed
        self._first: tuple[int, float] | None = None  # step and time, for the ETA
        self._seconds_before = 0.0
        self._began = clock()
        self._failing = False  # whether the last numbers could not be written
        self._lines = self._tensorboard = self._wandb = None
        if jax.process_index():
            return
        self._lines = Lines(workdir / "metrics.jsonl")
        try:
            self._seconds_before = rewind(self._lines.file, start)
        except OSError as error:
            raise StorageError(
                f"{self._lines.file} cannot be read or written: {error.strerror}; make "
                "room or repair the storage, and give the same command again"
            ) from error
        if config.log.tensorboard:
            self._tensorboard = TensorBoard(workdir / "tensorboard", start + 1)
        if config.log.wandb_project:
            self._wandb = _start_wandb(workdir, config)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end_line()
        if self._lines and self._failing:
            self._try_to_write(self._lines.flush)
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish(exit_code=int(error is not None))

    def say(self, text: str) -> None:
        """Prints a line to stderr."""
        self._end_line()
        say(text)

    def record(self, step: int, values: dict[str, float]) -> None:
        """Writes the numbers of a step, and `seconds` of the run so far.

        Args:
          step: updates made.
          values: `train/...`, `eval/...`, `tokens_per_second`; null where not finite.

        Raises:
          Stopped: if the workdir has vanished.
        """
        if self._lines is None:
            return
        check_there(self._workdir)
        now = self._clock()
        seconds = round(self._seconds_before + now - self._began, 3)
        row = {"step": step, **finite(values), "seconds": seconds}
        scalars = {k: v for k, v in row.items() if v is not None and k != "step"}
        self._write(json.dumps(row, allow_nan=False), step, scalars)
        if self._wandb:
            self._wandb.log(scalars, step=step)
        self._progress(step, row, now)

    def _write(self, line: str, step: int, scalars: dict[str, float]) -> None:
        lines, tensorboard = self._lines, self._tensorboard
        assert lines is not None
        written = self._try_to_write(lambda: lines.write(line))
        if tensorboard:
            seconds = time.time()
            written &= self._try_to_write(
                lambda: tensorboard.write(step, scalars, seconds)
            )
        if written and self._failing:
            self.say("numbers are written again, also those that were kept")
        self._failing = not written

    def _try_to_write(self, write: Callable[[], None]) -> bool:
        try:
            write()
        except OSError as error:
            if not self._failing:
                self._failing = True
                self.say(
                    f"warning: {self._workdir} cannot be written: {error.strerror}; "
                    "numbers are kept in memory until it can"
                )
            return False
        return True

    def _progress(self, step: int, row: dict[str, Any], now: float) -> None:
        if self._first is None:
            self._first = (step, now)  # compilation is over
        due = now - self._shown >= PROGRESS_SECONDS or step == self._steps
        if not (self._in_place or due):
            return
        self._shown = now
        line = progress_line(step, self._steps, row, self._remaining(step, now))
        if self._in_place:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
            self._line_open = True
        else:
            print(line, file=sys.stderr, flush=True)

    def _remaining(self, step: int, now: float) -> float | None:
        first_step, first_time = self._first or (step, now)
        if step == first_step:
            return None
        return (now - first_time) / (step - first_step) * (self._steps - step)

    def _end_line(self) -> None:
        if self._line_open:
            print(file=sys.stderr, flush=True)
            self._line_open = False


def finite(values: dict[str, float]) -> dict[str, float | None]:
    """None in place of what is not finite, which JSON cannot hold."""
    return {k: v if math.isfinite(v) else None for k, v in values.items()}


def rewind(file: Path, step: int) -> float:
    """Drops the lines of a file that come after a step, in one go.

    Returns:
      `seconds` of the last line kept that has it, 0 if there is none.
    """
    if not file.exists():
        return 0.0
    kept, seconds = [], 0.0
    for line in file.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break  # half a line, of a run killed while writing it
        if row["step"] > step:
            break
        kept.append(line + "\n")
        if "seconds" in row:
            seconds = row["seconds"]
    replace_text(file, "".join(kept))
    return seconds


def progress_line(
    step: int, steps: int, row: dict[str, Any], remaining: float | None
) -> str:
    """`step 1200/5000 24% | loss 2.31 | nll 2.29 | 41k tok/s | 3m12s left`."""
    parts = [f"step {step}/{steps} {100 * step // steps}%"]
    for name in ("loss", "nll", "smooth_l1"):
        value = row.get(f"train/{name}")
        if value is not None:
            parts.append(f"{name} {value:.4g}")
    for name, short in RATES.items():
        if name in row:
            parts.append(f"{short_count(row[name])} {short}/s")
    if remaining is not None:
        parts.append(f"{short_duration(remaining)} left")
    return " | ".join(parts)


def short_count(number: float) -> str:
    """950, 4.1k, 41k, 1.2M: at most three digits."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.{1 if number < 10 * size else 0}f}{unit}"
    return f"{number:.0f}"


def short_duration(seconds: float) -> str:
    """45s, 3m12s, 2h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _start_wandb(workdir: Path, config: Config) -> Any:
    # Optional, hence imported where it is asked for; see check_logging.
    import wandb  # pyright: ignore[reportMissingImports]

    file = workdir / "wandb_id"  # so that a continued run is one run there as well
    if not file.exists():
        replace_text(file, secrets.token_hex(4))
    return wandb.init(
        project=config.log.wandb_project,
        name=workdir.name,
        dir=str(workdir),
        id=file.read_text(),
        resume="allow",
        config=dataclasses.asdict(config),
    )
