"""The command line: `ebt VERB --flag=value ...`.

Every verb is a function of this package with its arguments as flags; `verbs` has a file
for each. A mistake of the user's is one line `error: ...` on stderr and exit code 2, a
run that diverged is exit code 3, one that stopped and can be continued 75, Ctrl-C 130;
anything else is a bug and shows its traceback.

Verbs import what they need when they run: JAX and its libraries take seconds, and
`ebt --help` or a mistyped flag should not wait for them.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from typing import NoReturn

from absl import flags

from ebt_jax.command import overview, parse, suggest, usage
from ebt_jax.errors import (
    Stopped,
    TrainingDiverged,
    UserError,
    exit_code,
    one_line,
)
from ebt_jax.verbs import (
    bench,
    checkpoints,
    compare,
    evaluate,
    fit,
    generate,
    inspect,
    prepare,
    report,
    train,
)

VERBS = {
    "train": train.VERB,
    "evaluate": evaluate.VERB,
    "generate": generate.VERB,
    "inspect": inspect.VERB,
    "report": report.VERB,
    "compare": compare.VERB,
    "fit": fit.VERB,
    "bench": bench.VERB,
    "prepare": prepare.VERB,
    "checkpoints": checkpoints.VERB,
}


def main() -> None:
    """Entry point of the console script `ebt`."""
    _with_large_pages()
    _end(run(sys.argv[1:]))


def run(argv: list[str]) -> int:
    """Runs a command line.

    Args:
      argv: the verb and its flags, without the name of the program.

    Returns:
      The exit code.
    """
    try:
        if not argv or argv[0] in ("help", "-h", "--help"):
            print(overview(VERBS))
            return 0
        if argv[0] not in VERBS:
            raise UserError(
                f"there is no verb {argv[0]!r}{suggest(argv[0], VERBS)} Known: "
                f"{', '.join(VERBS)}"
            )
        verb = VERBS[argv[0]]
        if {"-h", "--help"} & set(argv[1:]):
            print(usage(argv[0], verb))
            return 0
        return verb.call(parse(verb, argv)) or 0
    except flags.Error as error:
        return _fail(UserError(str(error)))
    except (UserError, TrainingDiverged, Stopped) as error:
        return _fail(error)
    except KeyboardInterrupt:
        return 130
    return 0


def _with_large_pages() -> None:
    """Starts this program again where large memory pages have to be asked for.

    XLA allocates the temporaries of a training step anew each time. On a CPU up to a
    fifth of a step went into faults of 4 kB pages. glibc takes large pages, but only
    if GLIBC_TUNABLES says so when a process starts; where it is set, to whatever it may
    be, nothing happens.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return
    if "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        return
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _end(code: int) -> NoReturn:
    """Ends the process, whoever still waits for what.

    A save that failed leaves threads in which Orbax waits for it, for minutes; Python
    would wait for those. Whatever was started has been closed by now.
    """
    others = (t for t in threading.enumerate() if t is not threading.main_thread())
    if all(thread.daemon for thread in others):
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # as of a pipe that nobody reads any more
            stream.flush()
    os._exit(code)


def _fail(error: Exception) -> int:
    print(one_line(error), file=sys.stderr)
    return exit_code(error)
