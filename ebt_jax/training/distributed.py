"""Several processes that train one model: how they find each other, and how they end.

JAX connects the processes; what is here makes their end an orderly one. By itself JAX
aborts every process that learns of another's death, and one that waits for a dead one
in a collective may wait for ever. So each process counts in the key-value store that
JAX keeps in process 0, and looks at the counts of the others. One that has stopped
counting, or has left with an error, ends all others within a bounded time, with one
line and exit code 75, which launchers try again on.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

import jax

from ebt_jax.errors import Stopped, TrainingDiverged, UserError, exit_code, one_line

BEAT_SECONDS = 1.0  # between two counts of a process
GRACE_SECONDS = 5.0  # for others to learn what happened before process 0 is gone
LEAVING_SECONDS = 60.0  # that a process that stops in order waits for the others to
FINISHING_SECONDS = 1800.0  # that a process waits for others to finish what it has
_BEATS, _LEFT = "ebt/beat", "ebt/left"


@dataclasses.dataclass(frozen=True)
class Processes:
    """Which processes there are, as the command line has it.

    Attributes:
      detect: asks the cluster: Cloud TPU, SLURM, Open MPI, GKE and JobSet.
      coordinator: HOST:PORT of process 0, where the others can reach it.
      count: how many processes there are.
      index: which of them this is, from 0.
      connect_seconds: until all of them have to be there.
      heartbeat_seconds: without a sign of life, after which a process counts as dead.
    """

    detect: bool = False
    coordinator: str | None = None
    count: int | None = None
    index: int | None = None
    connect_seconds: int = 300
    heartbeat_seconds: int = 60

    def __post_init__(self) -> None:
        given = {
            "--coordinator": self.coordinator,
            "--num_processes": self.count,
            "--process_id": self.index,
        }
        missing = [name for name, value in given.items() if value is None]
        if self.detect and len(missing) < len(given):
            name = next(name for name in given if name not in missing)
            raise UserError(
                f"--distributed asks the cluster, but {name} is given, too; leave one "
                "of them out"
            )
        if missing and len(missing) < len(given):
            raise UserError(
                f"{missing[0]} is missing; several processes need --coordinator, "
                "--num_processes and --process_id, or --distributed alone"
            )
        if self.coordinator is None or self.count is None or self.index is None:
            return
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 2**16:
            raise UserError(
                f"--coordinator is {self.coordinator!r}, but has to be HOST:PORT of "
                "process 0, such as 10.0.0.1:1234"
            )
        if not 0 <= self.index < self.count:
            raise UserError(
                f"--process_id is {self.index}, but has to be from 0 to "
                f"{self.count - 1}, one less than --num_processes"
            )

    @property
    def several(self) -> bool:
        """Whether there is anything to start."""
        return self.detect or self.coordinator is not None


@contextlib.contextmanager
def running(processes: Processes) -> Iterator[None]:
    """Connects the processes for a run, and ends it in all of them.

    An end that all have in common, be it that they are done, SIGTERM or divergence, is
    an orderly one. An error that only one of them has ends all: that one with its own
    exit code, and the others with 75.

    Args:
      processes: of the command line. For a single process nothing happens.

    Raises:
      UserError: if they cannot be connected.
      Stopped: if the others do not come.
    """
    if not processes.several:
        yield
        return
    _connect(processes)
    peers = _Peers(processes.heartbeat_seconds)
    with peers.watched():
        try:
            yield
        except BaseException as error:
            peers.leave(error)
            raise
        peers.finish()
    jax.distributed.shutdown()


def _connect(processes: Processes) -> None:
    coordinator, seconds = processes.coordinator, processes.connect_seconds
    if coordinator is not None and processes.index:
        _reach(coordinator, seconds)

    def give_up() -> None:
        found = f"process {processes.index} " if processes.index is not None else ""
        total = f"all {processes.count}" if processes.count else "all"
        _end(
            f"stopped: {found}waited {seconds} s for {total} processes to connect, but "
            "some did not; see what they say, or raise --connect_seconds",
            75,
        )

    # JAX aborts when its own time is over, so ours is over before.
    alarm = threading.Timer(seconds, give_up)
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            coordinator,
            processes.count,
            processes.index,
            # Devices are those that the process sees, unless the cluster says more.
            cluster_detection_method=None if processes.detect else "deactivate",
            initialization_timeout=seconds + 60,
            # Its own way to end is an abort, hence only where ours fails.
            heartbeat_timeout_seconds=processes.heartbeat_seconds + 60,
            shutdown_timeout_seconds=60,
        )
    except (ValueError, RuntimeError) as error:
        if processes.detect:
            raise UserError(
                "--distributed: neither a TPU pod nor SLURM, Open MPI or Kubernetes "
                f"says which processes there are ({error}); give --coordinator, "
                "--num_processes and --process_id"
            ) from error
        raise UserError(
            f"process {processes.index} cannot listen at the port of {coordinator}: "
            f"{error}; name a port that is free"
        ) from error
    finally:
        alarm.cancel()


def _reach(address: str, seconds: float) -> None:
    """Waits until process 0 listens.

    Raises:
      UserError: if there is no host of that name.
      Stopped: if nothing listens in time.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        socket.getaddrinfo(host, int(port))
    except OSError as error:
        raise UserError(
            f"--coordinator is {address}, but there is no host {host!r}; name the host "
            "of process 0"
        ) from error
    deadline = time.monotonic() + seconds
    while not _listens(address):
        if time.monotonic() > deadline:
            raise Stopped(
                f"--coordinator {address} cannot be reached for {seconds:g} s; is "
                "process 0 running there, and does a firewall let it through?"
            )
        time.sleep(0.2)


