"""Hurts real runs of `ebt train` and checks that nothing is lost silently.

    python tests/faults.py --seed=0               all faults, a quarter of an hour
    python tests/faults.py --quick                a few of each
    python tests/faults.py --only=disk,elastic    some kinds of faults
    python tests/faults.py --json=FILE            the table as JSON, too

Small models are trained (Transformer++ and an EBT), killed, stopped, deprived of their
storage or given damaged checkpoints, and started again with the same command. A fault
is survived if the exit code is the designed one, what is damaged is named, the run goes
on from the newest good checkpoint, and in the end numbers, held-out loss and the order
of examples are those of a run that nobody disturbed: bit for bit, with several
processes to 1e-5. Prints a table; the exit code is 1 if a fault was not survived. The
seed draws moments, bits and lengths; the moments themselves also depend on how fast the
machine is.

Needs Linux. A full disk and one that turns read-only are small tmpfs mounts, which need
the right to mount; without it they are left out, and the table says so.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import fault_damage
import fault_signals
import fault_storage
from fault_runs import Lab, Trial

CASES: dict[str, Callable[[Lab], Iterator[Trial]]] = {
    "kill": fault_signals.sigkill,
    "term": fault_signals.sigterm,
    "files": fault_damage.files,
    "resume": fault_damage.resumed,
    "disk": fault_storage.disk,
    "vanish": fault_storage.vanish,
    "processes": fault_signals.processes,
    "elastic": fault_signals.elastic,
}


def main(argv: Sequence[str]) -> int:
    """Runs this program.

    Args:
      argv: flags, without the name of the program.

    Returns:
      The exit code.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of moments and damages")
    parser.add_argument("--quick", action="store_true", help="a few of each")
    parser.add_argument("--only", default=",".join(CASES), help="kinds of faults")
    parser.add_argument("--json", type=Path, help="file for the table")
    parser.add_argument("--keep", type=Path, help="new folder, where the runs stay")
    given = parser.parse_args(argv)
    unknown = set(given.only.split(",")) - set(CASES)
    if unknown:
        parser.error(f"--only names {sorted(unknown)}; known are {', '.join(CASES)}")
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory(prefix="ebt-faults-") as temporary:
        folder = (given.keep or Path(temporary)).absolute()
        folder.mkdir(exist_ok=True)
        # A start is to take a few seconds: programs are compiled once.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
        lab = Lab(folder, given.seed, given.quick)
        rows, left_out = run(lab, given.only.split(","))
    print(render(rows, left_out))
    if given.json:
        about = {"seed": given.seed, "quick": given.quick, "left_out": left_out}
        given.json.write_text(json.dumps({**about, "faults": rows}, indent=1) + "\n")
    return int(any(row["survived"] != row["tried"] for row in rows))


def run(lab: Lab, names: Sequence[str]) -> tuple[list[dict], dict[str, str]]:
    """Tries faults, and tells of each that is not survived.

    Args:
      lab: where.
      names: of `CASES`.

    Returns:
      The rows of the table, and why which faults were left out.
    """
    trials, left_out = [], {}
    for name in names:
        began, before = time.monotonic(), len(trials)
        try:
            for trial in CASES[name](lab):
                trials.append(trial)
                if not survived(trial):
                    print(f"NOT SURVIVED: {trial}", file=sys.stderr, flush=True)
        except PermissionError as error:
            left_out[name] = str(error)
        seconds = time.monotonic() - began
        done = trials[before:]
        well = f"{sum(map(survived, done))} of {len(done)} faults survived"
        print(f"{name}: {well}, {seconds:.0f} s", file=sys.stderr, flush=True)
    return summarise(trials), left_out


def summarise(trials: Sequence[Trial]) -> list[dict]:
    """A row for each kind of fault, in the order of their first."""
    groups: dict[str, list[Trial]] = collections.defaultdict(list)
    for trial in trials:
        groups[trial.fault].append(trial)
    rows = []
    for fault, group in groups.items():
        lost = [trial.lost for trial in group if trial.lost is not None]
        rows.append(
            {
                "fault": fault,
                "tried": len(group),
                "reported": _share([trial.reported for trial in group]),
                "survived": sum(survived(trial) for trial in group),
                "lost": max(lost, default=None),
                "equal": _share([trial.equal for trial in group]),
            }
        )
    return rows


def survived(trial: Trial) -> bool:
    """Whether all was as designed."""
    return not trial.problems and trial.reported is not False


def _share(answers: Sequence[bool | None]) -> str:
    """`3 of 4`; `-` where nothing was asked."""
    asked = [answer for answer in answers if answer is not None]
    return f"{sum(asked)} of {len(asked)}" if asked else "-"


def render(rows: Sequence[dict], left_out: dict[str, str]) -> str:
    """The table, as text."""
    titles = ("fault", "tried", "reported", "survived", "steps lost (max)", "equal")
    cells = [
        ["-" if value is None else str(value) for value in row.values()] for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in [titles, *cells]
    ]
    tried, well = (sum(row[name] for row in rows) for name in ("tried", "survived"))
    lines += [f"{name}: {why}" for name, why in left_out.items()]
    return "\n".join([*lines, f"{well} of {tried} faults survived"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
