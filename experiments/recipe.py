"""Which recipe of an EBT is worth choosing: successive halving, then seeds.

    python launch/sweep.py --run=local --jobs=2 \\
        experiments/recipe.py:train=train.txt,tune=tune.txt,test=test.txt

Every arm is `experiments/text.py:fidelity,WORDS` with some values changed, at one of
several learning rates. All arms are trained for 125 updates, the best third of them
for 500; each round is a run of its own with its own schedule. These rounds have seed 0
and score the text `tune`. The last round trains the finalists for 1,000 updates from
seeds 1, 2 and 3 and scores `test`, which nothing has been chosen on. Transformer++ and
EBTs, with AdamW and with Muon, are four groups; each is ranked by itself, so that all
are tuned alike, and a finalist has the learning rate that was best for it.

Words, joined by commas:

    train=FILE, tune=FILE, test=FILE
                 texts; without them the data flags that `--set` gives are those of all
                 rounds
    into=DIR     folder of the runs (runs/recipe)
    size=SIZE    4xs (the default), 3xs, ...
    only=A+B+C   arms by name, with all their learning rates; all without it
    final=A-xR+B-xR
                 the last round alone, of these: finalists of another text or size
    updates=N    of the last round (1000)
    tiny         two arms and next to no updates; for tests

An arm's name is its folder's: NAME-xRATE, the learning rate as a multiple of the
published one. The forms of the network and the optimisers have several; what is changed
in them has one, twice the published, which suits runs this short. The first rounds have
one seed and small differences; an arm that learns slowly at first is lost there. What
was measured stands in experiments/RESULTS.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from ebt_jax.errors import UserError
from ebt_jax.models.config import SIZES
from ebt_jax.training.presets import LEAN, PEAK_LR

ROUNDS = (125, 500)  # updates; a third of the arms goes on after each
KEPT = 3  # one of so many goes on, and at least
LEAST = 2
FINAL = 1000  # updates of the finalists
FINALISTS = {"transformer_pp": 1, "ebt": 2}  # arms, with either optimiser
TUNING_SEED, SEEDS = 0, (1, 2, 3)
# Multiples of the published learning rate: of forms, of Muon, of all else.
OF_FORMS, OF_MUON, OF_DETAILS = (1, 2, 4), (8, 16, 32), (2,)
FORMS = ("transformer_pp", "published", "anchored", "trunk", "final", "light")
TEXTS = ("train", "tune", "test")

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
    "anchored_system_2": (
        "s2",
        {"model.candidate_input": "anchored", "model.conditioning": "default"},
    ),
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
    "anchored_muon": ("anchored", {**ONE_STEP, "optim.name": "muon"}),
    "light_deep": ("anchored", {**LIGHT, "deeper": 2.0}),
    "light_wide": ("anchored", {**LIGHT, "deeper": 0.5}),
}


class Words(NamedTuple):
    """What the words say; see the top of the file."""

    into: str
    size: str
    arms: list[str]
    final: list[str]
    texts: dict[str, str]
    updates: int
    tiny: bool


def sweep(words: str = "") -> list[dict[str, Any]]:
    """The first round: every arm at every learning rate."""
    given = _parsed(words)
    if given.final:
        return _last_round(given, given.final)
    steps = 2 if given.tiny else ROUNDS[0]
    return [
        _tuning_run(given, f"{name}-x{rate}", steps)
        for name in given.arms
        for rate in (OF_DETAILS if given.tiny else _rates(name))
    ]


def following(results: dict[str, float], words: str = "") -> list[dict[str, Any]]:
    """The next round, of the better third of each group; in the end, seeds."""
    given = _parsed(words)
    rounds = (2,) if given.tiny else ROUNDS
    losses = {Path(workdir): loss for workdir, loss in results.items()}
    if any(path.parent.name == "final" for path in losses):
        return []
    last = max(int(path.parent.name.removeprefix("round-")) for path in losses)
    of_last = {
        path.name: loss
        for path, loss in losses.items()
        if path.parent.name == f"round-{last}" and loss == loss  # not NaN
    }
    groups: dict[tuple[str, str], list[str]] = {}
    for name in sorted(of_last, key=of_last.__getitem__):
        groups.setdefault(_group(name), []).append(name)
    if last == rounds[-1]:
        chosen = []
        for (kind, _), names in groups.items():
            best = dict.fromkeys(name.rpartition("-x")[0] for name in names)
            chosen += [
                next(name for name in names if name.rpartition("-x")[0] == arm)
                for arm in list(best)[: FINALISTS[kind]]
            ]
        return _last_round(given, chosen)
    steps = rounds[rounds.index(last) + 1]
    return [
        _tuning_run(given, name, steps)
        for names in groups.values()
        for name in names[: max(LEAST, -(-len(names) // KEPT))]
    ]


def _group(name: str) -> tuple[str, str]:
    """Kind and optimiser."""
    arm = name.rpartition("-x")[0]
    kind = "transformer_pp" if arm.startswith("transformer_pp") else "ebt"
    return kind, "muon" if arm.endswith("_muon") else "adamw"


def _rates(name: str) -> tuple[int, ...]:
    """Learning rates that an arm is tried at."""
    if name in FORMS:
        return OF_FORMS
    return OF_MUON if name.endswith("_muon") else OF_DETAILS


def _tuning_run(given: Words, name: str, steps: int) -> dict[str, Any]:
    """A run that choices are made by."""
    return {
        **_run(given, name, steps, TUNING_SEED),
        **_text(given, "tune"),
        "config.eval.sequences": 8 if given.tiny else 416,
        "workdir": f"{given.into}/round-{steps}/{name}",
    }


def _last_round(given: Words, names: list[str]) -> list[dict[str, Any]]:
    """The runs that are reported."""
    steps = 3 if given.tiny else given.updates
    return [
        {
            **_run(given, name, steps, seed),
            **_text(given, "test"),
            "config.eval.sequences": 8 if given.tiny else 832,
            "config.eval.curve_steps": 8 if _group(name)[0] == "ebt" else 0,
            "workdir": f"{given.into}/final/{name}-{seed}",
        }
        for name in names
        for seed in (SEEDS[:1] if given.tiny else SEEDS)
    ]


def _run(given: Words, name: str, steps: int, seed: int) -> dict[str, Any]:
    """Flags that all runs of an arm have in common."""
    arm, _, rate = name.rpartition("-x")
    words, changes = ARMS[arm]
    changes = dict(changes)
    layers, heads, width = SIZES[given.size]
    if "deeper" in changes:
        # As many weights in the blocks: layers times width squared stays.
        layers = max(1, round(layers * changes["deeper"]))
        width = int(width / changes.pop("deeper") ** 0.5) // (2 * heads) * 2 * heads
        changes |= {"model.num_layers": layers, "model.dim": width}
    if given.tiny:
        changes |= {"model.dim": 16, "model.num_heads": 2, "data.context": 16}
    return {
        "config": f"experiments/text.py:fidelity,{words},size={given.size}",
        **LEAN,
        **{f"config.{key}": value for key, value in changes.items()},
        "config.optim.peak_lr": PEAK_LR[given.size] * float(rate),
        "config.optim.warmup_steps": max(1, min(100, steps // 5)),
        "config.train.steps": steps,
        "config.train.seed": seed,
    }


def _text(given: Words, scored: str) -> dict[str, Any]:
    """Where a run reads: the text that is scored, and that which is not."""
    if not given.texts:
        return {}
    return {
        "config.data.path": given.texts["train"],
        "config.data.held_out_path": given.texts[scored],
        "config.data.held_out": 0,
    }


def _parsed(words: str) -> Words:
    """What the words say.

    Raises:
      UserError: for an unknown word, or some of the three texts without the others.
    """
    given = Words("runs/recipe", "4xs", list(ARMS), [], {}, FINAL, False)
    for word in filter(None, (word.strip() for word in words.split(","))):
        key, _, value = word.partition("=")
        names = value.split("+")
        if word == "tiny":
            given = given._replace(tiny=True)
        elif key == "into" and value:
            given = given._replace(into=value.rstrip("/"))
        elif key == "size" and value in SIZES:
            given = given._replace(size=value)
        elif key == "only" and set(names) <= set(ARMS):
            given = given._replace(arms=names)
        elif key == "final" and all(_is_named(name) for name in names):
            given = given._replace(final=names)
        elif key == "updates" and value.isdigit() and int(value):
            given = given._replace(updates=int(value))
        elif key in TEXTS and value:
            given = given._replace(texts={**given.texts, key: value})
        else:
            raise UserError(
                f"recipe word {word!r} is unknown; known are train=FILE, tune=FILE, "
                f"test=FILE, into=DIR, size=SIZE ({', '.join(SIZES)}), only=A+B of "
                f"{', '.join(ARMS)}, final=A-xRATE+B-xRATE, updates=N, and tiny"
            )
    needed = ("train", "test") if given.final else TEXTS
    missing = [name for name in needed if name not in given.texts]
    if given.texts and missing:
        raise UserError(
            f"recipe words {words!r} name some texts but not {missing[0]!r}; add "
            f"{missing[0]}=FILE, or give the data by --set"
        )
    if given.tiny:
        arms = [name for name in given.arms if name in ("transformer_pp", "light")]
        given = given._replace(arms=arms)
    return given


def _is_named(name: str) -> bool:
    """Whether it is ARM-xRATE."""
    arm, _, rate = name.rpartition("-x")
    return arm in ARMS and rate.replace(".", "", 1).isdigit() and float(rate) > 0
