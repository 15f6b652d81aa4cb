"""The ways a run can end before it is done, and the exit codes they stand for.

0: done. 2: a mistake of the user's. 3: diverged, trying again would not help. 75:
stopped, the same command continues it; launchers try again on that one. 130: Ctrl-C.
"""

from __future__ import annotations


class UserError(ValueError):
    """A mistake of the user's: what was wrong, the rule, the remedy, in one line.

    The command line prints it as `error: ...` and exits with code 2; library callers
    see a `ValueError`.
    """


class TrainingDiverged(FloatingPointError):
    """Training met numbers that are not finite, again and again.

    The message names the step, the last good checkpoint, which is left as it was, and
    the report. The command line prints it as `error: ...` and exits with code 3.
    """


class Stopped(RuntimeError):
    """A run stopped before its end, and the same command continues it.

    The command line prints it as `stopped: ...` and exits with `code`.

    Attributes:
      code: 75 (EX_TEMPFAIL), which launchers try again on; 130 after Ctrl-C.
    """

    def __init__(self, message: str, code: int = 75) -> None:
        super().__init__(message)
        self.code = code


class StorageError(Stopped):
    """Storage could not be read or written, also after trying again.

    The command line prints it as `error: ...` and exits with code 75.
    """


def exit_code(error: BaseException) -> int:
    """The exit code of a program that an exception ends."""
    if isinstance(error, UserError):
        return 2
    if isinstance(error, TrainingDiverged):
        return 3
    if isinstance(error, Stopped):
        return error.code
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def one_line(error: BaseException) -> str:
    """What the command line says of an exception: `error: ...` or `stopped: ...`."""
    in_order = isinstance(error, Stopped) and not isinstance(error, StorageError)
    kind = "stopped" if in_order else "error"
    return f"{kind}: {' '.join(str(error).split())}"
