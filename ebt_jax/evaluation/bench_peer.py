"""Another program measured in alternation with this one.

Each runs in a process of its own, so that neither finds a warm allocator or the other's
memory, and takes turns with the other, so that a machine that slows down slows both.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ebt_jax.errors import UserError
from ebt_jax.evaluation.bench import bench_config
from ebt_jax.evaluation.bench_settings import Settings

KEYS = ("seconds", "tokens_per_second", "peak_mib")
# glibc gives large blocks back to the system at once and pays page faults for the next
# ones; a benchmark would time those. Both programs get this where the user has not set
# it; other allocators and accelerators take no notice.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
}


def against_peer(
    settings: Settings, peer: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """Runs `ebt bench` and a peer alternately, `settings.rounds` times.

    Args:
      settings: of ours: `train` or `decode`, one model, one batch, one prompt.
      peer: a command line whose last line of JSON on stdout holds at least `seconds`
        (of an update or a token), `tokens_per_second` and `peak_mib`. No shell reads
        it.
      say: told, a line at a time, what is being done.

    Returns:
      Our first round, with medians of `seconds`, `tokens_per_second` and `peak_mib`;
      `peer` with its `command` and medians; `speedup`, the peer's seconds / ours, and
      `speedup_rounds`; `memory_ratio`, our peak / the peer's.

    Raises:
      UserError: for settings that are not one measurement; if either program fails, the
        peer does not print what it should, or the two do not do the same amount of
        work.
    """
    _check_single(settings)
    command = _words(peer)
    rounds = settings.rounds
    own = [sys.executable, "-m", "ebt_jax", *command_line(settings), "--json"]
    ours, theirs = [], []
    for index in range(rounds):
        say(f"round {index + 1} of {rounds}: ours")
        ours.append(run_json(own, "our benchmark"))
        say(f"round {index + 1} of {rounds}: peer")
        theirs.append(run_json(command, "the peer"))
        _same_work(ours[-1], theirs[-1])
    medians = [
        {key: statistics.median(run[key] for run in runs) for key in KEYS}
        for runs in (ours, theirs)
    ]
    return (
        ours[0]
        | medians[0]
        | {
            "peer": {"command": peer, **medians[1]},
            "speedup": medians[1]["seconds"] / medians[0]["seconds"],
            "speedup_rounds": [
                b["seconds"] / a["seconds"] for a, b in zip(ours, theirs, strict=True)
            ],
            "memory_ratio": medians[0]["peak_mib"] / medians[1]["peak_mib"],
        }
    )


def command_line(settings: Settings) -> list[str]:
    """The verb and the flags that stand for some settings."""
    flags = []
    for name, value in dataclasses.asdict(settings).items():
        if name != "job" and value is not None:
            numbers = value if isinstance(value, tuple) else (value,)
            flags.append(f"--{name}={','.join(map(str, numbers))}")
    return ["bench", settings.job, *flags]


def run_json(command: Sequence[str], who: str) -> dict[str, Any]:
    """The last JSON object that a program prints.

    Args:
      command: program and arguments.
      who: what to call it in a message.

    Raises:
      UserError: if it cannot be started, fails, or prints no object with `KEYS`.
    """
    try:
        done = subprocess.run(
            command,
            env=ALLOCATOR | os.environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:
        raise UserError(
            f"{who} cannot be started: {command[0]!r}: {error.strerror}; give the path "
            "of a program"
        ) from error
    if done.returncode:
        said = _last(done.stderr).removeprefix("error: ")
        raise UserError(f"{who} failed with exit code {done.returncode}: {said}")
    for line in reversed(done.stdout.splitlines()):
        found = _object(line)
        if found is not None:
            return _checked(found, who)
    raise UserError(
        f"{who} printed no line of JSON, but {_last(done.stdout)!r}; it has to print "
        f"an object with {', '.join(KEYS)}"
    )


def _check_single(settings: Settings) -> None:
    if settings.job not in ("train", "decode"):
        raise UserError(
            f"--peer is for bench train and bench decode, not for {settings.job}"
        )
    if settings.model == "both":
        raise UserError(
            "--peer and --model=both do not go together; compare one model at a time"
        )
    for name in ("batch", "prompt"):
        numbers = getattr(settings, name)
        if len(numbers) > 1:
            raise UserError(
                f"--peer measures one --{name}, but {len(numbers)} are given "
                f"({','.join(map(str, numbers))})"
            )
    # A model that cannot be is refused here, not by a program that was just started.
    bench_config(settings, settings.model, settings.batch[0])


def _words(peer: str) -> list[str]:
    try:
        words = shlex.split(peer)
    except ValueError as error:
        raise UserError(f"--peer is {peer!r}: {error}") from error
    if not words:
        raise UserError("--peer is empty; give it a command, such as 'python peer.py'")
    if shutil.which(words[0]) is None:
        raise UserError(
            f"--peer: the program {words[0]!r} was not found; give its path, or put it "
            "on PATH"
        )
    return words


def _object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _checked(found: dict[str, Any], who: str) -> dict[str, Any]:
    for key in KEYS:
        if key not in found:
            raise UserError(
                f"{who} printed JSON without {key!r}, but with {', '.join(found)}; it "
                f"has to hold {', '.join(KEYS)}"
            )
        value = found[key]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            raise UserError(
                f"{who} printed {key} = {value!r}, but it has to be a positive number"
            )
    return found


def _same_work(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    tokens = [run["seconds"] * run["tokens_per_second"] for run in (ours, theirs)]
    if not math.isclose(*tokens, rel_tol=0.01):
        raise UserError(
            f"the peer does {tokens[1]:.4g} tokens at a time, but ours "
            f"{tokens[0]:.4g}; give both the same batch and sequence"
        )


def _last(text: str) -> str:
    said = [line.strip() for line in text.splitlines() if line.strip()]
    return said[-1] if said else "nothing"
