"""Runs the sweep of an experiment file: the flags that its `sweep()` returns.

    python launch/sweep.py experiments/text.py --set=config.data.path=input.txt
    python launch/sweep.py experiments/text.py --only=anchored --run=local --jobs=2
    python launch/sweep.py experiments/text.py --run=slurm --jobs=4 \\
        --sbatch='--nodes=1 --time=12:00:00'

The first prints a command a line. `local` runs them with a pool of processes; `slurm`
submits them as one array of slurm.sbatch.

    --print            prints the commands; what happens without --run
    --run=WHERE        local or slurm
    --set=FLAG=VALUE   sets a flag of `ebt train` in every run; may be repeated
    --only=TEXT        leaves out runs whose command does not contain the text
    --jobs=N           runs at the same time (default 1)
    --platform=NAME    local: cpu or cuda (default cpu)
    --devices=N        local: devices of each run (default 1)
    --retries=N        new starts of a run that can be continued (default 3)
    --backoff=SECONDS  local: before the first new start of a run, then doubled
                       (default 5)
    --list=FILE        slurm: file that the array reads its runs from; keep it until the
                       array has ended (default sweep.runs)
    --sbatch=FLAGS     slurm: further flags of sbatch, as one string
    --dry_run          shows what --run would do

A run whose workdir exists is continued, and one that is done says so and ends at once:
the same command takes a sweep up again. Locally each run writes to WORKDIR.log; one
that fails does not stop the others; exit code 75 and death by a signal are tried again.
A table comes last. Exit code: 0 if all are done, 1 if one failed, 75 if Ctrl-C or
SIGTERM came, 2 for a mistake.
"""

from __future__ import annotations

import collections
import contextlib
import os
import runpy
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from processes import (
    LONGEST_BACKOFF,
    MISTAKE,
    POLL_SECONDS,
    STOPPED,
    Popen,
    Process,
    incoming_signals,
    next_signal,
    say,
    share,
    shell_line,
    start,
    verdict,
)

from ebt_jax import cli
from ebt_jax.command import parse
from ebt_jax.errors import UserError

SCRIPT = Path(__file__).with_name("slurm.sbatch")
STATES = {0: "done", 2: "mistake", 3: "diverged", 75: "stopped"}


class Run(NamedTuple):
    """A run of a sweep.

    Attributes:
      workdir: its folder, which is also its name.
      arguments: flags of `ebt train`.
    """

    workdir: str
    arguments: list[str]


class Result(NamedTuple):
    """How a run ended.

    Attributes:
      state: a word.
      code: its exit code; None if it was never started.
      starts: how often it was started.
    """

    state: str
    code: int | None
    starts: int


def main(argv: Sequence[str]) -> int:
    """Runs this program.

    Args:
      argv: the experiment file and flags, without the name of the program.

    Returns:
      The exit code.
    """
    try:
        if {"-h", "--help"} & set(argv):
            print(__doc__)
            return 0
        values = _flag_values()
        _, *files = values(["sweep.py", *argv])
        if len(files) != 1:
            raise UserError(
                f"one experiment file is needed, not {len(files)}; such as "
                "experiments/text.py"
            )
        if values.run and values["print"].value:
            raise UserError("--print and --run exclude each other; leave out one")
        runs = select(expand(files[0]), settings(values.set), values.only)
        if values.run is None:
            print("\n".join(shlex.join(["ebt", "train", *r.arguments]) for r in runs))
            return 0
        if values.run == "slurm":
            return submit(
                runs,
                Path(values.list),
                jobs=values.jobs,
                retries=values.retries,
                sbatch=shlex.split(values.sbatch),
                dry_run=values.dry_run,
            )
        jobs = min(values.jobs, len(runs))
        places = [
            share(i, jobs, values.devices, values.platform, os.environ)
            for i in range(jobs)
        ]
        if values.dry_run:
            for i, run in enumerate(runs):
                process = Process(train_command(run), places[i % jobs])
                print(f"{shell_line(process)} >> {shlex.quote(log_of(run))} 2>&1")
            return 0
        processes = [train_command(run) for run in runs]
        results = run_pool(runs, processes, places, values.retries, values.backoff)
        print(table(runs, results))
        return exit_code(results)
    except (UserError, flags.Error) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return MISTAKE


def expand(file: str) -> list[dict[str, Any]]:
    """What `sweep()` of an experiment file returns.

    Raises:
      UserError: if there is no such file or function, or it returns something else.
    """
    if not Path(file).is_file():
        raise UserError(
            f"experiment file {file!r} does not exist; name one, such as "
            "experiments/text.py"
        )
    names = runpy.run_path(file, run_name="ebt_sweep")
    if "sweep" not in names:
        raise UserError(
            f"experiment file {file!r} defines no sweep(); see experiments/text.py"
        )
    found = names["sweep"]()
    if not isinstance(found, list) or not all(isinstance(run, dict) for run in found):
        raise UserError(
            f"sweep() of {file!r} has to return a list of dicts, the flags of "
            "`ebt train`; see experiments/text.py"
        )
    return found


def settings(changes: Sequence[str]) -> dict[str, str]:
    """Flags and their values from `FLAG=VALUE` strings.

    Raises:
      UserError: for one without `=`.
    """
    for change in changes:
        if "=" not in change:
            raise UserError(
                f"--set={change!r} has no value; write it as "
                "--set=config.data.path=input.txt"
            )
    pairs = (change.lstrip("-").partition("=") for change in changes)
    return {name: value for name, _, value in pairs}


