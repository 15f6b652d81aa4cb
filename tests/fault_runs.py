"""Runs for tests/faults.py: started, watched for a moment, compared with others."""

from __future__ import annotations

import collections
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from ebt_jax.training import manifest
from ebt_jax.training.checkpoint import directory_of
from ebt_jax.training.workdir import checkpoint_steps

ROOT = Path(__file__).resolve().parents[1]
STEPS, EVERY = 150, 5  # of a run; between two of its checkpoints
PRESETS = ("transformer_pp", "s1")  # models that are trained, in turn
POLL_SECONDS = 0.0005  # between looks at a run
STOPPED, MISTAKE = 75, 2  # exit codes of `ebt train`
PATIENCE = 180.0  # seconds that a run has for anything

# The longest delay after each kind of moment, seconds.
DELAYS = {"start": 4.0, "update": 0.01, "saving": 0.08, "sealing": 0.005}

Rows = list[dict[str, Any]]


class Job(NamedTuple):
    """A training command.

    Attributes:
      workdir: of the run.
      preset: words of experiments/text.py besides `tiny`.
      flags: more flags of `ebt train`.
      processes: how many; launch/local.py starts them, but for one with one device.
      devices: of each process, simulated.
      launcher: more flags of launch/local.py.
    """

    workdir: Path
    preset: str = "transformer_pp"
    flags: tuple[str, ...] = ()
    processes: int = 1
    devices: int = 1
    launcher: tuple[str, ...] = ()


def command(job: Job) -> list[str]:
    """The program and its arguments."""
    train = [
        "train",
        f"--config={ROOT / 'experiments' / 'text.py'}:tiny,{job.preset}",
        f"--workdir={job.workdir}",
        f"--config.train.steps={STEPS}",
        f"--config.checkpoint.every={EVERY}",
        "--config.checkpoint.keep_latest=3",
        "--config.eval.every=0",
        "--config.eval.curve_steps=0",
        "--config.eval.sample_tokens=0",
        "--config.log.every=1",
        "--config.log.plots=false",
        "--config.log.tensorboard=false",
        "--config.log.example_ids=true",
        *job.flags,
    ]
    if job.processes == job.devices == 1:
        return [sys.executable, "-m", "ebt_jax", *train]
    local = [f"--processes={job.processes}", f"--devices={job.devices}", *job.launcher]
    return [sys.executable, str(ROOT / "launch" / "local.py"), *local, "--", *train]


class Moment(NamedTuple):
    """When something happens to a run.

    Attributes:
      kind: `start`, with the process; `update`, when some are made; `saving`, when a
        checkpoint is being written; `sealing`, when only its manifest is missing.
      count: which of those of this start, from 1.
      delay: seconds after that.
    """

    kind: str
    count: int
    delay: float


def choose_moment(draw: random.Random, kind: str) -> Moment:
    """A moment of a kind, early enough that a run outlives several."""
    count = draw.randint(1, 20 if kind == "update" else 3)
    return Moment(kind, count, draw.uniform(0.0, DELAYS[kind]))


