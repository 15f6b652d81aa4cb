"""What finished runs leave in their folders, without training any."""

import json
import pathlib

from ebt_jax.training.config import Config, to_json


def write_run(
    root: pathlib.Path,
    name: str,
    kind: str,
    steps: int,
    seed: int,
    *,
    data: str = "a.txt",
    y: float | None = 1.0,
    finished: bool = True,
    eval_: int = 64,
    curve: tuple[float, ...] = (),
) -> None:
    """Writes the folder `root / name`.

    Args:
      root: folder of the runs.
      name: of the run.
      kind: of its model.
      steps: updates, half a second each but for the first.
      seed: of the run.
      data: its text.
      y: held-out loss; that after the first refinement step is twice as much.
      finished: whether there is a summary.
      eval_: sequences that were scored.
      curve: losses after 1, 2, ... refinement steps.
    """
    path = root / name
    path.mkdir(parents=True)
    tree = json.loads(to_json(Config()))
    tree["model"] |= {"kind": kind, "vocab_size": 16, "num_landscapes": 1, "dim": 8}
    tree["train"] |= {"steps": steps, "seed": seed, "batch_size": 8}
    tree["optim"]["schedule_steps"] = steps
    tree["data"] |= {"context": 16, "path": data}
    tree["eval"]["sequences"] = eval_
    (path / "config.json").write_text(json.dumps(tree))
    rows = [
        {"step": n, "seconds/step": 9.0 if n == 1 else 0.5, "seconds/input": 0.0}
        for n in (1, steps)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    if finished:
        summary = {"step": steps, "eval/nll": y, "eval/nll/step_1": y and 2 * y}
        summary |= {f"thinking/nll/step_{i}": nll for i, nll in enumerate(curve, 1)}
        (path / "summary.json").write_text(json.dumps(summary))