def select(
    expanded: Sequence[Mapping[str, Any]], changes: Mapping[str, str], only: str
) -> list[Run]:
    """The runs of a sweep, each checked as `ebt train` would check it.

    Args:
      expanded: of `expand`.
      changes: of `settings`.
      only: what a command has to contain.

    Raises:
      UserError, flags.Error: for an unknown flag or key, a missing workdir, one that
        two runs share, or where nothing is left.
    """
    runs = []
    for number, given in enumerate(expanded):
        values = {**given, **changes}
        if "workdir" not in values:
            raise UserError(
                f"run {number} of the sweep has no workdir, which every run needs; add "
                "it to what sweep() returns"
            )
        arguments = [f"--{name}={value}" for name, value in values.items()]
        if only in shlex.join(arguments):
            runs.append(Run(str(values["workdir"]), arguments))
    if not runs:
        raise UserError(
            f"none of the {len(expanded)} runs contains --only={only!r}; leave it out "
            "to see them"
        )
    for workdir, count in collections.Counter(run.workdir for run in runs).items():
        if count > 1:
            raise UserError(
                f"{count} runs of the sweep share the workdir {workdir!r}; each needs "
                "its own"
            )
    for run in runs:
        parse(cli.VERBS["train"], ["train", *run.arguments])
    return runs


def train_command(run: Run) -> list[str]:
    """The command of a run, with this interpreter."""
    return [sys.executable, "-m", "ebt_jax", "train", *run.arguments]


def log_of(run: Run) -> str:
    """The file that a run's output goes to; beside its workdir, which is its own."""
    return os.path.normpath(run.workdir) + ".log"


def run_pool(
    runs: Sequence[Run],
    commands: Sequence[Sequence[str]],
    places: Sequence[Mapping[str, str]],
    retries: int,
    backoff: float,
) -> list[Result]:
    """Runs all, as many at a time as there are places.

    Args:
      runs: what to run.
      commands: of the runs, in their order.
      places: environments, one for each run at the same time.
      retries: new starts of a run that can go on.
      backoff: seconds before the first new start of a run; doubled each time.

    Returns:
      How each ended.
    """
    results = [Result("not started", None, 0) for _ in runs]
    waiting = [(0.0, i) for i in range(len(runs))]  # when it may start, which
    free = list(range(len(places)))
    running: dict[int, tuple[int, Popen, int]] = {}  # run: place, process, log begins
    told = False
    with incoming_signals() as signals, contextlib.ExitStack() as crash:
        crash.callback(_kill, running)  # only where this program itself failed
        while running or (waiting and not told):
            due = min(waiting, default=(float("inf"), -1))
            if free and not told and due[0] <= time.monotonic():
                waiting.remove(due)
                place, i = free.pop(0), due[1]
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


def table(runs: Sequence[Run], results: Sequence[Result]) -> str:
    """Results for people, one line each."""
    width = max(len("workdir"), *(len(run.workdir) for run in runs))
    lines = [f"{'workdir':<{width}}  {'state':<12}{'exit':>4}  {'starts':>6}"]
    for run, (state, code, starts) in zip(runs, results, strict=True):
        shown = "-" if code is None else str(code)
        lines.append(f"{run.workdir:<{width}}  {state:<12}{shown:>4}  {starts:>6}")
    return "\n".join(lines)


def exit_code(results: Sequence[Result]) -> int:
    """0 if all are done, 75 if some were stopped in order or not started, else 1."""
    left = {result.code for result in results if result.code != 0}
    if not left:
        return 0
    return STOPPED if left <= {None, STOPPED} else 1


def submit(
    runs: Sequence[Run],
    file: Path,
    *,
    jobs: int,
    retries: int,
    sbatch: Sequence[str],
    dry_run: bool,
) -> int:
    """Writes the list of runs and submits an array over it.

    Args:
      runs: what to run.
      file: gets the flags of a run a line, quoted for a shell.
      jobs: runs at the same time.
      retries: new starts of each.
      sbatch: further flags of sbatch.
      dry_run: prints both instead.

    Returns:
      The exit code of sbatch.
    """
    listed = "".join(f"{shlex.join(run.arguments)}\n" for run in runs)
    command = [
        "sbatch",
        f"--array=0-{len(runs) - 1}%{jobs}",
        *sbatch,
        str(SCRIPT),
        f"--retries={retries}",
        f"--runs={file.absolute()}",
    ]
    if dry_run:
        print(f"# {file} would hold:\n{listed}{shlex.join(command)}")
        return 0
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(listed)
    try:
        return subprocess.run(command, check=False).returncode
    except FileNotFoundError as error:
        raise UserError(
            f"sbatch is not on this host's PATH; {file} is written, submit from a "
            f"login node: {shlex.join(command)}"
        ) from error


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


def _flag_values() -> flags.FlagValues:
    values = flags.FlagValues()
    values.set_gnu_getopt()  # flags may stand behind the file
    for name, default, lowest in (("jobs", 1, 1), ("devices", 1, 1), ("retries", 3, 0)):
        flags.DEFINE_integer(
            name, default, name, lower_bound=lowest, flag_values=values
        )
    flags.DEFINE_float("backoff", 5.0, "", lower_bound=0.0, flag_values=values)
    flags.DEFINE_enum("run", None, ["local", "slurm"], "", flag_values=values)
    flags.DEFINE_enum("platform", "cpu", ["cpu", "cuda"], "", flag_values=values)
    flags.DEFINE_multi_string("set", [], "", flag_values=values)
    for name, default in (("only", ""), ("list", "sweep.runs"), ("sbatch", "")):
        flags.DEFINE_string(name, default, "", flag_values=values)
    for name in ("print", "dry_run"):
        flags.DEFINE_boolean(name, False, "", flag_values=values)
    return values


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
