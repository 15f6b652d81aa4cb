"""Items of tasks that are made: `data.synthetic`'s problems that no text has.

A prompt is what stands before an answer in the text: a line end, two solved problems of
the same source, which are not of those that are kept, and the question. So it looks as
training text does from a line end on. The answer ends with its line end: it is right if
the model stops there, too.
"""

from __future__ import annotations

import re

import numpy as np

from ebt_jax.data import synthetic
from ebt_jax.data.synthetic import Arithmetic, Problem, Source
from ebt_jax.data.tokenizers import Tokenizer
from ebt_jax.evaluation.tasks.items import Item, Items

ITEMS = 500  # of a task, where no number is given
SHOTS = 2  # solved problems before each question
END = "end"  # kind of the line end behind an answer


def make_items(entry: str, limit: int = 0) -> Items:
    """Items of a source.

    Args:
      entry: of `data.path`, such as `dyck:depth=5-8`.
      limit: how many; 0 for `ITEMS`.

    Raises:
      UserError: if there are not as many problems.
    """
    source = synthetic.parse(entry)
    solved = synthetic.drawn(source, "solved", kept=False)
    found = []
    for problem in synthetic.different(source, limit or ITEMS, kept=True):
        before = "".join(next(solved).line for _ in range(SHOTS))
        prompt = f"\n{before}{problem.question}"
        kinds = ("",) * (1 + len(before)) + character_kinds(source, problem)
        answer = f"{problem.answer}\n"
        found.append(Item(prompt, (answer,), (), problem.question, kinds))
    return Items(found, [synthetic.spelled(source)], 0, 0)


def entry_for(kind: str, far: bool, data: str | None, trained_on: str) -> str:
    """What a task is made of.

    Args:
      kind: a name of `synthetic.SOURCES`.
      far: whether it lies out of the distribution.
      data: an entry of that kind, or None for the one that the model was trained on,
        or the default where that was other text.
      trained_on: the `data.path` of the run.

    Raises:
      UserError: for a setting that there is not.
    """
    if data is None:
        entries = [kind, *synthetic.split(trained_on)][::-1]
        data = next(entry for entry in entries if entry.partition(":")[0] == kind)
    source = synthetic.parse(data)
    return synthetic.spelled(synthetic.farther(source) if far else source)


def character_kinds(source: Source, problem: Problem) -> tuple[str, ...]:
    """What each character of a line is, to see what thinking is spent on.

    Of sums and differences `operand`, `sign`, `equals`, and digits of the answer by
    their place, 10^0 for the units, and whether something is carried into it or
    borrowed from it. Of brackets `opening` and `closing` ones of the question,
    `equals`, and those of the answer by number. `end` is the line end.
    """
    if isinstance(source, Arithmetic):
        asked = tuple(_ARITHMETIC.get(c, "operand") for c in problem.question)
        a, sign, b = re.split(r"([+-])", problem.question[:-1])
        places = range(len(problem.answer))
        told = [_digit(int(a), int(b), sign, place) for place in places]
        if source.answer == "plain":
            told.reverse()
    else:
        asked = tuple(_DYCK.get(c, "closing") for c in problem.question)
        told = [f"answer {number}" for number in range(1, len(problem.answer) + 1)]
    return (*asked, *told, END)


def token_kinds(
    tokenizer: Tokenizer, tokens: np.ndarray, text: str, kinds: tuple[str, ...]
) -> list[str]:
    """The kind of each token: that of the character with its first byte.

    Args:
      tokenizer: of the tokens.
      tokens: of a text, int32 `[tokens]`.
      text: the text.
      kinds: of its characters.
    """
    by_byte = [kind for c, kind in zip(text, kinds, strict=True) for _ in c.encode()]
    sizes = tokenizer.token_bytes()[tokens]
    starts = np.minimum(np.cumsum(sizes) - sizes, len(by_byte) - 1)
    return [by_byte[start] for start in starts]


_ARITHMETIC = {"+": "sign", "-": "sign", "=": "equals"}
_DYCK = {pair[0]: "opening" for pair in synthetic.BRACKETS} | {"=": "equals"}


def _digit(a: int, b: int, sign: str, place: int) -> str:
    below = 10**place
    left, right = a % below, b % below
    carries = left + right >= below if sign == "+" else left < right
    return f"answer 10^{place}{' carry' if carries else ''}"
