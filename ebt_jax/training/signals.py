"""Being told to stop: SIGTERM, preemption notices and Ctrl-C end a run in order."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Self

import jax
from jax.experimental import multihost_utils


class StopSignals:
    """Listens while a run goes on; a context manager.

    SIGTERM and the first Ctrl-C ask for an end in order, the second Ctrl-C ends at
    once.

    Several processes have to stop after the same update, or they would wait for each
    other for ever. JAX's preemption service sees to that: it takes SIGTERM in any of
    them, tells the others in the background, and names an update that none has begun.
    Asking it costs no communication, so it can be asked after each update. Ctrl-C is
    handed to it as a SIGTERM.

    Outside of the main thread Python takes no signals, and nothing is heard.
    """

    def __init__(self) -> None:
        self.interrupted = False  # by Ctrl-C
        self._told = False
        self._updates = 0
        self._several = jax.process_count() > 1
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._listen(signal.SIGINT)
            if not self._several:  # else JAX has taken it
                self._listen(signal.SIGTERM)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def stop_now(self) -> bool:
        """Whether to stop; to be asked after each update, in each process."""
        self._updates += 1
        if self._several:
            return multihost_utils.reached_preemption_sync_point(self._updates)
        return self._told

    def _listen(self, number: signal.Signals) -> None:
        self._before[number] = signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            # Not print, which a signal may have interrupted.
            os.write(2, b"\nCtrl-C: saves after this step and stops; again: at once\n")
            if self._several:
                os.kill(os.getpid(), signal.SIGTERM)
        self._told = True
