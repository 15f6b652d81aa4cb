"""What can be seen of a run from outside: heartbeats, stacks of a hang, profiles."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import jax

from ebt_jax.training.config import LogConfig
from ebt_jax.training.monitor import say
from ebt_jax.training.workdir import replace_text

PATIENCE = 3.0  # times longer than a step: compiling, evaluating, saving
ARM_SECONDS = 1.0  # between two arms of the watchdog: each starts a thread


class Watch:
    """Watches one process of a run; a context manager.

    In the workdir:
      heartbeats/process-00000.json: step, time, host, pid and what is being done;
        written at logged steps and when something else than a step begins.
      stacks-00000.txt: where all threads were, each time no step has finished for
        `log.hang_seconds`. The run goes on: a slow disk is not a reason to end it.
      profile-STEP/: of `jax.profiler`, for steps named in `log.profile_step` or, while
        it runs, when a file `profile` appears; by the first process.

    None of this ever ends a run: where the workdir cannot be written, it is left out.
    """

    def __init__(
        self,
        path: Path,
        config: LogConfig,
        step: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begins to watch; the first step is given time to be compiled.

        Args:
          path: the workdir.
          config: of the run.
          step: updates made before.
          clock: seconds.
        """
        self._path, self._config, self._clock = path, config, clock
        self._index, self.step = jax.process_index(), step
        self._profile: tuple[int, Path] | None = None  # last step, and directory
        self._watchdog = Watchdog(
            config.hang_seconds, path / f"stacks-{self._index:05d}.txt", clock
        )

    def __enter__(self) -> Self:
        self._watchdog.start()
        self._enter_phase("compiling")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._watchdog.stop()
        if self._profile:
            self._end_profile()
        self._beat("ended" if error is None else f"ended: {kind and kind.__name__}")

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Something else than a step, which may take longer."""
        self._enter_phase(name)
        yield
        self._enter_phase("training")

    def before_step(self, step: int) -> None:
        """Begins a profile where one is due."""
        if self._index or self._profile:
            return
        wish, length = self._path / "profile", self._config.profile_steps
        if step != self._config.profile_step:
            if not wish.exists():
                return
            with contextlib.suppress(OSError):
                wish.unlink()
        directory = self._path / f"profile-{step}"
        try:
            jax.profiler.start_trace(str(directory))
        except (OSError, RuntimeError) as error:
            say(f"warning: steps from {step} on cannot be profiled: {error}")
            return
        self._profile = (step + length - 1, directory)

    def after_step(self, step: int, numbers: object) -> None:
        """Takes note of a step that was dispatched; ends a profile that is complete.

        Args:
          step: updates dispatched.
          numbers: of this one, which only the last of a profile is waited for.
        """
        if self.step == step - 1 and self._profile and step >= self._profile[0]:
            jax.block_until_ready(numbers)
            self._end_profile()
        self.step = step
        self._watchdog.alive()

    def logged(self) -> None:
        """A heartbeat, at a logged step."""
        self._beat("training")

    def _enter_phase(self, name: str) -> None:
        self._watchdog.alive(1.0 if name == "training" else PATIENCE)
        self._beat(name)

    def _beat(self, phase: str) -> None:
        beat = {
            "step": self.step,
            "time": time.time(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "phase": phase,
        }
        file = self._path / "heartbeats" / f"process-{self._index:05d}.json"
        with contextlib.suppress(OSError):
            if not file.parent.exists():
                file.parent.mkdir()  # not its parents: a workdir that is gone stays so
            replace_text(file, json.dumps(beat) + "\n")

    def _end_profile(self) -> None:
        assert self._profile is not None
        (last, directory), self._profile = self._profile, None
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:
            say(f"warning: {directory} cannot be written: {error}")
            return
        say(f"profile of the steps until {last} is in {directory}")


class Watchdog:
    """Writes down where all threads are when nothing has finished for a while.

    A timer of C's writes the file, also where a thread that hangs keeps all of Python
    from running; a thread of Python's tells it on stderr where it can.
    """

    def __init__(
        self, seconds: float, file: Path, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Watches nothing yet.

        Args:
          seconds: that a step may take; 0 to watch nothing.
          file: for the stacks.
          clock: seconds.
        """
        self._seconds, self._path, self._clock = seconds, file, clock
        self._limit = seconds
        self._seen = self._armed = -float("inf")
        self._told = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._file = None

    def start(self) -> None:
        """Watches from now on; without a file if none can be opened."""
        if not self._seconds:
            return
        with contextlib.suppress(OSError):
            self._file = self._path.open("a")
        self.alive(PATIENCE)
        self._thread.start()

    def stop(self) -> None:
        """Watches no more; a file without stacks is removed."""
        if not self._seconds:
            return
        self._over.set()
        self._thread.join()
        if self._file:
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            with contextlib.suppress(OSError):
                if not self._path.stat().st_size:
                    self._path.unlink()

    def alive(self, patience: float = 1.0) -> None:
        """Something has finished; what comes next may take so many times longer."""
        if not self._seconds or self._over.is_set():
            return
        now, limit = self._clock(), patience * self._seconds
        self._seen, self._told = now, False
        if limit == self._limit and now - self._armed < ARM_SECONDS:
            return
        self._limit, self._armed = limit, now
        if self._file:
            faulthandler.dump_traceback_later(limit, repeat=True, file=self._file)

    def _watch(self) -> None:
        while not self._over.wait(min(self._seconds / 4, 5.0)):
            waited = self._clock() - self._seen
            if waited < self._limit or self._told:
                continue
            self._told = True
            print(
                f"warning: process {jax.process_index()}: no step has finished for "
                f"{waited:.0f} s (log.hang_seconds); all threads are here, and in "
                f"{self._path}; the run goes on",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback(file=2)
