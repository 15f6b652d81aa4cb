"""Little text, read many times: does an EBT generalise better than Transformer++?

    python launch/sweep.py experiments/small_data.py:into=runs/small --run=local \\
        --jobs=2 --set=config.data.path=train.txt --set=config.data.held_out=0 \\
        --set=config.data.held_out_path=held.txt
    ebt compare --runs='runs/small/seeds/*-65536-*' --y=lowest/nll   # and so on

Both are trained on the first 64 k, 256 k and 1 M tokens of a text, for as many updates
as each other, many epochs of the small ones, and evaluated ten times: what counts is
the lowest held-out loss, as of a run that is stopped there (`lowest/nll` in its
summary.json). Regularisers are tuned for each method and corpus with one seed, and the
best of them gets seeds 0, 1 and 2: weight decay for both, label smoothing for
Transformer++ and, since a single step has no smoothing, more noise at the start for the
EBT.

Words, joined by commas:

    into=DIR            folder of the runs (runs/small)
    tokens=64k+1M       sizes of the corpus; 16M and more need more updates
    updates=N           of each run (2,000: 4 M tokens of 16 x 128)
    size=SIZE           4xs (the default), 3xs, ...
    tiny                next to nothing; for tests
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from ebt_jax.errors import UserError
from ebt_jax.models.config import SIZES
from ebt_jax.training.presets import LEAN, PEAK_LR

METHODS = ("transformer_pp", "light")
TOKENS = (65_536, 262_144, 1_048_576)
DECAYS = {f"decay{d:g}": {"optim.weight_decay": d} for d in (0.01, 0.3, 3.0)}
REGULARISERS: dict[str, dict[str, dict[str, float]]] = {
    "transformer_pp": {
        **DECAYS,
        "smoothed": {"optim.weight_decay": 0.3, "objective.label_smoothing": 0.1},
    },
    "light": {
        **DECAYS,
        "noisy": {"optim.weight_decay": 0.3, "refine.initial_scale": 4.0},
    },
}
SEEDS = (0, 1, 2)


class Plan(NamedTuple):
    """What the words say."""

    into: str = "runs/small"
    tokens: tuple[int, ...] = TOKENS
    updates: int = 2000
    size: str = "4xs"
    tiny: bool = False


def sweep(words: str = "") -> list[dict[str, Any]]:
    """Every regulariser for every method and corpus, one seed."""
    plan = _plan(words)
    most = 1 if plan.tiny else None
    return [
        _run(plan, "tuning", method, tokens, regulariser, 0)
        for tokens in plan.tokens
        for method in METHODS
        for regulariser in list(REGULARISERS[method])[:most]
    ]


def following(results: dict[str, float], words: str = "") -> list[dict[str, Any]]:
    """The best regulariser of each method and corpus, all seeds."""
    plan = _plan(words)
    if any(Path(workdir).parent.name == "seeds" for workdir in results):
        return []
    best: dict[tuple[str, int], tuple[float, str]] = {}
    for workdir in results:
        method, tokens, regulariser = _named(Path(workdir).name)
        found = _lowest(workdir), regulariser
        best[method, tokens] = min(best.setdefault((method, tokens), found), found)
    return [
        _run(plan, "seeds", method, tokens, regulariser, seed)
        for (method, tokens), (_, regulariser) in sorted(best.items())
        for seed in (SEEDS[:1] if plan.tiny else SEEDS)
    ]


def _run(
    plan: Plan,
    folder: str,
    method: str,
    tokens: int,
    regulariser: str,
    seed: int,
) -> dict[str, Any]:
    """Flags of one run."""
    changes: dict[str, float] = dict(REGULARISERS[method][regulariser])
    if plan.tiny:
        changes |= {"model.dim": 16, "model.num_heads": 2}
    return {
        "config": f"experiments/text.py:fidelity,{method},size={plan.size}",
        **LEAN,
        **{f"config.{key}": value for key, value in changes.items()},
        "config.data.train_tokens": tokens,
        "config.optim.peak_lr": 2 * PEAK_LR[plan.size],
        "config.optim.warmup_steps": min(100, max(1, plan.updates // 5)),
        "config.train.steps": plan.updates,
        "config.train.seed": seed,
        "config.eval.every": max(1, plan.updates // 10),
        "config.eval.sequences": 8 if plan.tiny else 512,
        "workdir": f"{plan.into}/{folder}/{method}-{tokens}-{regulariser}-{seed}",
    }


def _named(name: str) -> tuple[str, int, str]:
    """Method, tokens and regulariser of a run's name."""
    found = re.fullmatch(r"(.*)-(\d+)-([a-z\d.]+)-\d+", name)
    if found is None:
        raise UserError(f"run {name!r} is none of this sweep; give into= a new folder")
    return found[1], int(found[2]), found[3]


def _lowest(workdir: str) -> float:
    """The lowest held-out loss of a run; infinite where it never was finite."""
    summary = json.loads((Path(workdir) / "summary.json").read_text())
    return summary["lowest/nll"] if "lowest/nll" in summary else math.inf


def _plan(words: str) -> Plan:
    """The words, read."""
    plan = Plan()
    for word in filter(None, (word.strip() for word in words.split(","))):
        key, _, value = word.partition("=")
        if word == "tiny":
            plan = plan._replace(tiny=True, updates=4, tokens=(512, 1024))
        elif key == "into" and value:
            plan = plan._replace(into=value.rstrip("/"))
        elif key == "updates" and value.isdecimal() and int(value):
            plan = plan._replace(updates=int(value))
        elif key == "size" and value in SIZES:
            plan = plan._replace(size=value)
        elif key == "tokens" and re.fullmatch(r"\d+[kM]?(\+\d+[kM]?)*", value):
            plan = plan._replace(tokens=tuple(map(_number, value.split("+"))))
        else:
            raise UserError(
                f"small_data word {word!r} is unknown; known are into=DIR, "
                f"tokens=64k+1M, updates=N, size=SIZE ({', '.join(SIZES)}) and tiny"
            )
    return plan


def _number(text: str) -> int:
    """64k, 1M: in units of 1,024 and 1,048,576."""
    units = {"k": 1024, "M": 1024**2}
    if text[-1] in units:
        return int(text[:-1]) * units[text[-1]]
    return int(text)
