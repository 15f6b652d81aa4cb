"""Runs the sweep of an experiment file: the flags that its `sweep()` returns.

    python launch/sweep.py experiments/text.py --set=config.data.path=input.txt
    python launch/sweep.py experiments/text.py --only=anchored --run=local --jobs=2
    python launch/sweep.py experiments/text.py --run=slurm --jobs=4 \\
        --sbatch='--nodes=1 --time=12:00:00'

The first prints a command a line. `local` runs them with a pool of processes; `slurm`
submits them as one array of slurm.sbatch. FILE:WORDS calls `sweep(WORDS)`.

    --print            prints the commands; what happens without --run
    --run=WHERE        local or slurm
    --set=FLAG=VALUE   sets a flag of `ebt train` in every training; may be repeated
    --only=TEXT        leaves out runs whose flags do not contain the text
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

A run is a dict of flags of `ebt train`, or of the verb that its key `verb` names, such
as `evaluate`; runs of one workdir are made in the order of the list, the training
first, and those behind one that failed are left out. Only a training is made once: a
workdir that exists is continued, and nothing is started for one that is done, so the
same command takes a sweep up again.

A file that defines `following(results)` adapts its sweep: see rounds.py. The next round
begins when all runs of one have ended; it does not where one failed otherwise than by
divergence. Without --run=local the round is shown, or submitted, whose turn it is.

Locally each run writes to WORKDIR.log; one that fails does not stop the others; exit
code 75 and death by a signal are tried again. A table comes last, of each round. Exit
code: 0 if all are done, 1 if one failed, 75 if Ctrl-C or SIGTERM came, 2 for a mistake.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags
from pool import Result, exit_code, log_of, run_pool, table
from processes import MISTAKE, Process, say, share, shell_line
from rounds import Run, expand, is_done, rounds, settings

from ebt_jax.errors import UserError

SCRIPT = Path(__file__).with_name("slurm.sbatch")
COMPLETE = ("done", "was done", "diverged")  # states that another round may follow


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
        sweep = expand(files[0])
        each = rounds(sweep, settings(values.set), values.only)
        if values.run == "local" and not values.dry_run:
            return run_here(each, values)
        runs = next(each)
        if sweep.following is not None:
            runs = _due(runs, each)
            if not runs:
                say("nothing to do: the sweep has made all of its rounds")
                return 0
            say(f"{len(runs)} runs; more may follow when they have ended")
        if values.run is None:
            print("\n".join(shlex.join(["ebt", r.verb, *r.arguments]) for r in runs))
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
        places = _places(len(runs), values)
        for i, run in enumerate(runs):
            if is_done(run):
                print(f"# {run.workdir} is done")
                continue
            process = Process(_command(run), places[i % len(places)])
            print(f"{shell_line(process)} >> {shlex.quote(log_of(run))} 2>&1")
        return 0
    except (UserError, flags.Error) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return MISTAKE


def run_here(each: Iterator[list[Run]], values: flags.FlagValues) -> int:
    """Makes the rounds of a sweep on this host.

    Args:
      each: its rounds.
      values: flags of this program.

    Returns:
      The exit code.
    """
    results: list[Result] = []
    for runs in each:
        ended = run_pool(
            runs,
            [_command(run) for run in runs],
            _places(len(runs), values),
            values.retries,
            values.backoff,
            done=[i for i, run in enumerate(runs) if is_done(run)],
        )
        print(table(runs, ended), flush=True)
        results += ended
        if any(result.state not in COMPLETE for result in ended):
            break
    return exit_code(results)


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
    for run in runs:
        if run.verb != "train":
            raise UserError(
                f"the sweep has an {run.verb!r} of {run.workdir!r}, but tasks of an "
                "array wait for no training; take --run=local, or leave it out with "
                "--only"
            )
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


def _due(runs: list[Run], each: Iterator[list[Run]]) -> list[Run]:
    """The first round that has trainings to make; empty if there is none."""
    while all(is_done(run) for run in runs if run.verb == "train"):
        runs = next(each, [])
        if not runs:
            break
    return runs


def _command(run: Run) -> list[str]:
    """The command of a run, with this interpreter."""
    return [sys.executable, "-m", "ebt_jax", run.verb, *run.arguments]


def _places(count: int, values: flags.FlagValues) -> list[dict[str, str]]:
    """Environments of the runs that are made at the same time."""
    jobs = min(values.jobs, count)
    return [
        share(i, jobs, values.devices, values.platform, os.environ) for i in range(jobs)
    ]


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
