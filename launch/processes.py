"""Processes on this host: their part of it, their signals, how they end.

What `local.py` and `sweep.py` share.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, NamedTuple

from ebt_jax.errors import UserError

DIVERGED, MISTAKE, STOPPED = 3, 2, 75  # exit codes of `ebt train`, most telling first
POLL_SECONDS = 0.05  # between looks at the processes
LONGEST_BACKOFF = 300.0  # seconds

Popen = subprocess.Popen[bytes]


class Process(NamedTuple):
    """A process to be started.

    Attributes:
      command: the program and its arguments.
      environment: variables set on top of this program's own.
    """

    command: list[str]
    environment: dict[str, str]


class Outcome(NamedTuple):
    """How a set of processes ended.

    Attributes:
      code: the exit code that stands for all.
      again: whether the same command can go on from there.
    """

    code: int
    again: bool


def share(
    place: int,
    places: int,
    devices: int,
    platform: str,
    environment: Mapping[str, str],
) -> dict[str, str]:
    """The environment that gives a process its part of this host.

    Args:
      place: which part.
      places: how many parts the host is split into.
      devices: of each part.
      platform: `cpu` or `cuda`.
      environment: of this program.

    Returns:
      Variables to be set. XLA takes the size of its CPU thread pools from NPROC; left
      alone, every process would have a thread for each core of the host.

    Raises:
      UserError: where there are fewer GPUs than are asked for.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    threads = max(1, (cores or os.cpu_count() or 1) // places)
    variables = {} if "NPROC" in environment else {"NPROC": str(threads)}
    if platform == "cpu":
        wanted = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        return variables | wanted
    gpus = [str(i) for i in range(places * devices)]
    if "CUDA_VISIBLE_DEVICES" in environment:
        gpus = [gpu for gpu in environment["CUDA_VISIBLE_DEVICES"].split(",") if gpu]
    if len(gpus) < places * devices:
        raise UserError(
            f"CUDA_VISIBLE_DEVICES names {len(gpus)} GPUs, but {places} x {devices} "
            "are asked for; name more, or lower --devices"
        )
    mine = gpus[place * devices : (place + 1) * devices]
    wanted = {"JAX_PLATFORMS": "cuda,cpu", "CUDA_VISIBLE_DEVICES": ",".join(mine)}
    return variables | wanted


def supervise(
    plan: Callable[[], Sequence[Process]], grace: float, retries: int, backoff: float
) -> int:
    """Runs processes, and starts them again while they can go on.

    Args:
      plan: the processes of a start; called anew each time, for a fresh port.
      grace: seconds, as in `run_once`.
      retries: new starts, at most.
      backoff: seconds before the first new start; doubled each time.

    Returns:
      The exit code of the last start.
    """
    with incoming_signals() as signals:
        outcome = run_once(plan(), grace, signals)
        for retry in range(retries):
            if not outcome.again:
                break
            wait = min(backoff * 2**retry, LONGEST_BACKOFF)
            say(
                f"exit code {outcome.code}; starts again in {wait:g} s "
                f"({retry + 1} of {retries})"
            )
            if next_signal(signals, wait):
                break
            outcome = run_once(plan(), grace, signals)
    return outcome.code


def run_once(
    processes: Sequence[Process], grace: float, signals: queue.SimpleQueue[int]
) -> Outcome:
    """Starts processes and waits until all have ended.

    Args:
      processes: what to start.
      grace: seconds from the first one that ends badly until the rest is killed.
      signals: of `incoming_signals`; passed on.

    Returns:
      How it ended. It does not go on by itself after a signal.
    """
    running = {
        i: start(process, subprocess.PIPE if i else None)
        for i, process in enumerate(processes)
    }
    pumps = [
        thread
        for i, process in running.items()
        if i
        for thread in copy_output(process, f"[{i}] ".encode())
    ]
    try:
        ended, told = _watch(running, grace, signals)
    finally:
        for process in running.values():  # only where this program itself failed
            process.kill()
    for pump in pumps:
        pump.join(timeout=5)  # a grandchild may hold the pipe open
    outcome = verdict(ended)
    return outcome._replace(again=outcome.again and not told)


def _watch(
    running: dict[int, Popen], grace: float, signals: queue.SimpleQueue[int]
) -> tuple[list[int], bool]:
    """Waits until all have ended, which empties `running`.

    Returns:
      Return codes in the order of their end, and whether a signal came.
    """
    ended: list[int] = []  # return codes, in the order of their end
    deadline = math.inf
    told = False
    while running:
        for i, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[i]
            if process.returncode and not any(ended):
                deadline = time.monotonic() + grace
                if running:
                    say(f"process {i} ended with {_named(process.returncode)}")
            ended.append(process.returncode)
        if running and time.monotonic() > deadline:
            say(f"kills the {len(running)} left after {grace:g} s of grace")
            deadline = math.inf
            for process in running.values():
                process.kill()
        number = next_signal(signals, POLL_SECONDS)
        for process in running.values() if number else ():
            # The second Ctrl-C: whoever presses it does not want to wait.
            again = told and number == signal.SIGINT
            process.send_signal(signal.SIGKILL if again else number)
        told = told or number != 0
    return ended, told


def verdict(ended: Sequence[int]) -> Outcome:
    """What the return codes of processes mean together.

    Args:
      ended: return codes in the order of their end; -N for signal N.
    """
    bad = [code for code in ended if code]
    if not bad:
        return Outcome(0, again=False)
    for code in (DIVERGED, MISTAKE, STOPPED):
        if code in bad:
            return Outcome(code, again=code == STOPPED)
    first = bad[0]
    return Outcome(first if first > 0 else 128 - first, again=first < 0)


@contextlib.contextmanager
def incoming_signals() -> Iterator[queue.SimpleQueue[int]]:
    """Collects SIGINT and SIGTERM, in place of what they do otherwise.

    SIGHUP, when a terminal is closed, becomes SIGTERM, unless nohup has it ignored.
    Nothing is done in the handler, so no process can start unseen beside it.
    """
    signals: queue.SimpleQueue[int] = queue.SimpleQueue()
    meanings = {number: number for number in (signal.SIGINT, signal.SIGTERM)}
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        meanings[signal.SIGHUP] = signal.SIGTERM
    handler = lambda number, frame: signals.put(meanings[number])
    before = {number: signal.signal(number, handler) for number in meanings}
    try:
        yield signals
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def next_signal(signals: queue.SimpleQueue[int], seconds: float) -> int:
    """Waits for a signal; 0 if none came."""
    try:
        return signals.get(timeout=seconds)
    except queue.Empty:
        return 0


def start(process: Process, output: IO[bytes] | int | None) -> Popen:
    """Starts a process, in a group of its own: Ctrl-C reaches it through us alone.

    Args:
      process: what to start.
      output: where it writes; None: where this program does.
    """
    return subprocess.Popen(
        process.command,
        env=os.environ | process.environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        process_group=0,
    )


def copy_output(process: Popen, prefix: bytes) -> list[threading.Thread]:
    """Threads that copy what a process pipes to us, line by line, behind a prefix."""
    pairs = ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
    threads = [
        threading.Thread(
            target=_copy, args=(source, target.fileno(), prefix), daemon=True
        )
        for source, target in pairs
    ]
    for thread in threads:
        thread.start()
    return threads


def shell_line(process: Process) -> str:
    """The process as a line for a shell."""
    variables = [f"{k}={shlex.quote(v)}" for k, v in process.environment.items()]
    return " ".join([*variables, shlex.join(process.command)])


def say(text: str) -> None:
    """Prints a line of this program's own to stderr, if there still is one."""
    with contextlib.suppress(OSError):
        print(f"launch: {text}", file=sys.stderr, flush=True)


def _copy(source: IO[bytes], target: int, prefix: bytes) -> None:
    with source:
        for line in source:
            os.write(target, prefix + line.rstrip(b"\n") + b"\n")


def _named(code: int) -> str:
    return f"exit code {code}" if code > 0 else f"signal {-code}"
