"""What the devices of a compiled program send each other, counted from its text.

A compiled module is computations that call each other. A collective is counted as often
as its computation runs: once for each iteration of a loop whose number of iterations
XLA knows, and once for those of which it does not.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import NamedTuple

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)

_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "f64": 8,
    "s64": 8,
    "u64": 8,
    "c64": 8,
}

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\((.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:to_apply|calls|body|condition|branch_computations|true_computation|"
    r"false_computation)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_DEFINITION = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (.*?) [\w\-]+\(")


class Traffic(NamedTuple):
    """Collectives of one kind in one execution of a program.

    Attributes:
      count: how many there are.
      bytes: of the whole arrays that each device takes part in: what is reduced before
        it is scattered, what is gathered after it is gathered.
    """

    count: int
    bytes: int


def count_collectives(text: str) -> dict[str, Traffic]:
    """The collectives of a compiled module, by kind.

    Args:
      text: `compiled.as_text()`, HLO after all passes.

    Returns:
      The kinds of `KINDS` that there are.
    """
    computations, entry = _computations(text)
    runs: dict[str, int] = defaultdict(int)
    _count_runs(entry, 1, computations, runs)
    found: dict[str, list[int]] = {}
    for name, lines in computations.items():
        for line in lines:
            match = _COLLECTIVE.search(line)
            if match and runs[name]:
                shape, kind, start, rest = match.groups()
                if kind == "reduce-scatter":
                    operands = rest.split(")")[0]
                    shape = " ".join(
                        _shapes(lines, re.findall(r"%([\w.\-]+)", operands))
                    )
                size = _size(shape, kind, bool(start))
                total = found.setdefault(kind, [0, 0])
                total[0] += runs[name]
                total[1] += runs[name] * size
    return {kind: Traffic(*found[kind]) for kind in KINDS if kind in found}


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header and " = " not in line:
            lines = computations.setdefault(header[1], [])
            if line.startswith("ENTRY"):
                entry = header[1]
        elif line.startswith(" "):
            lines.append(line)
    return computations, entry


def _count_runs(
    name: str, times: int, computations: dict[str, list[str]], runs: dict[str, int]
) -> None:
    runs[name] += times
    for line in computations[name]:
        trips = _TRIPS.search(line)
        inside = times * (int(trips[1]) if trips else 1)
        for several, one in _CALLED.findall(line):
            for called in re.findall(r"[\w.\-]+", several or one):
                if called in computations:
                    _count_runs(called, inside, computations, runs)


def _shapes(lines: list[str], names: list[str]) -> list[str]:
    """What instructions of a computation result in."""
    found = [_DEFINITION.match(line) for line in lines]
    shapes = {match[1]: match[2] for match in found if match}
    return [shapes[name] for name in names]


def _size(shape: str, kind: str, start: bool) -> int:
    """Bytes of the whole array of one collective."""
    arrays = [
        _BYTES[dtype] * _product(dimensions)
        for dtype, dimensions in _ARRAY.findall(shape)
        if dtype in _BYTES
    ]
    if start and kind in ("all-gather", "collective-permute"):
        # The result of the first half names what goes in, too.
        return arrays[1] if len(arrays) > 1 else arrays[0]
    return sum(arrays)


def _product(dimensions: str) -> int:
    size = 1
    for dimension in dimensions.split(","):
        size *= int(dimension) if dimension else 1
    return size
