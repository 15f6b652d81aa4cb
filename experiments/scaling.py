"""Scaling of Energy-Based Transformers against Transformer++, one axis at a time.

    python launch/sweep.py experiments/scaling.py --run=local --jobs=2
        --set=config.data.path=input.txt

trains every method at five points of each axis from seeds 0, 1 and 2; the methods see
the same sequences in the same order. Runs that axes have in common are made once, and
the same command takes the sweep up again. `experiments/scaling.py:data,anchored` makes
a part of it; a word of each kind, or several, joined by commas:

    data, batch, depth, width, parameters
                    axes; all where none is named. Training FLOPs and seconds are other
                    views of the runs of `parameters`
    transformer_pp  the feed-forward baseline
    light           one refinement step, through the last block
    final           the same through all blocks
    anchored        candidates start from the token they continue; one refinement step
    s1              System 1 as published, two steps
                    methods of experiments/text.py; all where none is named
    tiny            the way of all of it in minutes: width 16, a few updates, one axis

All runs are `experiments/text.py:fidelity,METHOD` with other sizes, such as

    ebt train --config=experiments/text.py:fidelity,s1 --config.model.dim=64
        --workdir=runs/scaling/s1/l2-w64-b8-s500-0 ...

whose folder has layers, width, sequences in a batch, updates and seed. In the middle of
each axis but that of parameters are 2 layers of width 64, 8 x 128 bytes and 500
updates. Each run has a schedule of its own length, with twice the learning rate that
was published for 4xs, better for all methods in runs this short
(experiments/recipe.py), and is scored once, at its end, on 512 held-out sequences.

What comes out, one command for each axis:

    ebt fit --x=tokens --out=fits/data
        --runs='runs/scaling/*/l2-w64-b8-s*'
    ebt fit --x=batch --out=fits/batch
        --runs='runs/scaling/*/l2-w64-b*-s500-*'
    ebt fit --x=layers --out=fits/depth
        --runs='runs/scaling/*/l*-w64-b8-s500-*'
    ebt fit --x=width --out=fits/width
        --runs='runs/scaling/*/l2-w*-b8-s500-*'
    ebt fit --x=parameters --out=fits/parameters
        --runs='runs/scaling/*/l1-w32-b8-s500-*,runs/scaling/*/l2-w48-b8-s500-*,
        runs/scaling/*/l2-w64-b8-s500-*,runs/scaling/*/l3-w96-b8-s500-*,
        runs/scaling/*/l4-w128-b8-s500-*'

and with `--x=flops` or `--x=seconds` the last, or the first, against cost. Seconds can
be compared only where each run had the machine, or its core, to itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ebt_jax.command import suggest
from ebt_jax.errors import UserError
from ebt_jax.training.presets import LEAN

METHODS = ("transformer_pp", "light", "final", "anchored", "s1")
FURTHER = {  # flags of a method besides its word
    "anchored": {"config.refine.num_steps": 1, "config.refine.num_landscapes": 1}
}
SEEDS = (0, 1, 2)
WARMUP = 100  # updates, at most a fifth of a run's
PEAK_LR = 4.8e-3


class Point(NamedTuple):
    """What a run is made with.

    Attributes:
      layers: of the model.
      width: of the model, with two heads.
      batch: sequences of 128 bytes in an update.
      steps: updates.
    """

    layers: int = 2
    width: int = 64
    batch: int = 8
    steps: int = 500


AXES = {
    "data": tuple(Point(steps=n) for n in (125, 250, 500, 1000, 2000)),
    "batch": tuple(Point(batch=n) for n in (2, 4, 8, 16, 32)),
    "depth": tuple(Point(layers=n) for n in (1, 2, 3, 4, 6)),
    "width": tuple(Point(width=n) for n in (32, 48, 64, 96, 128)),
    "parameters": tuple(
        Point(layers=n, width=w)
        for n, w in ((1, 32), (2, 48), (2, 64), (3, 96), (4, 128))
    ),
}
TINY = tuple(Point(width=16, batch=8, steps=n) for n in (8, 16, 32))


def sweep(words: str = "") -> list[dict[str, Any]]:
    """The runs of some axes and methods, each once.

    Args:
      words: axes, methods and `tiny`, joined by commas.

    Raises:
      UserError: for a word that is unknown.
    """
    named = [word.strip() for word in words.split(",") if word.strip()]
    known = (*AXES, *METHODS, "tiny")
    for word in named:
        if word not in known:
            raise UserError(
                f"sweep word {word!r} is unknown{suggest(word, known) or ';'} Known: "
                f"{', '.join(known)}"
            )
    methods = [name for name in METHODS if name in named] or list(METHODS)
    tiny = "tiny" in named
    axes = [name for name in AXES if name in named] or list(AXES)
    points = TINY if tiny else dict.fromkeys(p for name in axes for p in AXES[name])
    return [
        run(method, point, seed, tiny)
        for point in points
        for seed in (SEEDS[:2] if tiny else SEEDS)
        for method in methods
    ]


def run(method: str, point: Point, seed: int, tiny: bool = False) -> dict[str, Any]:
    """Flags of `ebt train` for a run."""
    folder = "scaling-tiny" if tiny else "scaling"
    layers, width, batch, steps = point
    name = f"l{layers}-w{width}-b{batch}-s{steps}-{seed}"
    further = FURTHER[method] if method in FURTHER else {}
    return {
        "config": f"experiments/text.py:fidelity,{method}",
        **LEAN,
        "workdir": f"runs/{folder}/{method}/{name}",
        **further,
        "config.model.num_layers": layers,
        "config.model.num_heads": 2,
        "config.model.dim": width,
        "config.train.batch_size": batch,
        "config.train.steps": steps,
        "config.train.seed": seed,
        "config.optim.peak_lr": PEAK_LR,
        "config.optim.warmup_steps": min(WARMUP, steps // 5),
        "config.eval.sequences": 32 if tiny else 512,
    }
