"""From workdirs to the file: what `ebt report` does."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ebt_jax.errors import UserError
from ebt_jax.evaluation.report.page import page
from ebt_jax.evaluation.report.runs import Run, read_runs
from ebt_jax.evaluation.report.thinking import Thoughts, think_over
from ebt_jax.thinking import Thinking, check_thinking
from ebt_jax.training.workdir import checkpoint_steps, replace_text


def make_report(
    workdirs: Sequence[str],
    out: str | os.PathLike[str],
    *,
    tokens: int = 256,
    steps: int = 0,
    thinking: Thinking | None = None,
    command: str = "",
) -> Path:
    """Writes one HTML file about one or more runs; progress goes to stderr.

    What is damaged or missing in a run is named in the page.

    Args:
      workdirs: of the runs.
      out: the file; folders on its way are made.
      tokens: held-out tokens that each model is looked at with; 0: no model is run.
      steps: refinement steps shown, at least the trained number; 0 for each run's
        `eval.curve_steps`.
      thinking: a policy that is compared with fixed numbers of steps.
      command: what the page says that it was made with.

    Returns:
      The path of the file.

    Raises:
      UserError: if a workdir is no run, the file cannot be written, or no run can
        think as asked.
    """
    file = check_out(out)
    runs = read_runs(workdirs)
    if thinking is not None:
        _check_thinks(thinking, runs, tokens)
    thoughts = [
        _look_into(run, tokens, steps, thinking) if tokens else None for run in runs
    ]
    text = page(runs, thoughts, command)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, text)
    except OSError as error:
        raise UserError(
            f"--out {file} cannot be written: {error.strerror}; name another file"
        ) from error
    _say(f"{file}: {len(text.encode()) / 1e6:.1f} MB, opens in a browser")
    return file


def check_out(out: str | os.PathLike[str]) -> Path:
    """The absolute path of a file that can be written. Creates nothing.

    Raises:
      UserError: if it cannot.
    """
    file = Path(out).expanduser().absolute()
    if file.is_dir():
        raise UserError(f"--out {file} is a folder; name a file, such as report.html")
    existing = next(path for path in file.parents if os.path.lexists(path))
    if not existing.is_dir():
        raise UserError(
            f"--out {file} cannot be made: {existing} is not a folder; name another"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"--out {file} cannot be written: no permission in {existing}; change "
            "that, or name another"
        )
    return file


def _check_thinks(thinking: Thinking, runs: Sequence[Run], tokens: int) -> None:
    configs = [
        run.config for run in runs if run.config and run.config.model.kind == "ebt"
    ]
    if not configs:
        raise UserError(
            "a policy of thinking is given, but none of the runs is an EBT that can be "
            "run; leave out --think"
        )
    if not tokens:
        raise UserError(
            "a policy of thinking is given, but tokens is 0, so no model is run; leave "
            "out --think or --tokens=0"
        )
    for config in configs:
        check_thinking(thinking, config.refine.num_landscapes)


def _look_into(
    run: Run, tokens: int, steps: int, thinking: Thinking | None
) -> Thoughts | None:
    if run.config is None:
        return None  # its notes say why
    if run.config.model.space != "text":
        return None  # it predicts no tokens
    _say(f"{run.name}: running the model over {tokens} held-out tokens")
    try:
        thoughts = think_over(run.path, tokens=tokens, steps=steps, thinking=thinking)
    except UserError as error:
        run.notes.append(f"the model could not be run: {error}")
        return None
    newest = max(checkpoint_steps(run.path))
    if thoughts.step != newest:
        run.notes.append(
            f"the checkpoint of step {newest} is damaged: that of step {thoughts.step} "
            "was run"
        )
    return thoughts


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
