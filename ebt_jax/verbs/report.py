"""`ebt report`."""

from __future__ import annotations

import shlex

from absl import flags

from ebt_jax.command import Flag, Verb
from ebt_jax.verbs.common import COUNT, required
from ebt_jax.verbs.thinking import parse_thinking


def run(values: flags.FlagValues) -> None:
    """Writes a report of --workdir to --out."""
    workdirs = required(values, "workdir", "the folders of runs, with commas between")
    out = required(values, "out", "the HTML file to write")

    from ebt_jax.evaluation.report.make import make_report

    make_report(
        workdirs,
        out,
        tokens=values.tokens,
        steps=values.steps,
        thinking=parse_thinking(values.think) if values.think else None,
        command=_command(values),
    )


def _command(values: flags.FlagValues) -> str:
    """The command line of a report, for who wants to make it again."""
    words = ["ebt", "report", f"--workdir={','.join(values.workdir)}"]
    words.append(f"--out={values.out}")
    words += [
        f"--{flag.name}={values[flag.name].value}"
        for flag in VERB.flags
        if flag.name not in ("workdir", "out")
        and values[flag.name].value != flag.default
    ]
    return shlex.join(words)


VERB = Verb(
    summary="one HTML file that compares runs: curves, tokens, energies",
    details="The file needs no network and no other file. The newest checkpoint of "
    "each run\npredicts a few held-out tokens; --tokens=0 leaves that out. With "
    "--think\nalso by a policy: what it takes, and on which kinds of tokens.",
    example="ebt report --workdir=runs/a,runs/b --out=report.html",
    call=run,
    flags=(
        Flag("workdir", "folders of runs, commas between", None, flags.DEFINE_list),
        Flag("out", "the HTML file to write"),
        Flag("tokens", "held-out tokens to look at; 0: none", 256, COUNT),
        Flag("think", "a policy to compare, as in `ebt evaluate --think`"),
        Flag("steps", "refinement steps to show; 0: eval.curve_steps", 0, COUNT),
    ),
)
