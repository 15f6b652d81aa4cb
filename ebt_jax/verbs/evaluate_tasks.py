"""`ebt evaluate --task`: benchmark tasks.

Several policies of thinking, apart by semicolons, are tried one after the other, with
the model loaded once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from ebt_jax.command import Flag, suggest
from ebt_jax.errors import UserError
from ebt_jax.verbs.common import COUNT, plain, required, results_folder
from ebt_jax.verbs.model import open_trained
from ebt_jax.verbs.thinking import check_thinks, parse_thinking

if TYPE_CHECKING:
    from ebt_jax.evaluation.tasks.catalogue import Task
    from ebt_jax.evaluation.tasks.run import Result
    from ebt_jax.interfaces import Objective
    from ebt_jax.thinking import Thinking
    from ebt_jax.verbs.model import Trained

FLAGS = (
    Flag("task", "tasks, joined by commas, or all of those in --data"),
    Flag("items", "how many items of each task, from the first; 0 for all", 0, COUNT),
)
AS_TRAINED = "as trained"  # stands for no --think among policies
_NOT_OF_TASKS = (
    "text_key",
    "packing",
    "sequences",
    "uncertainty",
    "verification",
    "corruptions",
)


def run(values: flags.FlagValues) -> None:
    """Runs tasks with a checkpoint of --workdir; prints a table of the results."""
    workdir = required(values, "workdir", "the folder of a trained run")
    policies = _policies(values.think)
    for name in _NOT_OF_TASKS:
        if values[name].value:
            raise UserError(
                f"--{name} is not for tasks; leave it out"
                + (", or give --items" if name == "sequences" else "")
            )

    from ebt_jax.evaluation.tasks.run import Examinee, run_task
    from ebt_jax.evaluation.tasks.table import about_result, table
    from ebt_jax.training.workdir import open_workdir
    from ebt_jax.training.writers import storage_explained

    path, config = open_workdir(workdir)
    if config.model.space != "text":
        raise UserError(
            f"--task is of text, but the run is of {config.model.space}; leave it out"
        )
    for think, thinking in policies.items():
        check_thinks(think, thinking, config)
    chosen = _chosen(values, config.data.path)
    trained = open_trained(path, config, values.mesh, values.checkpoint)
    config = trained.config
    examinee = Examinee(
        objective=_measuring(trained, [task for task, _ in chosen.values()]),
        params=trained.params,
        tokenizer=trained.tokenizer,
        context=config.data.context,
        energy=_energy(config),
        batch_size=values.batch_size or config.eval.batch_size,
        seed=config.eval.seed,
    )
    place = results_folder(path, values.out)
    if place is not None:
        with storage_explained():
            (place / "tasks").mkdir(exist_ok=True)
    about: dict[str, Any] = {"workdir": str(path), "checkpoint": trained.step}
    summaries: dict[str, Any] = {}
    for think, thinking in policies.items():
        results = {}
        for name, (task, sources) in chosen.items():
            results[name] = run_task(
                name,
                task,
                sources,
                examinee._replace(thinking=thinking),
                limit=values.items,
                progress=sys.stderr.isatty(),
                warn=lambda text: print(text, file=sys.stderr),
            )
            if values.json:
                print(about_result(name, results[name]), file=sys.stderr)
            if place is not None:
                _write(place / "tasks" / f"{name}.json", about, think, results[name])
        numbers = {name: _summary(result) for name, result in results.items()}
        summaries[think or AS_TRAINED] = numbers
        if not values.json:
            heading = f"{think or AS_TRAINED}\n\n" if len(policies) > 1 else ""
            print(f"{heading}{table(results)}", end="\n\n" if heading else "\n")
    if values.json:
        one = len(summaries) == 1
        said = {"tasks": numbers} if one else {"policies": summaries}
        print(json.dumps(plain(about | said), allow_nan=False))


def _policies(text: str | None) -> dict[str | None, Thinking]:
    """What `--think` says, by its words; None where it says nothing."""
    parts = [part.strip() for part in text.split(";")] if text else []
    given: list[str | None] = [part for part in parts if part]
    return {part: parse_thinking(part) for part in given or [text]}


def _measuring(trained: Trained, tasks: Sequence[Task]) -> Objective:
    """The objective, which says after each step what is right where a task is made."""
    from ebt_jax.evaluation.tasks.likelihood import rightness
    from ebt_jax.training.objective import build_objective

    if not any(task.made for task in tasks):
        return trained.objective
    return build_objective(trained.config, rightness)


def _chosen(
    values: flags.FlagValues, trained_on: str
) -> dict[str, tuple[Task, list[str]]]:
    """The tasks and their sources, all of which are there.

    Args:
      values: of `--task` and `--data`.
      trained_on: the `data.path` of the run.
    """
    from ebt_jax.data.synthetic import is_source
    from ebt_jax.evaluation.tasks.catalogue import TASKS
    from ebt_jax.evaluation.tasks.made import entry_for

    wanted = values.task
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    known = ", ".join(["all", *TASKS])
    for name in names:
        if name not in TASKS and name != "all":
            raise UserError(
                f"there is no task {name!r}{suggest(name, TASKS)} Known: {known}"
            )
    if not names:
        raise UserError(f"--task is {wanted!r}, but has to name a task of: {known}")
    made = {name: TASKS[name] for name in names if name != "all" and TASKS[name].made}
    given = values.data if values.data and is_source(values.data) else None
    if given is not None:
        kind = given.partition(":")[0]
        for name in names:
            if name not in made or made[name].made != kind:
                raise UserError(
                    f"--data={given} is of {kind}, but --task names {name!r}; leave "
                    "one of them out"
                )
    found = {
        name: (task, [entry_for(task.made, task.far, given, trained_on)])
        for name, task in made.items()
    }
    names = [name for name in names if name not in made]
    if not names:
        return found
    data = required(values, "data", "the folder with the files of the tasks")
    return found | _with_files(names, wanted, data)


def _with_files(
    names: Sequence[str], wanted: str, data: str
) -> dict[str, tuple[Task, list[str]]]:
    """Those of them that are in files or in TFDS."""
    from ebt_jax.evaluation.tasks.catalogue import TASKS
    from ebt_jax.evaluation.tasks.items import find_files

    if data.startswith("tfds:") or Path(data).expanduser().is_file():
        if len(names) > 1 or names == ["all"]:
            raise UserError(
                f"--data={data} is of one task, but --task is {wanted!r}; give a "
                "folder, or one task"
            )
        (name,) = names
        if data.startswith("tfds:") and TASKS[name].tfds is None:
            having = ", ".join(name for name in TASKS if TASKS[name].tfds)
            raise UserError(
                f"task {name} is not in TFDS; give its files, or a task of: {having}"
            )
        return {name: (TASKS[name], [data])}
    if "all" not in names:
        return {
            name: (TASKS[name], find_files(name, TASKS[name].files, data))
            for name in dict.fromkeys(names)
        }
    chosen = {}
    for name, task in TASKS.items():
        if task.made:
            continue
        try:
            chosen[name] = (task, find_files(name, task.files, data))
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
    if not chosen:
        raise UserError(
            f"there are no files of any task in {data!r}; the tasks are: "
            + ", ".join(["all", *TASKS])
        )
    return chosen


def _energy(config: Any) -> Any:
    """Energies of the tokens of a text; None of a model that has no energy."""
    from ebt_jax import models
    from ebt_jax.evaluation.tasks.likelihood import energy_of_targets
    from ebt_jax.interfaces import EnergyModel

    model = models.build(config.model)
    if not isinstance(model, EnergyModel):
        return None
    return energy_of_targets(model, config.refine.num_landscapes)


def _write(
    file: Path, about: dict[str, Any], think: str | None, result: Result
) -> None:
    """Writes a task's results, its items one to a line, in one go.

    What the same items gave with other policies of thinking stays in the file.
    """
    from ebt_jax.training.workdir import replace_text
    from ebt_jax.training.writers import storage_explained

    head = about | {"think": think} | _summary(result)
    policies = _by_policy(file, head)
    policies[think or AS_TRAINED] = result.numbers
    head["policies"] = policies
    text = json.dumps(plain(head), indent=1, allow_nan=False)
    rows = [json.dumps(plain(row), allow_nan=False) for row in result.items]
    scores = ",\n".join(f"  {row}" for row in rows)
    with storage_explained():
        replace_text(file, f'{text[:-2]},\n "scores": [\n{scores}\n ]\n}}\n')


def _by_policy(file: Path, head: dict[str, Any]) -> dict[str, Any]:
    """Results that are in the file, where they are of the same checkpoint and items."""
    if not file.is_file():
        return {}
    try:
        old = json.loads(file.read_text())
        if all(old[key] == head[key] for key in ("checkpoint", "sources", "counts")):
            return dict(old["policies"])
    except (ValueError, KeyError, TypeError):
        return {}  # damaged, or of an older version: it is replaced
    return {}


def _summary(result: Result) -> dict[str, Any]:
    return {
        "sources": result.sources,
        "counts": result.counts,
        "results": result.numbers,
    }
