"""`ebt evaluate` of a run that fills boards of Sudoku."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from ebt_jax.command import Flag
from ebt_jax.errors import UserError
from ebt_jax.verbs.common import COUNT, POSITIVE, plain, results_folder, results_table
from ebt_jax.verbs.model import Loaded, Spread, load_resolved, parse_mesh
from ebt_jax.verbs.thinking import check_thinks

if TYPE_CHECKING:
    from ebt_jax.thinking import Thinking
    from ebt_jax.training.config import Config

ATTEMPTS = 8  # at each board, of an energy model
STEPS = 8  # of the curve, at least
FLAGS = (
    Flag("givens", "boards: ranges of cells given, as 24-30,36-50; else the config's"),
    Flag(
        "board_seed", "boards: of other held-out ones; else the config's", None, COUNT
    ),
    Flag("attempts", f"boards: at each, else {ATTEMPTS}", None, POSITIVE),
    Flag("most_steps", f"boards: steps of the curve, else {STEPS}", None, POSITIVE),
)


def run(
    values: flags.FlagValues, path: Path, config: Config, thinking: Thinking
) -> None:
    """Fills held-out boards with a checkpoint, easy ones and hard ones.

    Results are printed and written to `boards/held_out.json` in the workdir or --out.

    Args:
      values: of the flags.
      path: the workdir.
      config: of the run.
      thinking: of --think.

    Raises:
      UserError: for flags that make no sense of boards, or of this model.
    """
    from ebt_jax.evaluation.boards.judge import tables
    from ebt_jax.evaluation.metrics import evaluate
    from ebt_jax.verbs.evaluate_judgement import keep

    if values.data is not None:
        raise UserError(
            "--data is of text, images and video, but boards are made; leave it out, "
            "and give --givens"
        )
    energy = config.model.kind == "ebt"
    if values.attempts is not None and not energy:
        raise UserError(
            f"--attempts is of energies, which a {config.model.kind} does not have; "
            "leave it out"
        )
    check_thinks(values.think, thinking, config)
    bands = _bands(values.givens, config)
    config = dataclasses.replace(config, mesh=parse_mesh(values.mesh))
    if values.board_seed is not None:
        board = dataclasses.replace(config.board, seed=values.board_seed)
        config = dataclasses.replace(config, board=board)
    loaded = load_resolved(path, config, values.checkpoint)
    about = {
        "workdir": str(path),
        "checkpoint": loaded.step,
        "think": values.think,
        "board_seed": config.board.seed,
    }
    judged: dict[str, Any] = {}
    lines = []
    for low, high in bands:
        batches = _batches(values, config, loaded, (low, high))
        results = evaluate(
            loaded.objective,
            loaded.params,
            batches,
            seed=config.eval.seed,
            thinking=thinking,
            progress=sys.stderr.isatty(),
        )
        found = _judged(values, config, loaded, batches, thinking)
        judged[f"{low}-{high}"] = found | {"results": results}
        kept = {n: v for n, v in results.items() if "/" not in n}
        lines.append(results_table({"givens": f"{low} to {high}"}, kept))
    content = {**about, "kind": config.model.kind, "givens": judged}
    keep(results_folder(path, values.out), "boards", None, content)
    if values.json:
        print(json.dumps(plain(content), allow_nan=False))
    else:
        print("\n\n".join([results_table(about, {}), *lines, tables(judged)]))


def _judged(
    values: flags.FlagValues,
    config: Config,
    loaded: Loaded,
    batches: Spread,
    thinking: Thinking,
) -> dict[str, Any]:
    """What came of boards by plain steps, and what energies are worth."""
    from ebt_jax import models
    from ebt_jax.data.sudoku import make_rules
    from ebt_jax.evaluation.boards.judge import judge, judge_energies
    from ebt_jax.evaluation.boards.outcomes import find_energies, find_outcomes
    from ebt_jax.interfaces import EnergyModel

    kind, seed = config.model.kind, config.eval.seed
    trained = thinking.num_steps or (
        config.model.iterations if kind == "recurrent" else config.refine.num_steps
    )
    if kind == "transformer_pp":
        trained = 1
    longest = (
        max(values.most_steps or STEPS, trained) if kind != "transformer_pp" else 1
    )
    outcomes = find_outcomes(
        loaded.objective,
        loaded.params,
        batches,
        make_rules(config.board.box_rows, config.board.box_columns),
        steps=longest,
        attempts=(values.attempts or ATTEMPTS) if kind == "ebt" else 1,
        seed=seed,
    )
    judged = judge(outcomes, trained, seed)
    model = models.build(config.model)
    if isinstance(model, EnergyModel):
        energies = find_energies(
            loaded.objective,
            model,
            loaded.params,
            batches,
            landscape=config.refine.num_landscapes - 1,
            steps=trained,
            seed=seed,
        )
        judged["energy"] = judge_energies(energies, seed)
    return judged


def _batches(
    values: flags.FlagValues, config: Config, loaded: Loaded, givens: tuple[int, int]
) -> Spread:
    from ebt_jax.data import boards

    batches = boards.held_out_batches(
        boards.held_out_examples(config.board, givens, values.sequences),
        batch_size=values.batch_size or config.eval.batch_size,
    )
    return Spread(batches, loaded.mesh)


def _bands(text: str | None, config: Config) -> list[tuple[int, int]]:
    """The ranges of --givens; without it those of the config, easy and hard."""
    if text is None:
        return [config.board.givens, config.board.hard_givens]
    bands = []
    for word in text.split(","):
        match = re.fullmatch(r"(\d+)-(\d+)", word)
        if match is None:
            raise UserError(
                f"--givens has {word!r}, but takes ranges of cells given, as 24-30"
            )
        bands.append((int(match[1]), int(match[2])))
    return bands
