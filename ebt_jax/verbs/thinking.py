"""What `--think=` says: policies of thinking, in words.

    --think=until:tolerance=0.01,steps=16
    --think=momentum:decay=0.9,steps=8+best_of:n=4,by=drop

A policy is a name and settings of it; policies that do not contradict one another are
joined by a plus sign.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ebt_jax.command import Flag, suggest
from ebt_jax.errors import UserError

if TYPE_CHECKING:
    from ebt_jax.refine import PyTree
    from ebt_jax.thinking import Method, Thinking
    from ebt_jax.training.config import Config

THINK = Flag("think", "how to refine, such as until:tolerance=0.01,steps=16")
DETAILS = """\
--think=POLICY:KEY=VALUE,... says how a prediction is refined; + joins policies:
  fixed                        a number of steps
  until:tolerance=0            each until its energy falls by no more than that
  best_of:n=4,by=energy        of n candidates the lowest energy, or by=drop
  annealed:rate=0.9            step sizes that fall
  momentum:decay=0.9           adam:rate=1,decay=0.9,decay_squares=0.999
  lower:shrink=0.5             only steps that lower the energy, else smaller ones
  langevin:noise=1             mala:temperature=1
All but best_of take steps=N (for until, the most), landscapes=last or each, and
step_size=X, below 1 times the trained one, else in place of it."""

STEPPING: dict[str, tuple[str, Callable[[str], Any]]] = {
    "steps": ("num_steps", int),
    "step_size": ("step_size", float),
    "landscapes": ("landscapes", str),
}
BEST_OF: dict[str, tuple[str, Callable[[str], Any]]] = {
    "n": ("best_of", int),
    "by": ("by", str),
}


def parse_thinking(text: str | None) -> Thinking:
    """What a value of `--think` stands for; None for thinking as in training.

    Raises:
      UserError: for a policy, a key or a value that there is not, or policies that
        contradict one another.
    """
    from ebt_jax import thinking

    if text is None:
        return thinking.AS_TRAINED
    try:
        result = _parse(text)
        thinking.check_thinking(result)
    except UserError as error:
        raise UserError(f"--think={text}: {error}") from None
    return result


def check_thinks(text: str | None, thinking: Thinking, config: Config) -> None:
    """Refuses thinking that a run's model cannot do, or that would change nothing.

    Raises:
      UserError: for a model that predicts in one pass, and for a test of convergence
        that no step is left for.
    """
    from ebt_jax.thinking import Thinking, check_thinking

    if text is None:
        return
    if config.model.kind == "recurrent" and thinking == Thinking(thinking.num_steps):
        return
    if config.model.kind != "ebt":
        more = config.model.kind == "recurrent"
        does = "takes no policy but fixed" if more else "predicts in one pass"
        raise UserError(
            f"the run's model is a {config.model.kind}, which {does}; "
            f"leave out --think={text}"
        )
    landscapes = config.refine.num_landscapes
    check_thinking(thinking, landscapes)
    most = thinking.num_steps or config.refine.num_steps
    if thinking.tolerance is not None and most <= landscapes:
        raise UserError(
            f"--think={text} has nothing to end: a step in each landscape is always "
            f"taken, and there are {landscapes}; give more steps, the most of them"
        )


def flops_per_token(
    config: Config, params: PyTree, results: Mapping[str, Any]
) -> float:
    """FLOPs of a prediction, by the evaluations of energies that results tell."""
    from ebt_jax.evaluation.flops import thinking_flops

    names = ("energy_gradients", "energy_evaluations")
    counts = (results[name] if name in results else 0.0 for name in names)
    return thinking_flops(config, params, *counts).total


def _parse(text: str) -> Thinking:
    from ebt_jax import thinking

    methods: dict[str, type[Method]] = {
        kind.__name__.lower(): kind
        for kind in (
            thinking.Annealed,
            thinking.Momentum,
            thinking.Adam,
            thinking.Langevin,
            thinking.Lower,
            thinking.Mala,
        )
    }
    known = ("fixed", "until", "best_of", *methods)
    fields: dict[str, Any] = {}
    for part in text.split("+"):
        name, _, settings = part.partition(":")
        if name not in known:
            hint = suggest(name, known) or f"; there are {', '.join(known)}"
            raise UserError(f"there is no policy {name!r}{hint}")
        own: dict[str, tuple[str, Callable[[str], Any]]] = {}
        if name == "until":
            own = {"tolerance": ("tolerance", float)}
        elif name in methods:
            own = {f.name: (f.name, float) for f in dataclasses.fields(methods[name])}
        keys = BEST_OF if name == "best_of" else {**own, **STEPPING}
        given = _settings(name, settings, keys)
        if name == "until":
            given.setdefault("tolerance", 0.0)
        if name == "best_of" and "best_of" not in given:
            raise UserError("best_of needs a number of candidates, such as best_of:n=4")
        if name in methods:
            of_method = {key: given.pop(key) for key in own if key in given}
            given["method"] = methods[name](**of_method)
        twice = fields.keys() & given.keys()
        if twice:
            raise UserError(f"{min(twice)} is said twice; leave one out")
        fields |= given
    return thinking.Thinking(**fields)


def _settings(
    policy: str, text: str, keys: dict[str, tuple[str, Callable[[str], Any]]]
) -> dict[str, Any]:
    """Values by the names of fields, from `key=value,key=value`."""
    given: dict[str, Any] = {}
    for setting in text.split(",") if text else ():
        key, equals, value = setting.partition("=")
        if key not in keys:
            hint = suggest(key, keys) or f"; there are {', '.join(keys)}"
            raise UserError(f"{policy} has no key {key!r}{hint}")
        name, kind = keys[key]
        if name in given:
            raise UserError(f"{key} is said twice; leave one out")
        try:
            given[name] = kind(value)
        except ValueError:
            rule = "an integer" if kind is int else "a number"
            raise UserError(f"{key} is {value!r}, but has to be {rule}") from None
        if not equals or not value:
            raise UserError(f"{key} has no value; write {key}=VALUE")
    return given
