"""A pool of processes that makes the runs of a sweep on this host."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from processes import (
    LONGEST_BACKOFF,
    POLL_SECONDS,
    STOPPED,
    Popen,
    Process,
    incoming_signals,
    next_signal,
    say,
    start,
    verdict,
)
from rounds import Run

STATES = {0: "done", 2: "mistake", 3: "diverged", 75: "stopped"}


class Result(NamedTuple):
    """How a run ended.

    Attributes:
      state: a word or two.
      code: its exit code; None if it was never started.
      starts: how often it was started.
    """

    state: str
    code: int | None
    starts: int


LEFT_OUT = Result("left out", None, 0)  # as an earlier run of its workdir failed


def run_pool(
    runs: Sequence[Run],
    commands: Sequence[Sequence[str]],
    places: Sequence[Mapping[str, str]],
    retries: int,
    backoff: float,
    done: Collection[int] = (),
) -> list[Result]:
    """Runs all, as many at a time as there are places, those of a workdir in order.

    Args:
      runs: what to run.
      commands: of the runs, in their order.
      places: environments, one for each run at the same time.
      retries: new starts of a run that can go on.
      backoff: seconds before the first new start of a run; doubled each time.
      done: indices of runs that need not be started.

    Returns:
      How each ended.
    """
    results = [Result("not started", None, 0) for _ in runs]
    waiting = []  # when it may start, which
    for i, run in enumerate(runs):
        if i in done:
            results[i] = Result("was done", 0, 0)
            say(f"[{i + 1}/{len(runs)}] {run.workdir}: was done")
        else:
            waiting.append((0.0, i))
    free = list(range(len(places)))
    running: dict[int, tuple[int, Popen, int]] = {}  # run: place, process, log begins
    told = False
    with incoming_signals() as signals, contextlib.ExitStack() as crash:
        crash.callback(_kill, running)  # only where this program itself failed
        while running or (waiting and not told):
            pending = {*running, *(i for _, i in waiting)}
            ready = [
                (at, i) for at, i in waiting if pending.isdisjoint(_before(runs, i))
            ]
            due = min(ready, default=(float("inf"), -1))
            if free and not told and due[0] <= time.monotonic():
                waiting.remove(due)
                i = due[1]
                if any(results[j].code != 0 for j in _before(runs, i)):
                    results[i] = LEFT_OUT
                    say(f"[{i + 1}/{len(runs)}] {runs[i].workdir}: left out")
                    continue
                place = free.pop(0)
                process = Process(list(commands[i]), dict(places[place]))
                running[i] = (place, *_start_logged(process, log_of(runs[i])))
                results[i] = Result("running", None, results[i].starts + 1)
                say(f"[{i + 1}/{len(runs)}] {runs[i].workdir}: started")
                continue
            for i, (place, process, begins) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[i]
                free.append(place)
                outcome, starts = verdict([process.returncode]), results[i].starts
                state = _state(outcome.code, log_of(runs[i]), begins)
                results[i] = Result(state, outcome.code, starts)
                say(f"[{i + 1}/{len(runs)}] {runs[i].workdir}: {state}")
                if outcome.again and starts <= retries and not told:
                    wait = min(backoff * 2 ** (starts - 1), LONGEST_BACKOFF)
                    waiting.append((time.monotonic() + wait, i))
            number = next_signal(signals, POLL_SECONDS)
            for _, process, _ in running.values() if number else ():
                process.send_signal(number)
            told = told or number != 0
    return results


def log_of(run: Run) -> str:
    """The file that a run's output goes to; beside its workdir, which is its own."""
    return os.path.normpath(run.workdir) + ".log"


def table(runs: Sequence[Run], results: Sequence[Result]) -> str:
    """Results for people, one line each."""
    names = [
        run.workdir if run.verb == "train" else f"{run.workdir} {run.verb}"
        for run in runs
    ]
    width = max(len("workdir"), *map(len, names))
    lines = [f"{'workdir':<{width}}  {'state':<12}{'exit':>4}  {'starts':>6}"]
    for name, (state, code, starts) in zip(names, results, strict=True):
        shown = "-" if code is None else str(code)
        lines.append(f"{name:<{width}}  {state:<12}{shown:>4}  {starts:>6}")
    return "\n".join(lines)


def exit_code(results: Sequence[Result]) -> int:
    """0 if all are done, 75 if some were stopped in order or not started, else 1."""
    left = {result.code for result in results if result.code != 0}
    if not left:
        return 0
    return STOPPED if left <= {None, STOPPED} else 1


def _before(runs: Sequence[Run], i: int) -> list[int]:
    """Runs of the same workdir that are listed earlier."""
    return [j for j in range(i) if runs[j].workdir == runs[i].workdir]


def _kill(running: Mapping[int, tuple[int, Popen, int]]) -> None:
    for _, process, _ in running.values():
        process.kill()


def _start_logged(process: Process, log: str) -> tuple[Popen, int]:
    """The started process, and where in its log it begins to write."""
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        begins = file.seek(0, os.SEEK_END)
        return start(process, file), begins


def _state(code: int, log: str, begins: int) -> str:
    if code == 0:
        with open(log, "rb") as file:
            file.seek(begins)
            return "was done" if b"nothing to do" in file.read() else "done"
    return STATES[code] if code in STATES else "failed"
