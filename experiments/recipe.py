"""Which recipe of an EBT is worth choosing: successive halving, then seeds.

    python launch/sweep.py experiments/recipe.py:into=runs/recipe/novels --run=local \\
        --jobs=2 --set=config.data.path=novels.txt

Every arm is `experiments/text.py:fidelity,WORDS` with some values changed, at one of
several learning rates. All arms are trained for 125 updates, the best third of them
for 500; each round is a run of its own with its own schedule. The last round trains the
finalists for 1,000 updates from seeds 0, 1 and 2. Transformer++ has arms, and is
ranked, apart from the EBTs, so that both are tuned alike.

Words, joined by commas:

    into=DIR     folder of the runs (runs/recipe)
    size=SIZE    4xs (the default), 3xs, ...
    only=A+B+C   arms by name, with all their learning rates; all without it
    tiny         two arms and next to no updates; for tests

An arm's name is its folder's: NAME-xRATE, the learning rate as a multiple of the
published one. The forms of the network and the optimisers have several; what is changed
in them has one, twice the published, which suits runs this short. The first rounds have
one seed and small differences; an arm that learns slowly at first is lost there. What
was measured stands in experiments/RESULTS.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ebt_jax.errors import UserError
from ebt_jax.models.config import SIZES
from ebt_jax.training.presets import LEAN, PEAK_LR

ROUNDS = (125, 500)  # updates; a third of the arms goes on after each
KEPT = 3  # one of so many
FINAL = 1000  # updates of the finalists
FINALISTS = {"transformer_pp": 1, "ebt": 4}
SEEDS = (0, 1, 2)
# Multiples of the published learning rate: of forms, of Muon, of all else.
OF_FORMS, OF_MUON, OF_DETAILS = (1, 2, 4), (4, 8, 16), (2,)
FORMS = ("transformer_pp", "published", "anchored", "trunk", "final", "light")

ONE_STEP = {"refine.num_steps": 1, "refine.num_landscapes": 1}
FINAL_STATE = {**ONE_STEP, "model.candidate_input": "final"}
LIGHT = {**FINAL_STATE, "model.candidate_layers": 1}


def _steps(number: int, **changes: Any) -> dict[str, Any]:
    """Anchored candidates, refined so often in one landscape."""
    changed = {name.replace("__", "."): value for name, value in changes.items()}
    return {"refine.num_steps": number, "refine.num_landscapes": 1, **changed}


def _step_size(size: float) -> dict[str, Any]:
    return {"refine.step_size": size, "optim.step_size_lr_multiplier": 3 * size}


# name -> (words of experiments/text.py, changed values)
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "transformer_pp": ("transformer_pp", {}),
    "transformer_pp_muon": ("transformer_pp", {"optim.name": "muon"}),
    # The published form, and its step size.
    "published": ("s1", {}),
    "published_5": ("s1,step_size=5", {}),
    # Where candidates start from, and how many blocks they pass.
    "anchored": ("anchored", ONE_STEP),
    "trunk": ("anchored", {**ONE_STEP, "model.candidate_layers": 1}),
    "final": ("anchored", FINAL_STATE),
    "light": ("anchored", LIGHT),
    # Steps, and which of them are scored.
    "anchored_2": ("anchored", _steps(2)),
    "anchored_2_last": ("anchored", _steps(2, objective__loss_steps="last")),
    "anchored_3_rising": ("anchored", _steps(3, objective__loss_steps="rising")),
    "anchored_4": ("anchored", _steps(4)),
    "light_2": ("anchored", LIGHT | _steps(2)),
    "anchored_system_2": ("s2", {}),
    # Step sizes and inner gradients.
    "light_1": ("anchored", LIGHT | _step_size(1.0)),
    "light_50": ("anchored", LIGHT | _step_size(50.0)),
    "anchored_2_scales": (
        "anchored",
        {"refine.num_steps": 2, "model.landscape_scales": True},
    ),
    "light_unit": ("anchored", {**LIGHT, "refine.unit_gradient": True}),
    # What refinement starts from.
    "light_zeros": ("anchored", {**LIGHT, "refine.initial_candidate": "zeros"}),
    "light_amortised": ("anchored", {**LIGHT, "refine.initial_candidate": "amortised"}),
    # Matrices, optimiser, shape.
    "light_tied": ("anchored", {**LIGHT, "model.tied_embedding": True}),
    "light_muon": ("anchored", {**LIGHT, "optim.name": "muon"}),
    "final_muon": ("anchored", {**FINAL_STATE, "optim.name": "muon"}),
    "light_deep": ("anchored", {**LIGHT, "deeper": 2.0}),
    "light_wide": ("anchored", {**LIGHT, "deeper": 0.5}),
}


def sweep(words: str = "") -> list[dict[str, Any]]:
    """The first round: every arm at every learning rate."""
    into, size, names, tiny = _parsed(words)
    steps = 2 if tiny else ROUNDS[0]
    return [
        _run(into, size, f"{name}-x{rate}", steps, 0, tiny)
        for name in names
        for rate in (OF_DETAILS if tiny else _rates(name))
    ]


def following(results: dict[str, float], words: str = "") -> list[dict[str, Any]]:
    """The next round, of the better half of each kind; in the end, seeds."""
    into, size, _, tiny = _parsed(words)
    rounds, final = ((2,), 3) if tiny else (ROUNDS, FINAL)
    seeds = SEEDS[:1] if tiny else SEEDS
    losses = {Path(workdir): loss for workdir, loss in results.items()}
    if any(path.parent.name == "final" for path in losses):
        return []
    last = max(int(path.parent.name.removeprefix("round-")) for path in losses)
    of_last = {
        path.name: loss
        for path, loss in losses.items()
        if path.parent.name == f"round-{last}" and loss == loss  # not NaN
    }
    kinds = {
        kind: [
            name
            for name in sorted(of_last, key=of_last.__getitem__)
            if name.startswith("transformer_pp") == (kind == "transformer_pp")
        ]
        for kind in FINALISTS
    }
    if last == rounds[-1]:
        chosen = [n for kind, most in FINALISTS.items() for n in kinds[kind][:most]]
        return [
            _run(into, size, name, final, seed, tiny, final=True)
            for name in chosen
            for seed in seeds
        ]
    steps = rounds[rounds.index(last) + 1]
    chosen = [name for kind in kinds.values() for name in kind[: -(-len(kind) // KEPT)]]
    return [_run(into, size, name, steps, 0, tiny) for name in chosen]


def _rates(name: str) -> tuple[int, ...]:
    """Learning rates that an arm is tried at."""
    if name in FORMS:
        return OF_FORMS
    return OF_MUON if name.endswith("_muon") else OF_DETAILS


def _run(
    into: str,
    size: str,
    name: str,
    steps: int,
    seed: int,
    tiny: bool,
    final: bool = False,
) -> dict[str, Any]:
    """Flags of one run."""
    arm, _, rate = name.rpartition("-x")
    words, changes = ARMS[arm]
    changes = dict(changes)
    if arm == "anchored_system_2":
        changes |= {
            "model.candidate_input": "anchored",
            "model.conditioning": "default",
        }
    layers, heads, width = SIZES[size]
    if "deeper" in changes:
        # As many weights in the blocks: layers times width squared stays.
        layers = max(1, round(layers * changes["deeper"]))
        width = int(width / changes.pop("deeper") ** 0.5) // (2 * heads) * 2 * heads
        changes |= {"model.num_layers": layers, "model.dim": width}
    if tiny:
        changes |= {"model.dim": 16, "model.num_heads": 2, "data.context": 16}
    folder = "final" if final else f"round-{steps}"
    return {
        "config": f"experiments/text.py:fidelity,{words},size={size}",
        **LEAN,
        **{f"config.{key}": value for key, value in changes.items()},
        "config.optim.peak_lr": PEAK_LR[size] * float(rate),
        "config.optim.warmup_steps": max(1, min(100, steps // 5)),
        "config.train.steps": steps,
        "config.train.seed": seed,
        "config.eval.sequences": 8 if tiny else 832,
        "config.eval.curve_steps": 8 if final and "transformer" not in arm else 0,
        "workdir": f"{into}/{folder}/{name}" + (f"-{seed}" if final else ""),
    }


def _parsed(words: str) -> tuple[str, str, list[str], bool]:
    """Folder, size, names of arms, and whether it is tiny."""
    into, size, names, tiny = "runs/recipe", "4xs", list(ARMS), False
    for word in filter(None, (word.strip() for word in words.split(","))):
        key, _, value = word.partition("=")
        if word == "tiny":
            tiny = True
        elif key == "into" and value:
            into = value.rstrip("/")
        elif key == "size" and value in SIZES:
            size = value
        elif key == "only" and set(value.split("+")) <= set(ARMS):
            names = value.split("+")
        else:
            raise UserError(
                f"recipe word {word!r} is unknown; known are into=DIR, size=SIZE "
                f"({', '.join(SIZES)}), only=A+B of {', '.join(ARMS)}, and tiny"
            )
    if tiny:
        names = [name for name in names if name in ("transformer_pp", "light")]
    return into, size, names, tiny
