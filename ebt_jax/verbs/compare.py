"""`ebt compare`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from absl import flags

from ebt_jax.command import Flag, Verb
from ebt_jax.errors import UserError
from ebt_jax.verbs.common import LOSS, METHODS, RUNS, listed, plain, required


def run(values: flags.FlagValues) -> None:
    """Prints a table of the methods among --runs."""
    required(values, "runs", "folders of finished runs, or globs of them")
    patterns = listed(values.runs)
    by = values.by or ()
    if values.gains:
        for name in ("y", "baseline"):
            if values[name].value:
                raise UserError(f"--{name} is of losses, not of --gains; leave one out")

    from ebt_jax.evaluation import side_by_side, thinking_gains

    if values.gains:
        gains, notes = thinking_gains.mean_gains(patterns, by)
        said, rows = thinking_gains.as_json(gains), thinking_gains.rows(gains)
    else:
        found = side_by_side.side_by_side(patterns, values.y, by, values.baseline)
        said, rows = side_by_side.as_json(found), side_by_side.table(found)
        notes = found.notes
    if values.json:
        print(json.dumps(plain(said), allow_nan=False))
    else:
        print("\n".join([*_markdown(rows), *(f"note: {note}" for note in notes)]))


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose columns stand below each other in a terminal, too."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    heads, *others = rows
    return [
        f"| {' | '.join(f'{c:<{w}}' for c, w in zip(row, widths, strict=True))} |"
        for row in (heads, ["-" * width for width in widths], *others)
    ]


VERB = Verb(
    summary="methods side by side: losses over seeds, differences, cost",
    details="Runs that differ in nothing but the seed are one method. Of each: the "
    "mean held-out\nloss and its range, how much that is above the baseline's (paired "
    "by seed, 95 %\ninterval by Student's t), training tokens, FLOPs by formula, "
    "measured seconds of\nupdates (compare them only where each run had its cores to "
    "itself), and the loss\nafter so many refinement steps where the runs have a "
    "thinking curve. The interval\nsays how other seeds would come out, not other "
    "text.\n\n--gains has what thinking gains in place of that, on held-out text and "
    "on the tasks\nthat were scored by `ebt evaluate --task --think`: how much lower "
    "perplexity gets\nfrom the first to the last step of training, and by more steps "
    "or a policy than\nthat. Shift is how far data are from training, in perplexity.",
    example="ebt compare --runs='runs/recipe/final/*'",
    call=run,
    flags=(
        RUNS,
        LOSS,
        METHODS,
        Flag("baseline", "method to compare with; else the best feed-forward one"),
        Flag("gains", "what thinking gains", False, flags.DEFINE_boolean),
        Flag("json", "print one JSON object", False, flags.DEFINE_boolean),
    ),
)
