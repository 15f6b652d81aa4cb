"""Faults of tests/faults.py: a workdir without room, without writing, or away."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from fault_runs import (
    PRESETS,
    STOPPED,
    Job,
    Lab,
    Moment,
    Start,
    Trial,
    compare,
    newest_good,
)

from ebt_jax.training.workdir import checkpoint_steps

NO_MOUNT = "left out: this needs the right to mount"
# Gives up soon. A file that stays open for writing would keep a disk writable.
BRIEF = ("--config.checkpoint.save_retries=1", "--config.log.hang_seconds=0")


class Disk:
    """A small disk: it gets full or cannot be written, and is mended."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fill(self) -> None:
        """Leaves no room."""
        with contextlib.suppress(OSError), (self.path / "filler").open("wb") as file:
            while True:
                os.write(file.fileno(), bytes(65536))

    def empty(self) -> None:
        """Makes room."""
        (self.path / "filler").unlink()

    def lock(self) -> None:
        """Lets nobody write, as a disk with errors; waits until no file is open."""
        for _ in range(1000):
            if not subprocess.run(
                _remount("ro", self.path), capture_output=True
            ).returncode:
                return
        raise RuntimeError(f"{self.path} is always being written")

    def unlock(self) -> None:
        """Lets everybody write."""
        subprocess.run(_remount("rw", self.path), check=True)


def _remount(how: str, path: Path) -> list[str]:
    return ["mount", "-o", f"remount,{how}", str(path)]


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[Disk]:
    """A disk of four megabytes in memory.

    Raises:
      PermissionError: if there is no right to mount.
    """
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        raise PermissionError(NO_MOUNT) from error
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", str(path)], check=True)


def disk(lab: Lab) -> Iterator[Trial]:
    """A full disk and one that turns read-only, mended in time or later."""
    hurts = ((Disk.fill, Disk.empty, "full"), (Disk.lock, Disk.unlock, "read-only"))
    for preset in PRESETS[: lab.some(2, 1)]:
        for hurt, mend, name in hurts:
            for later in (False, True):
                job = Job(lab.workdir("disk"), preset, BRIEF if later else BRIEF[1:])
                fault = f"disk {name}, mended {'later' if later else 'in time'}"
                with small_disk(job.workdir) as small:
                    with Start(job) as start:
                        _wait(lab, start)
                        hurt(small)
                        told = start.wait_for_line("could not be saved")
                        if not later:
                            mend(small)
                        code = start.end()
                    if not later:
                        problems = _ended(start, code, 0)
                        problems += [] if code else compare(*_both(lab, job))
                        yield Trial(fault, problems, told, 0, not problems)
                        continue
                    problems = _ended(start, code, STOPPED)
                    line = f"; {newest_good(job.workdir)} is good; make room or repair"
                    told = line in start.told
                    mend(small)
                    yield _again(lab, job, Trial(fault, problems, told))


def vanish(lab: Lab) -> Iterator[Trial]:
    """A workdir that goes away while it is trained in, and comes back."""
    for number in range(lab.some(4, 2)):
        job = Job(lab.workdir("away"), PRESETS[number // 2])
        away = job.workdir.with_name(f"{job.workdir.name}.elsewhere")
        unmounted = number % 2 == 1
        if unmounted:
            job.workdir.mkdir()
            away.mkdir()
            _bind(away, job.workdir)
        with Start(job) as start:
            _wait(lab, start)
            if unmounted:
                subprocess.run(["umount", "--lazy", str(job.workdir)], check=True)
            else:
                job.workdir.rename(away)
            code = start.end()
        problems = _ended(start, code, STOPPED)
        told = " has vanished" in start.told
        if checkpoint_steps(job.workdir) or (job.workdir / "config.json").exists():
            problems.append("it went on where the workdir had been")
        if unmounted:
            _bind(away, job.workdir)
        else:
            # A save that was going on may have made directories there again.
            shutil.rmtree(job.workdir, ignore_errors=True)
            away.rename(job.workdir)
        fault = f"workdir {'unmounted' if unmounted else 'renamed'}, back later"
        try:
            yield _again(lab, job, Trial(fault, problems, told))
        finally:
            if unmounted:
                subprocess.run(["umount", str(job.workdir)], check=True)


def _bind(here: Path, there: Path) -> None:
    mount = ["mount", "--bind", str(here), str(there)]
    if subprocess.run(mount, capture_output=True).returncode:
        raise PermissionError(NO_MOUNT)


def _wait(lab: Lab, start: Start) -> None:
    start.wait_for(Moment("update", lab.draw.randint(20, 80), 0.0))


def _ended(start: Start, code: int, designed: int) -> list[str]:
    """What is wrong with an exit code."""
    if code == designed:
        return []
    return [f"exit code {code}, not {designed}: {start.told[-500:]}"]


def _both(lab: Lab, job: Job) -> tuple[Path, Path]:
    return job.workdir, lab.undisturbed(job)


def _again(lab: Lab, job: Job, trial: Trial) -> Trial:
    """The trial of a run that has ended, after it was started once more."""
    with Start(job) as start:
        code = start.end()
    problems = start.mistakes() + _ended(start, code, 0)
    different = [] if code else compare(*_both(lab, job))
    return trial._replace(
        problems=trial.problems + problems + different,
        lost=start.lost,
        equal=not (code or different),
    )
