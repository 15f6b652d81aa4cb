"""Text that is made rather than read: arithmetic and dyck languages, from a seed.

    arithmetic:digits=1-3,ops=+,answer=plain,examples=50000,seed=0
    dyck:kinds=4,depth=1-4,length=1-16,examples=50000,seed=0

are sources of `data.path`, here with their defaults; any setting may be left out. A
document is a line, and no problem occurs twice. So what a run holds out, whole
documents, has no problem in common with what it trains on.

========== ===================== =======================================================
setting    of                    is
========== ===================== =======================================================
digits     arithmetic            of an operand, a number or a range; each length is as
                                 likely, for each operand
ops        arithmetic            + or - or +-, each as likely; no difference is negative
answer     arithmetic            plain, or reversed: units first, as one adds by hand
kinds      dyck                  of brackets, the first so many of () [] {} <>
depth      dyck                  brackets open at once at the deepest place
length     dyck                  brackets before the equals sign
examples   both                  lines
seed       both                  of the lines
========== ===================== =======================================================

`47+385=432`: of short operands there are few, which run out before the long ones do.
`([]{=})`: what closes the brackets that are open, at least one. All shapes of a depth
and a length are as likely. The task is that of BIG-bench's dyck_languages; the equals
sign stands for its instruction: without it nothing says where the answer begins.

One problem in ten, chosen by a hash of it, never becomes text. It is kept for
`ebt evaluate --task=arithmetic,dyck`, whatever the seeds and the ranges, also where
`ebt prepare` has made token shards of the text. a+b and b+a are one problem.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import random
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from ebt_jax.errors import UserError

Range = tuple[int, int]  # first and last

BRACKETS = ("()", "[]", "{}", "<>")
KEPT = 10  # one problem in so many is kept for tasks
_MOST_REPEATS = 20_000  # draws in a row that give no new problem
_SETTING = re.compile(r"[a-z_]+=.*")


class Problem(NamedTuple):
    """A line of text.

    Attributes:
      question: up to the equals sign, which belongs to it.
      answer: without the line's end.
      key: equal for what counts as one problem.
    """

    question: str
    answer: str
    key: str

    @property
    def line(self) -> str:
        """The line with its end."""
        return f"{self.question}{self.answer}\n"


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """Sums and differences of whole numbers; see the module docstring."""

    digits: Range = (1, 3)
    ops: str = "+"
    answer: str = "plain"
    examples: int = 50_000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.digits[0] <= self.digits[1] <= 100:
            raise UserError(f"digits is {_shown(self.digits)}, but goes from 1 to 100")
        if self.ops not in ("+", "-", "+-"):
            raise UserError(f"ops is {self.ops!r}, but has to be one of +, -, +-")
        if self.answer not in ("plain", "reversed"):
            raise UserError(
                f"answer is {self.answer!r}, but has to be one of plain, reversed"
            )
        _check_shared(self)


@dataclasses.dataclass(frozen=True)
class Dyck:
    """Brackets to close; see the module docstring."""

    kinds: int = 4
    depth: Range = (1, 4)
    length: Range = (1, 16)
    examples: int = 50_000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.kinds <= len(BRACKETS):
            raise UserError(f"kinds is {self.kinds}, but goes from 1 to 4")
        for name in ("depth", "length"):
            low, high = getattr(self, name)
            if not 1 <= low <= high <= 200:
                raise UserError(
                    f"{name} is {_shown((low, high))}, but goes from 1 to 200"
                )
        for depth in _each(self.depth):
            if not _lengths(depth, self.length):
                raise UserError(
                    f"length is {_shown(self.length)}, but none of those can be "
                    f"{depth} deep and end open; give longer ones"
                )
        _check_shared(self)


Source = Arithmetic | Dyck
SOURCES: dict[str, type[Source]] = {"arithmetic": Arithmetic, "dyck": Dyck}


def is_source(entry: str) -> bool:
    """Whether an entry of `data.path` names text that is made."""
    return entry.partition(":")[0] in SOURCES


def split(path: str) -> list[str]:
    """The entries of a `data.path`; a setting belongs to the source before it."""
    found: list[str] = []
    for part in map(str.strip, path.split(",")):
        if found and is_source(found[-1]) and _SETTING.fullmatch(part):
            found[-1] += f"{',' if ':' in found[-1] else ':'}{part}"
        else:
            found.append(part)
    return found


def parse(entry: str) -> Source:
    """What an entry of `data.path` names, such as `dyck:kinds=2,depth=1-3`.

    Raises:
      UserError: for a setting or a value that there is not.
    """
    name, _, text = entry.partition(":")
    kind = SOURCES[name]
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    given: dict[str, Any] = {}
    try:
        for part in text.split(",") if text else ():
            key, equals, value = part.strip().partition("=")
            if key not in defaults or not equals:
                raise UserError(
                    f"{part!r} is no setting of it; there are "
                    + ", ".join(f"{known}=..." for known in defaults)
                )
            if key in given:
                raise UserError(f"{key} is said twice; leave one out")
            given[key] = _value(key, value, defaults[key])
        return kind(**given)
    except UserError as error:
        raise UserError(f"data.path: {entry}: {error}") from None


def spelled(source: Source) -> str:
    """The entry of `data.path` that names a source, without what is the default."""
    said = [
        f"{field.name}={_shown(getattr(source, field.name))}"
        for field in dataclasses.fields(source)
        if getattr(source, field.name) != field.default
    ]
    return f"{type(source).__name__.lower()}:{','.join(said)}".removesuffix(":")


def farther(source: Source) -> Source:
    """Out of the distribution of a source.

    Operands of one and two digits more; brackets nested deeper, up to twice as deep, of
    the same lengths where they have room for that.
    """
    if isinstance(source, Arithmetic):
        most = source.digits[1]
        return dataclasses.replace(source, digits=(most + 1, most + 2))
    most, (shortest, longest) = source.depth[1], source.length
    depth, length = (most + 1, 2 * most), (shortest, max(longest, 2 * most))
    return dataclasses.replace(source, depth=depth, length=length)


def documents(source: Source) -> Iterator[bytes]:
    """The lines of a source, UTF-8.

    Raises:
      UserError: if there are not as many different problems.
    """
    for problem in different(source, source.examples):
        yield problem.line.encode()


def different(source: Source, count: int, *, kept: bool = False) -> Iterator[Problem]:
    """Different problems.

    Args:
      source: which.
      count: how many.
      kept: those kept for tasks, else those of the text.

    Raises:
      UserError: if there are not as many.
    """
    seen: set[str] = set()
    repeats = 0
    for problem in drawn(source, "kept" if kept else "text", kept=kept):
        repeats = repeats + 1 if problem.key in seen else 0
        if repeats > _MOST_REPEATS:
            raise UserError(
                f"{spelled(source)} has little more than {len(seen)} different problems"
                f"{' that are kept for tasks' if kept else ''}, but {count} are "
                "wanted; widen its ranges or lower the number"
            )
        if not repeats:
            seen.add(problem.key)
            yield problem
            if len(seen) == count:
                return


def drawn(source: Source, stream: str, *, kept: bool) -> Iterator[Problem]:
    """Problems without end, one of them again and again.

    Args:
      source: which.
      stream: names the draws; another one gives others.
      kept: as in `different`.

    Raises:
      UserError: if there is none.
    """
    rng = random.Random(f"{source.seed}/{stream}")
    misses = 0
    while misses <= _MOST_REPEATS:
        if isinstance(source, Arithmetic):
            problem = _arithmetic(source, rng)
        else:
            problem = _dyck(source, rng)
        misses = 0 if _is_kept(problem.key) == kept else misses + 1
        if not misses:
            yield problem
    raise UserError(
        f"{spelled(source)} has too few different problems: "
        f"{'none is kept for tasks' if kept else 'all are kept for tasks'}; widen its "
        "ranges"
    )


def _arithmetic(source: Arithmetic, rng: random.Random) -> Problem:
    a, b = (_number(_pick(_each(source.digits), rng), rng) for _ in range(2))
    if _pick(source.ops, rng) == "+":
        question, result, key = f"{a}+{b}=", a + b, f"{min(a, b)}+{max(a, b)}"
    else:
        a, b = max(a, b), min(a, b)
        question, result, key = f"{a}-{b}=", a - b, f"{a}-{b}"
    answer = str(result)
    if source.answer == "reversed":
        answer = answer[::-1]
    return Problem(question, answer, key)


def _dyck(source: Dyck, rng: random.Random) -> Problem:
    depth = _pick(_each(source.depth), rng)
    length = _pick(_lengths(depth, source.length), rng)
    said, stack, reached = "", "", False
    for left in reversed(range(length)):
        here = len(stack)
        up = _shapes(left, here + 1, reached or here + 1 == depth, depth)
        down = _shapes(left, here - 1, reached, depth)
        if rng.random() < up / (up + down):
            opening, closing = _pick(BRACKETS[: source.kinds], rng)
            said, stack = said + opening, closing + stack
            reached = reached or here + 1 == depth
        else:
            said, stack = said + stack[0], stack[1:]
    return Problem(f"{said}=", stack, said)


@functools.cache
def _shapes(left: int, height: int, reached: bool, depth: int) -> int:
    """How many ways there are to go on: never below 0, to the depth, open at the end.

    Args:
      left: brackets that are still to come.
      height: brackets that are open.
      reached: whether it has been as deep as it has to be.
      depth: that depth, and the most.
    """
    if not 0 <= height <= depth:
        return 0
    if not left:
        return int(reached and height > 0)
    return _shapes(left - 1, height - 1, reached, depth) + _shapes(
        left - 1, height + 1, reached or height + 1 == depth, depth
    )


def _lengths(depth: int, length: Range) -> list[int]:
    """Those of a range of lengths that have a shape of a depth."""
    return [each for each in _each(length) if _shapes(each, 0, False, depth)]


def _number(digits: int, rng: random.Random) -> int:
    """So many digits, the first of several not 0."""
    least = 10 ** (digits - 1) if digits > 1 else 0
    while True:
        found = int("".join(_pick("0123456789", rng) for _ in range(digits)))
        if found >= least:
            return found


def _pick(choices: Any, rng: random.Random) -> Any:
    # Of all its methods only `random` promises the same numbers in every version.
    return choices[int(rng.random() * len(choices))]


def _is_kept(key: str) -> bool:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % KEPT == 0


def _value(key: str, text: str, default: Any) -> Any:
    """A setting of the type of its default."""
    if isinstance(default, str):
        return text
    if isinstance(default, tuple):
        first, dash, last = text.partition("-")
        if first.isdecimal() and (last.isdecimal() or not dash):
            return int(first), int(last or first)
        rule = "a number, or a range such as 1-3"
    elif text.isdecimal():
        return int(text)
    else:
        rule = "a whole number"
    raise UserError(f"{key} is {text!r}, but has to be {rule}")


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        low, high = value
        return str(low) if low == high else f"{low}-{high}"
    return str(value)


def _each(values: Range) -> range:
    return range(values[0], values[1] + 1)


def _check_shared(source: Source) -> None:
    if source.examples < 1:
        raise UserError(f"examples is {source.examples}, but has to be at least 1")
