"""`ebt fit`."""

from __future__ import annotations

import json
from pathlib import Path

from absl import flags

from ebt_jax.command import Flag, Verb
from ebt_jax.errors import UserError
from ebt_jax.verbs.common import LOSS, METHODS, RUNS, listed, plain


def run(values: flags.FlagValues) -> None:
    """Fits laws to --runs or --csv and prints what they say."""
    patterns = listed(values.runs)
    if bool(patterns) == bool(values.csv):
        raise UserError(
            "--runs (folders of runs, or a glob of them) or --csv (a table) is needed, "
            f"{'not both' if patterns else 'but neither is given'}"
        )
    for name, value in (("y", values.y), ("by", values.by)):
        if values.csv and value:
            raise UserError(f"--{name} is of --runs; a table names its y and groups")

    from ebt_jax.evaluation.scaling import collect, compare, plot, tables

    if values.csv:
        collected = collect.from_table(values.csv)
    else:
        collected = collect.from_runs(patterns, values.x, values.y, values.by or ())
    found = compare.compare(collected, values.baseline)
    as_json = json.dumps(plain(compare.as_json(found)), allow_nan=False)
    if values.out:
        folder = Path(values.out)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "fit.json").write_text(as_json + "\n")
            (folder / "table.md").write_text(tables.for_markdown(found))
            plot.plot_laws(found, folder / "fit.png")
        except OSError as error:
            raise UserError(
                f"--out={values.out!r} cannot be written: {error.strerror}; name "
                "another folder"
            ) from error
    print(as_json if values.json else tables.for_terminal(found))


VERB = Verb(
    summary="scaling laws of finished runs: exponents, intervals, crossings",
    details="Fits y = c + a x^-b to the held-out losses of each method, and the slope "
    "of log y\nagainst log x. Methods are runs that are the same but for x and their "
    "seed. How much\nfaster one scales than the baseline is the ratio of slopes less "
    "1, as in the paper.\nIntervals are of 95 %: where they are wide, the runs do not "
    "say more. x is one of:\n\n"
    "  tokens      updates x batch x context\n"
    "  batch       tokens in a batch\n"
    "  layers      blocks\n"
    "  width       of the residual stream\n"
    "  parameters  without vocabulary matrices\n"
    "  flops       of training, by formula\n"
    "  seconds     of updates, measured: compare them only where each run had the\n"
    "              machine to itself",
    example="ebt fit --runs='runs/scaling/*/l2-w64-b16-*' --x=tokens --out=fits/data",
    call=run,
    flags=(
        RUNS,
        Flag("csv", "in place of --runs, a table with columns group,x,y,seed"),
        Flag("x", "what losses are put against", "tokens"),
        LOSS,
        METHODS,
        Flag("baseline", "method to compare with; else the feed-forward one"),
        Flag("out", "folder for fit.json, table.md and fit.png"),
        Flag("json", "print one JSON object", False, flags.DEFINE_boolean),
    ),
)
