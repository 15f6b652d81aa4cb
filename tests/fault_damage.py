"""Faults of tests/faults.py: checkpoints whose files are not what was saved."""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from fault_runs import (
    MISTAKE,
    PRESETS,
    Job,
    Lab,
    Start,
    Trial,
    compare,
    half_made,
    last_update,
)

from ebt_jax import cli
from ebt_jax.training import manifest
from ebt_jax.training.checkpoint import directory_of
from ebt_jax.training.workdir import checkpoint_steps

Damaging = Callable[[Path, random.Random], str]


def flip_bit(file: Path, draw: random.Random) -> str:
    """Flips one bit of a file; says which. Sizes and times stay as they are."""
    before = file.stat()
    content = bytearray(file.read_bytes())
    place, bit = draw.randrange(len(content)), draw.randrange(8)
    content[place] ^= 1 << bit
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    return f"bit {bit} of byte {place}"


def cut(file: Path, draw: random.Random) -> str:
    """Leaves only the beginning of a file, or nothing; says how much."""
    left = draw.randrange(file.stat().st_size)
    os.truncate(file, left)
    return f"cut to {left} bytes"


def remove(file: Path, draw: random.Random) -> str:
    """Removes a file."""
    del draw
    file.unlink()
    return "removed"


DAMAGES = {"one bit flipped": flip_bit, "cut short": cut, "missing": remove}


def array_files(checkpoint: Path) -> list[str]:
    """The files of a checkpoint that hold its arrays."""
    names = manifest.list_files(checkpoint)
    return [name for name in names if Path(name).parent.name == "d"]


def files(lab: Lab) -> Iterator[Trial]:
    """Damage to each file of the newest checkpoint, and `ebt checkpoints verify`."""
    path = half_made(lab, "s1")
    step = checkpoint_steps(path)[-1]
    checkpoint = directory_of(path, step)
    for name in [*manifest.list_files(checkpoint), manifest.NAME]:
        kept = (checkpoint / name).read_bytes()
        for damage, damaging in DAMAGES.items():
            for _ in range(lab.some(8, 1) if damaging is flip_bit else 1):
                done = damaging(checkpoint / name, lab.draw)
                code, told = verify(path)
                named = f"checkpoint {step}: {name} " in told
                problems = [] if code == 1 and named else [f"{name}, {done}: {told}"]
                yield Trial(f"a file: {damage} (verify)", problems, named)
                (checkpoint / name).write_bytes(kept)
    code, told = verify(path)
    if code:
        yield Trial("a file: put back (verify)", [told])


def verify(workdir: Path) -> tuple[int, str]:
    """Exit code and output of `ebt checkpoints verify`."""
    with contextlib.redirect_stdout(io.StringIO()) as told:
        code = cli.run(["checkpoints", "verify", f"--workdir={workdir}"])
    return code, told.getvalue()


def resumed(lab: Lab) -> Iterator[Trial]:
    """Runs that are continued although checkpoints of theirs are damaged."""
    for preset in PRESETS[: lab.some(2, 1)]:
        half = half_made(lab, preset)
        newest = directory_of(half, checkpoint_steps(half)[-1])
        arrays = array_files(newest)
        others = [n for n in manifest.list_files(newest) if n not in arrays]
        plan = [(flip_bit, [name], 1) for name in arrays[: lab.some(99, 2)]]
        plan += [(cut, [lab.draw.choice(arrays)], 1), (remove, [arrays[0]], 1)]
        plan += [(remove, [lab.draw.choice(others)], 1), (cut, [manifest.NAME], 1)]
        plan += [(flip_bit, [manifest.NAME], 1), (remove, [manifest.NAME], 1)]
        plan += [(flip_bit, [lab.draw.choice(arrays)], 2)]
        for damaging, names, checkpoints in plan:
            yield resume(lab, Job(half, preset), damaging, names[0], checkpoints)
        yield nothing_left(lab, Job(half, preset))


def resume(
    lab: Lab, job: Job, damaging: Damaging, name: str, checkpoints: int
) -> Trial:
    """A run that is continued after a file of its newest checkpoints was damaged."""
    path = lab.workdir("damaged")
    shutil.copytree(job.workdir, path)
    reached, hurt = last_update(path), checkpoint_steps(path)[-checkpoints:]
    for step in hurt:
        # Names of arrays are random: those of another checkpoint are not the same.
        directory = directory_of(path, step)
        here = name if (directory / name).exists() else array_files(directory)[0]
        damaging(directory / here, lab.draw)
    with Start(job._replace(workdir=path)) as start:
        code = start.end()
    problems = start.mistakes() + ([f"exit code {code}"] if code else [])
    for step in hurt:
        if not (path / "damaged" / f"{step}-1").is_dir():
            problems.append(f"{step} is not in damaged/")
    short = "manifest" if name == manifest.NAME else "file"
    what = next(what for what, how in DAMAGES.items() if how is damaging)
    named = f"checkpoint {hurt[-1]} is not used: {name} " in start.told
    different = [] if code else compare(path, lab.undisturbed(job))
    fault = f"{short} of the newest checkpoint{'s' * (checkpoints > 1)}: {what}"
    lost = reached - (start.began_at or 0)
    return Trial(fault, problems + different, named, lost, not (code or different))


def nothing_left(lab: Lab, job: Job) -> Trial:
    """A run that is continued after all of its checkpoints were damaged."""
    path = lab.workdir("damaged")
    shutil.copytree(job.workdir, path)
    for step in checkpoint_steps(path):
        directory = directory_of(path, step)
        flip_bit(directory / array_files(directory)[0], lab.draw)
    with Start(job._replace(workdir=path)) as start:
        code = start.end()
    steps = checkpoint_steps(path)
    told = f"error: no checkpoint in {path} is good ({steps[-1]}: " in start.told
    problems = [] if code == MISTAKE else [f"exit code {code}, not {MISTAKE}"]
    if steps != checkpoint_steps(job.workdir) or start.lost is not None:
        problems.append("it went on all the same")
    return Trial("all checkpoints damaged (refused)", problems, told)