def _listens(address: str, seconds: float = 2.0) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), seconds):
            return True
    except OSError:
        return False


class _Peers:
    """The other processes: who counts, who has left."""

    def __init__(self, patience: float) -> None:
        # JAX has no public name for its key-value store; Orbax uses it this way, too.
        from jax._src import distributed

        self._store: Any = distributed.global_state.client
        self._address: str = distributed.global_state.coordinator_address or ""
        self._me, self._count = jax.process_index(), jax.process_count()
        self._patience = patience
        self._over = threading.Event()
        self._leaving: tuple[str, int] | None = None  # our own last line, and exit code
        self._left: dict[int, tuple[str, float]] = {}  # theirs, and when it was seen
        now = time.monotonic()
        self._seen = {i: ("", now) for i in range(self._count)}  # count, and since when

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Counts, and ends this process once another is lost."""
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        with self._aborts_explained():
            try:
                yield
            finally:
                self._over.set()
                thread.join(timeout=GRACE_SECONDS)

    def finish(self) -> None:
        """Waits until all are done; a process that dies until then still ends all."""
        self._meet("done", FINISHING_SECONDS)

    def leave(self, error: BaseException) -> None:
        """Ends this process with its error, unless it turns out to be another's fault.

        Returns only where all processes leave together, in order.
        """
        ours = isinstance(error, (UserError, Stopped, TrainingDiverged))
        if not ours and not isinstance(error, KeyboardInterrupt):
            self._blame_others()
        line = one_line(error) if ours else f"{type(error).__name__}: {error}"
        self._leaving = line, exit_code(error)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            left = f"{_LEFT}/{self._me}"
            text = f"{self._leaving[1]} {line}"
            self._store.key_value_set(left, text, allow_overwrite=True)
            # Process 0 is the last to go: the others ask it why.
            seconds = _patience(text) + GRACE_SECONDS * (self._me == 0)
            self._meet(f"left with {self._leaving[1]}", seconds)
            jax.distributed.shutdown()
            return
        if not ours:
            traceback.print_exception(error)
        _end(*self._leaving)

    def _meet(self, place: str, seconds: float) -> None:
        self._store.wait_at_barrier(f"ebt/{place}", int(1000 * seconds))

    def _blame_others(self) -> None:
        """Ends this process if, within a few beats, another turns out to be lost."""
        deadline = time.monotonic() + 6 * BEAT_SECONDS
        while time.monotonic() < deadline:
            self._look(patience=4 * BEAT_SECONDS)
            time.sleep(BEAT_SECONDS / 2)

    def _watch(self) -> None:
        beats = 0
        while not self._over.wait(BEAT_SECONDS):
            beats += 1
            try:
                mine = f"{_BEATS}/{self._me}"
                self._store.key_value_set(mine, str(beats), allow_overwrite=True)
            except jax.errors.JaxRuntimeError:
                self._check_coordinator()
            self._look(self._patience)

    def _look(self, patience: float) -> None:
        """Ends this process if another has left, or has not counted for a while."""
        try:
            beats = dict(self._store.key_value_dir_get(_BEATS))
            left = dict(self._store.key_value_dir_get(_LEFT))
        except jax.errors.JaxRuntimeError:
            self._check_coordinator()
            return
        now = time.monotonic()
        for index in range(self._count):
            if index == self._me:
                continue
            beat = beats.get(f"{_BEATS}/{index}", "")
            if beat != self._seen[index][0]:
                self._seen[index] = (beat, now)
            elif now - self._seen[index][1] > patience:
                self._lost(index)
            text = left.get(f"{_LEFT}/{index}")
            if text is not None and self._leaving is None:
                _, since = self._left.setdefault(index, (text, now))
                if now - since > _patience(text):
                    self._lost(index)

    def _check_coordinator(self) -> None:
        if not self._over.is_set() and self._me and not _listens(self._address):
            self._lost(0)

    def _lost(self, index: int) -> NoReturn:
        if self._leaving is not None:
            _end(*self._leaving)
        what = "died or cannot be reached"
        if index in self._left:
            what = f"has ended ({self._left[index][0].split(maxsplit=1)[1]})"
        if self._me == 0:
            time.sleep(GRACE_SECONDS)  # without us, the others could not ask who it was
        _end(
            f"stopped: process {index} of {self._count} {what}; start all processes "
            "again with the same command to continue at the newest checkpoint",
            75,
        )

    @contextlib.contextmanager
    def _aborts_explained(self) -> Iterator[None]:
        """Ends this process in order where JAX aborts it because process 0 is gone.

        JAX has no hook for that (its callback cannot be a Python function), but an
        abort is a signal of the thread that aborts. Any other abort takes its course.
        """
        if self._me == 0:
            yield
            return
        library = ctypes.CDLL(None)
        library.signal.restype = ctypes.c_void_p
        library.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]

        @ctypes.CFUNCTYPE(None, ctypes.c_int)
        def explain(_: int) -> None:
            self._check_coordinator()
            library.signal(signal.SIGABRT, None)  # abort() goes on to end the process

        before = library.signal(
            signal.SIGABRT, ctypes.cast(explain, ctypes.c_void_p).value
        )
        try:
            yield
        finally:
            library.signal(signal.SIGABRT, before)


def _patience(left: str) -> float:
    """Seconds until a process that has left as `CODE WHY` is not waited for any more.

    What it met in order, such as SIGTERM, the others meet, too; an error they may not.
    """
    return GRACE_SECONDS if left.split()[0] in ("1", "2") else LEAVING_SECONDS


_ENDING = threading.Lock()


def _end(line: str, code: int) -> NoReturn:
    """Ends the process at once: what is orderly would wait for the others.

    Only the first caller speaks.
    """
    with _ENDING:
        print(line, file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(code)