class Start:
    """One start of a job, until its end; a context manager.

    Attributes:
      workdir: of the run.
      process: the program.
      good: step of the newest good checkpoint when it was started, None if none.
      damaged: steps of newer checkpoints, which are not.
      reached: updates that the run had begun before.
    """

    def __init__(self, job: Job) -> None:
        self.workdir = job.workdir
        self.good, self.reached = newest_good(job.workdir), last_update(job.workdir)
        steps = checkpoint_steps(job.workdir)
        self.damaged = [step for step in steps if step > (self.good or 0)]
        self._known = _unfinished(job.workdir)
        self._seen: set[tuple[str, int]] = set()
        name = f"told-{job.workdir.name}"
        number = len(list(job.workdir.parent.glob(f"{name}-*")))
        self._told = job.workdir.with_name(f"{name}-{number}")
        self._began = time.monotonic()
        with self._told.open("wb") as told:
            self.process = subprocess.Popen(
                command(job), cwd=ROOT, stdout=told, stderr=told
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            for child in children(self.process.pid):
                os.kill(child, signal.SIGKILL)
            self.process.kill()
            self.process.wait()

    @property
    def told(self) -> str:
        """What it has printed."""
        return self._told.read_text(errors="replace")

    @property
    def began_at(self) -> int | None:
        """The step it says that it continues at."""
        found = re.search(r"^continuing at step (\d+)$", self.told, re.MULTILINE)
        return int(found[1]) if found else None

    @property
    def lost(self) -> int | None:
        """Updates that are made again; None if it ended before it made any."""
        if self.began_at is None and last_update(self.workdir) == self.reached:
            return None
        return self.reached - (self.began_at or 0)

    def mistakes(self) -> list[str]:
        """What is wrong with where it began, once it has ended."""
        if self.lost is None:
            return []
        found = []
        if self.began_at != self.good:
            found.append(f"continued at {self.began_at}, but {self.good} is good")
        for step in self.damaged:
            if f"checkpoint {step} is not used: " not in self.told:
                found.append(f"did not say that checkpoint {step} is damaged")
        return found

    def end(self) -> int:
        """Waits for its end; the exit code, -N for signal N."""
        return self.process.wait(timeout=PATIENCE)

    def wait_for(self, moment: Moment) -> bool:
        """Waits for a moment; False where the run ends before it."""
        while not self._has_come(moment):
            if self.process.poll() is not None or self._seconds() > PATIENCE:
                return False
            time.sleep(POLL_SECONDS)
        if moment.kind != "start":
            time.sleep(moment.delay)
        return self.process.poll() is None

    def wait_for_line(self, text: str) -> bool:
        """Waits until it has printed a text; False where it ends before."""
        while text not in self.told:
            if self.process.poll() is not None or self._seconds() > PATIENCE:
                return text in self.told
            time.sleep(0.02)
        return True

    def _seconds(self) -> float:
        return time.monotonic() - self._began

    def _has_come(self, moment: Moment) -> bool:
        if moment.kind == "start":
            return self._seconds() >= moment.delay
        if moment.kind == "update":
            begun = self.began_at if self.good is not None else 0
            made = last_update(self.workdir)
            return begun is not None and made >= begun + moment.count
        self._seen |= {
            found for found in _unfinished(self.workdir) if _kind(found) == moment.kind
        }
        return len(self._seen - self._known) >= moment.count


def _unfinished(workdir: Path) -> set[tuple[str, int]]:
    """Names and inodes of the checkpoints that are not finished."""
    found = set()
    try:
        for entry in os.scandir(workdir / "checkpoints"):
            sealed = os.path.exists(os.path.join(entry.path, manifest.NAME))
            if not sealed:
                found.add((entry.name, entry.inode()))
    except FileNotFoundError:  # no checkpoints yet, or one is being renamed
        pass
    return found


def _kind(unfinished: tuple[str, int]) -> str:
    return "sealing" if unfinished[0].isdecimal() else "saving"


def children(process: int) -> dict[int, int]:
    """The processes that launch/local.py has started: their ids, by ours."""
    found = {}
    listed = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    for child in map(int, listed):
        arguments = Path(f"/proc/{child}/cmdline").read_text().split("\0")
        for argument in arguments:
            if argument.startswith("--process_id="):
                found[child] = int(argument.partition("=")[2])
    return found


def newest_good(workdir: Path) -> int | None:
    """The newest checkpoint that is what its manifest says; changes nothing."""
    for step in reversed(checkpoint_steps(workdir)):
        if not manifest.verify(directory_of(workdir, step)):
            return step
    return None


def read_rows(file: Path) -> Rows:
    """The lines of a JSON-lines file that are whole."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


def last_update(workdir: Path) -> int:
    """The newest update that was begun, as the list of examples has it."""
    file = workdir / "examples-0.jsonl"
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def examples(workdir: Path) -> dict[int, list[int]]:
    """The ids of each update, those of process 0 first."""
    ids: dict[int, list[int]] = {}
    for file in sorted(workdir.glob("examples-*.jsonl")):
        for row in read_rows(file):
            ids.setdefault(row["step"], []).extend(row["ids"])
    return ids


def numbers(row: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on the clock in a row of metrics."""
    return {k: v for k, v in row.items() if k.startswith(("step", "train/", "eval/"))}


def compare(workdir: Path, expected: Path, tolerance: float = 0.0) -> list[str]:
    """How a finished run differs from an undisturbed one.

    Args:
      workdir: of the run.
      expected: of the other.
      tolerance: relative, of energies below 1 absolute; 0 for equality bit for bit.

    Returns:
      A line for each kind of difference; empty if there is none.
    """
    found = []
    ours, theirs = (read_rows(path / "metrics.jsonl") for path in (workdir, expected))
    if [row["step"] for row in ours] != [row["step"] for row in theirs]:
        found.append(f"{len(ours)} rows of metrics, not {len(theirs)}, or other steps")
    else:
        found += compare_rows(ours, theirs, tolerance)
    # A run that was killed after its last update has no other numbers of it.
    ours, theirs = (_held_out(path / "summary.json") for path in (workdir, expected))
    found += [f"summary: {line}" for line in compare_rows(ours, theirs, tolerance)]
    if examples(workdir) != examples(expected):
        found.append("other examples, or in another order")
    return found


def _held_out(file: Path) -> Rows:
    values = json.loads(file.read_text())
    return [{k: v for k, v in values.items() if k.startswith(("step", "eval/"))}]


def compare_rows(ours: Rows, theirs: Rows, tolerance: float) -> list[str]:
    """The first numbers that differ in rows of the same steps."""
    for row, other in zip(ours, theirs, strict=True):
        here, there = numbers(row), numbers(other)
        if here.keys() != there.keys():
            names = ", ".join(sorted(here.keys() ^ there.keys()))
            return [f"step {row['step']}: only one has {names}"]
        for name in here:
            # An energy near 0 is what is left of larger numbers, and of their rounding.
            least = 1.0 if "energy" in name else 0.0
            if not _close(here[name], there[name], tolerance, least):
                return [f"step {row['step']}: {name} {here[name]} not {there[name]}"]
    return []


def _close(a: float | None, b: float | None, tolerance: float, least: float) -> bool:
    if a is None or b is None or not tolerance:
        return a == b
    return abs(a - b) <= tolerance * max(least, abs(a), abs(b))


class Trial(NamedTuple):
    """One fault.

    Attributes:
      fault: its kind, a row of the table.
      problems: what was not as designed; empty if it was survived.
      reported: whether what happened was told as designed; None if there is nothing to
        tell, as of a process that is killed.
      lost: updates that had to be made again; None if none could be lost.
      equal: whether the finished run is an undisturbed one; None if that was not asked.
    """

    fault: str
    problems: list[str]
    reported: bool | None = None
    lost: int | None = None
    equal: bool | None = None


class Lab:
    """A folder for runs, the draws of a seed, and undisturbed runs to compare with."""

    def __init__(self, folder: Path, seed: int, quick: bool) -> None:
        self.folder, self.draw, self.quick = folder, random.Random(seed), quick
        self._named: collections.Counter[str] = collections.Counter()
        self._undisturbed: dict[tuple[str, int, int], Path] = {}

    def some(self, all_of_them: int, few: int) -> int:
        """How often something is tried."""
        return few if self.quick else all_of_them

    def workdir(self, name: str) -> Path:
        """A new one."""
        self._named[name] += 1
        return self.folder / f"{name}-{self._named[name]}"

    def undisturbed(self, job: Job) -> Path:
        """The workdir of a finished run of the same model and processes."""
        key = (job.preset, job.processes, job.devices)
        if key not in self._undisturbed:
            path = self.workdir("undisturbed")
            seldom = (f"--config.checkpoint.every={STEPS}",)  # which changes nothing
            finish(job._replace(workdir=path, flags=seldom, launcher=()))
            self._undisturbed[key] = path
        return self._undisturbed[key]


def finish(job: Job) -> Start:
    """Trains to the end.

    Raises:
      RuntimeError: if that is not possible.
    """
    with Start(job) as start:
        if code := start.end():
            raise RuntimeError(f"exit code {code}, not 0: {start.told}")
    return start


def half_made(lab: Lab, preset: str) -> Path:
    """The workdir of a run that was stopped near its end, with three checkpoints."""
    path = lab.workdir("half")
    with Start(Job(path, preset)) as start:
        start.wait_for(Moment("update", STEPS - 40, 0.0))
        start.process.send_signal(signal.SIGTERM)
        start.end()
    return path
