"""What thinking gains, as training goes on and as data leave those of training.

    python launch/sweep.py experiments/thinking.py:into=runs/thinking,data=DATA \\
        --run=local --jobs=2 --set=config.data.path=train.txt \\
        --set=config.data.held_out_path=held.txt --set=config.data.held_out=0
    ebt compare --gains --runs='runs/thinking/*'

Each method is trained for 250, 500 and 1,000 updates of 8 x 128 bytes, a run each, from
three seeds. Held-out loss after 1 to 8 refinement steps stands in a run's summary.json
as `thinking/nll/step_I`. Then it is scored on text further and further from that of
training, after each of 8 steps and, where candidates have noise, with the best of 4:
the second command has the gain by training tokens and by shift, with intervals over
seeds, and `ebt report` draws it. DATA is a folder of data sets, see `ebt evaluate
--task`.

Methods: the two that recipe.py found, `light` and `final` with Muon, trained for one
step, that is all they need; and `anchored_s2` (System 2 from anchored candidates: 2 or
3 steps of random sizes, Langevin noise, the loss on the last; AdamW).

Words, joined by commas:

    into=DIR     folder of the runs (runs/thinking)
    data=DIR     folder of the data sets; without it nothing but training
    size=SIZE    4xs (the default), 3xs, ...
    only=A+B     methods; all without it
    tiny         next to nothing; for tests
"""

from __future__ import annotations

from typing import Any

from ebt_jax.errors import UserError
from ebt_jax.models.config import SIZES
from ebt_jax.training.presets import LEAN, PEAK_LR

UPDATES = (250, 500, 1000)
SEEDS = (0, 1, 2)
MORE_STEPS, BEST_OF = "fixed:steps=8", "best_of:n=4"
# name -> (words of experiments/text.py, changed values, how thought is scored)
METHODS: dict[str, tuple[str, dict[str, Any], str]] = {
    "light": ("light,muon", {}, MORE_STEPS),
    "final": ("final,muon", {}, MORE_STEPS),
    "anchored_s2": (
        "s2",
        {
            "model.candidate_input": "anchored",
            "model.conditioning": "default",
        },
        f"{MORE_STEPS};{BEST_OF}",
    ),
}
TASKS = "tinyshakespeare,wikitext2,gsm8k"


def sweep(words: str = "") -> list[dict[str, Any]]:
    """All trainings, each followed by the evaluation of its run."""
    into, data, size, methods, tiny = _parsed(words)
    runs = []
    for method in methods:
        for updates in (2,) if tiny else UPDATES:
            for seed in SEEDS[:1] if tiny else SEEDS:
                run = _training(into, size, method, updates, seed, tiny)
                runs.append(run)
                if data:
                    runs.append(_scoring(run["workdir"], method, data, tiny))
    return runs


def _training(
    into: str, size: str, method: str, updates: int, seed: int, tiny: bool
) -> dict[str, Any]:
    """Flags of `ebt train`."""
    words, changes, _ = METHODS[method]
    if tiny:
        small = {"model.dim": 16, "model.num_heads": 2, "data.context": 16}
        changes = {**changes, **small}
    return {
        "config": f"experiments/text.py:fidelity,{words},size={size}",
        **LEAN,
        **{f"config.{key}": value for key, value in changes.items()},
        "config.optim.warmup_steps": max(1, min(100, updates // 5)),
        "config.train.steps": updates,
        "config.train.batch_size": 8,
        **({} if "muon" in words else {"config.optim.peak_lr": 2 * PEAK_LR[size]}),
        "config.train.seed": seed,
        "config.eval.sequences": 8 if tiny else 512,
        "config.eval.curve_steps": 8,
        "workdir": f"{into}/{method}-{updates}-{seed}",
    }


def _scoring(workdir: str, method: str, data: str, tiny: bool) -> dict[str, Any]:
    """Flags of `ebt evaluate`."""
    *_, think = METHODS[method]
    return {
        "verb": "evaluate",
        "task": TASKS.partition(",")[0] if tiny else TASKS,
        "data": data,
        "items": 4 if tiny else 32,
        "think": think,
        "workdir": workdir,
    }


def _parsed(words: str) -> tuple[str, str, str, list[str], bool]:
    """Folder, data, size, methods, and whether it is tiny."""
    into, data, size, methods, tiny = "runs/thinking", "", "4xs", list(METHODS), False
    for word in filter(None, (word.strip() for word in words.split(","))):
        key, _, value = word.partition("=")
        if word == "tiny":
            tiny = True
        elif key == "into" and value:
            into = value.rstrip("/")
        elif key == "data" and value:
            data = value
        elif key == "size" and value in SIZES:
            size = value
        elif key == "only" and set(value.split("+")) <= set(METHODS):
            methods = value.split("+")
        else:
            raise UserError(
                f"thinking word {word!r} is unknown; known are into=DIR, data=DIR, "
                f"size=SIZE ({', '.join(SIZES)}), only=A+B of {', '.join(METHODS)}, "
                "and tiny"
            )
    return into, data, size, methods, tiny
