"""What every verb of the command line shares: flags, configs, help.

Flags are absl's, on `FlagValues` of their own, so that nothing is global and a command
line can be run from Python as often as one likes.
"""

from __future__ import annotations

import difflib
import json
import re
import runpy
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
from absl import flags
from ml_collections import config_flags

from ebt_jax.errors import UserError


class Flag(NamedTuple):
    """A flag of a verb.

    Attributes:
      name: as in `--name=value`.
      help: one line.
      default: None if there is none.
      define: absl's function for its type.
    """

    name: str
    help: str
    default: Any = None
    define: Callable[..., Any] = flags.DEFINE_string


CONFIG = Flag("config", "experiment file, and a preset after a colon")


class Verb(NamedTuple):
    """A verb of the command line.

    Attributes:
      summary: what it does, one line.
      details: what else there is to know, lines of at most 80 characters.
      example: a command line.
      call: does it; returns the exit code, None for 0.
      flags: its flags, but for --config.
      config: whether --config is `required`, `optional` or `none`.
      words: what may stand behind the verb, one of them, as flag `word`; none if empty.
    """

    summary: str
    details: str
    example: str
    call: Callable[[flags.FlagValues], int | None]
    flags: tuple[Flag, ...] = ()
    config: str = "none"
    words: tuple[str, ...] = ()


def overview(verbs: dict[str, Verb]) -> str:
    """What `ebt` is and which verbs it has."""
    width = max(map(len, verbs)) + 2
    return "\n".join(
        [
            "Energy-Based Transformers: learn an energy, predict by lowering it.",
            "",
            "usage: ebt VERB --flag=value ...",
            "",
            *(f"  {name:<{width}}{verb.summary}" for name, verb in verbs.items()),
            "",
            "`ebt VERB --help` lists the flags of a verb. To begin with:",
            "",
            *(f"  {verbs[name].example}" for name in ("train", "evaluate", "generate")),
        ]
    )


def usage(name: str, verb: Verb) -> str:
    """What a verb does, its flags with their defaults, and an example."""
    rows = [(f"--{flag.name}", _with_default(flag)) for flag in verb.flags]
    if verb.config != "none":
        rows = [
            ("--config", CONFIG.help),
            (
                "--config.KEY=VALUE",
                "changes a value of the config, such as train.steps",
            ),
            *rows,
        ]
    width = max(len(left) for left, _ in rows) + 2
    return "\n".join(
        [
            f"ebt {name}{' ' + '|'.join(verb.words) if verb.words else ''}: "
            f"{verb.summary}",
            "",
            verb.details,
            "",
            *(f"  {left:<{width}}{right}" for left, right in rows),
            "",
            f"example: {verb.example}",
        ]
    )


def parse(verb: Verb, argv: list[str]) -> flags.FlagValues:
    """The flags of a command line.

    Args:
      verb: whose flags they are.
      argv: the verb's name, which is not looked at, and the flags.

    Returns:
      Values of the flags; `config`, where the verb takes one, is a `ConfigDict` with
      all changes made, or None.

    Raises:
      UserError, flags.Error: for whatever is wrong with them, in one line.
    """
    values = _flag_values(verb.flags)
    if verb.config != "none":
        argv = _define_config(values, argv, verb.config == "required")
    name, *rest = values(argv)
    word = None
    if verb.words:
        word, *rest = rest or [None]
        if word not in verb.words:
            given = "nothing" if word is None else repr(word)
            raise UserError(
                f"after {name!r} comes one of {', '.join(verb.words)}, not {given}"
            )
    flags.DEFINE_string("word", word, "what stands behind the verb", flag_values=values)
    if rest:
        raise UserError(f"unexpected {rest[0]!r}; flags are written --name=value")
    return values


def load_config(argument: str) -> ml_collections.ConfigDict:
    """The config of an experiment file.

    Args:
      argument: the file's path; what follows a colon is passed to its `get_config`.

    Raises:
      UserError: if there is no such file, has no `get_config`, or refuses a preset.
    """
    path, colon, preset = argument.partition(":")
    if not Path(path).is_file():
        raise UserError(
            f"config file {path!r} does not exist; name a Python file, such as "
            "experiments/text.py:quickstart"
        )
    names = runpy.run_path(path, run_name="ebt_config")
    if "get_config" not in names:
        raise UserError(
            f"config file {path!r} defines no get_config(); see experiments/text.py"
        )
    return names["get_config"](preset) if colon else names["get_config"]()


def suggest(word: str, known: Collection[str]) -> str:
    """`; did you mean 'this'?`, or nothing where no known word is close."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _flag_values(definitions: tuple[Flag, ...]) -> flags.FlagValues:
    values = flags.FlagValues()
    values.set_gnu_getopt()  # flags may stand behind what is not one
    for flag in definitions:
        flag.define(flag.name, flag.default, flag.help, flag_values=values)
    return values


def _define_config(
    values: flags.FlagValues, argv: list[str], required: bool
) -> list[str]:
    """Defines `config` and a flag for each value that is changed.

    The flag that ml_collections has for config files hides what went wrong in the file
    in a traceback, so the file is loaded here and its flag for dicts is used.

    Returns:
      argv without `--config=FILE`.
    """
    first = _flag_values((CONFIG,))
    rest = first(argv, known_only=True)
    tree = load_config(first.config) if first.config else None
    if tree is None and required:
        raise UserError(
            "no config is given; add --config=experiments/text.py:quickstart"
        )
    known = set(_keys(tree or {}))
    for argument in rest:
        match = re.match(r"--?(?:no)?config\.([^=]*)", argument)
        if match and tree is None:
            raise UserError(f"{match[0]} changes a config, but no --config is given")
        if match and match[1] not in known:
            raise UserError(
                f"the config has no key {match[1]!r}{suggest(match[1], known)}"
            )
    if tree is None:
        flags.DEFINE_string("config", None, CONFIG.help, flag_values=values)
    else:
        config_flags.DEFINE_config_dict(
            "config", tree, flag_values=values, sys_argv=rest
        )
    return rest


def _keys(tree: ml_collections.ConfigDict | dict, prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def _with_default(flag: Flag) -> str:
    if flag.default is None:
        return flag.help
    return f"{flag.help} (default {json.dumps(flag.default)})"
