"""Starts `ebt train` as several processes on this host.

    python launch/local.py --processes=2 --devices=2 -- train \\
        --config=experiments/text.py:quickstart --workdir=runs/first

starts two processes with two simulated CPU devices each, which together are one run;
with --platform=cuda each gets two GPUs of its own. What stands behind `--` is the
command of `ebt`; the flags that join the processes are added to it.

    --processes=N    processes (default 1)
    --devices=N      devices of each process (default 1)
    --platform=NAME  cpu or cuda (default cpu)
    --port=N         where the processes meet; 0: one that is free (default 0)
    --grace=SECONDS  what the others get to stop when one ends badly (default 120)
    --retries=N      how often the command is started again (default 0)
    --backoff=SECONDS  before the first new start, twice that before the next, at most
                     300 (default 5)
    --dry_run        prints the commands, one a line, and starts nothing

Process 0 writes to the terminal as it is; each line of process i begins with `[i] `.
Ctrl-C and SIGTERM are passed on to all, the end of the terminal as SIGTERM; a second
Ctrl-C kills them.

Exit code: 0 if all end with 0; else 3 (diverged) if one ends with it, then 2 (a user's
mistake), then 75 (stopped, to be continued by the same command); else that of the one
that ended first, 128 + N for a signal N. The command is started again after 75, and
after a process was killed by a signal, but not once this program was told to stop.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, Sequence

from absl import flags
from processes import MISTAKE, Process, share, shell_line, supervise

from ebt_jax.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Runs this program.

    Args:
      argv: flags, `--`, the command; without the name of the program.

    Returns:
      The exit code.
    """
    try:
        own, command = split(argv)
        if {"-h", "--help"} & set(own):
            print(__doc__)
            return 0
        values = _flag_values()
        _, *rest = values(["local.py", *own])
        if rest:
            raise UserError(
                f"unexpected {rest[0]!r}; the command of ebt stands behind `--`"
            )
        _check_command(command)

        def plan() -> list[Process]:
            return plan_processes(
                command,
                processes=values.processes,
                devices=values.devices,
                platform=values.platform,
                port=values.port or free_port(),
                environment=os.environ,
            )

        if values.dry_run:
            print("\n".join(shell_line(process) for process in plan()))
            return 0
        plan()  # a mistake is seen before anything starts
        return supervise(plan, values.grace, values.retries, values.backoff)
    except (UserError, flags.Error) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return MISTAKE


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments before and behind the first `--`."""
    arguments = list(argv)
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def plan_processes(
    command: Sequence[str],
    *,
    processes: int,
    devices: int,
    platform: str,
    port: int,
    environment: Mapping[str, str],
) -> list[Process]:
    """The processes that together run a command of `ebt`.

    Args:
      command: a verb and its flags.
      processes: how many; one alone needs no coordinator and gets none.
      devices: of each.
      platform: `cpu` or `cuda`.
      port: where process 0 waits for the others.
      environment: of this program; its CUDA_VISIBLE_DEVICES are the GPUs shared out.

    Returns:
      One a process, in order.

    Raises:
      UserError: where there are fewer GPUs than are asked for.
    """
    meeting = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}"]
    return [
        Process(
            [
                sys.executable,
                "-m",
                "ebt_jax",
                *command,
                *([*meeting, f"--process_id={i}"] if processes > 1 else []),
            ],
            share(i, processes, devices, platform, environment),
        )
        for i in range(processes)
    ]


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _flag_values() -> flags.FlagValues:
    values = flags.FlagValues()
    for name, default, lowest in (
        ("processes", 1, 1),
        ("devices", 1, 1),
        ("port", 0, 0),
        ("retries", 0, 0),
    ):
        flags.DEFINE_integer(
            name, default, name, lower_bound=lowest, flag_values=values
        )
    for name, default in (("grace", 120.0), ("backoff", 5.0)):
        flags.DEFINE_float(name, default, name, lower_bound=0.0, flag_values=values)
    flags.DEFINE_enum(
        "platform", "cpu", ["cpu", "cuda"], "platform", flag_values=values
    )
    flags.DEFINE_boolean("dry_run", False, "dry_run", flag_values=values)
    return values


def _check_command(command: Sequence[str]) -> None:
    if not command or command[0] != "train":
        given = repr(command[0]) if command else "nothing"
        raise UserError(
            f"behind `--` comes the command of ebt, `train --config=... "
            f"--workdir=...`, not {given}"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
