"""Benchmark results for people: an aligned table, and what it does not show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Column(NamedTuple):
    """A column of a table.

    Attributes:
      key: of its value in a row of results.
      header: with the unit.
      form: format of the value.
    """

    key: str
    header: str
    form: str


SECONDS, MEMORY, RATIO = ",.4g", ",.1f", ".2f"
COLUMNS = {
    "train": (
        Column("model", "model", ""),
        Column("batch", "batch", ""),
        Column("seq", "seq", ""),
        Column("seconds", "s/update", SECONDS),
        Column("tokens_per_second", "tokens/s", ",.0f"),
        Column("batch_ratio", "x first batch", RATIO),
        Column("flops_per_token", "FLOPs/token", ".3e"),
        Column("mfu", "MFU", ".1%"),
        Column("compile_seconds", "compile s", ".1f"),
    ),
    "decode": (
        Column("model", "model", ""),
        Column("batch", "batch", ""),
        Column("prompt", "prompt", ""),
        Column("new", "new", ""),
        Column("seconds", "s/token", SECONDS),
        Column("growth", "x first prompt", RATIO),
        Column("tokens_per_second", "tokens/s", ",.1f"),
        Column("batch_ratio", "x first batch", RATIO),
        Column("first_seconds", "first s", SECONDS),
        Column("next_seconds", "next s", SECONDS),
        Column("compile_seconds", "compile s", ".1f"),
    ),
    "memory": (
        Column("model", "model", ""),
        Column("batch", "batch", ""),
        Column("seq", "seq", ""),
        Column("temporaries_mib", "temporaries MiB", MEMORY),
        Column("arrays", "/ [batch, seq, vocab]", RATIO),
        Column("growth", "x previous", RATIO),
        Column("arguments_mib", "state and batch MiB", MEMORY),
    ),
    "compile": (
        Column("model", "model", ""),
        Column("layers", "layers", ""),
        Column("refine_steps", "steps", ""),
        Column("lower_seconds", "lower s", ".2f"),
        Column("compile_seconds", "compile s", ".2f"),
        Column("seconds", "together s", ".2f"),
        Column("ratio", "x first", RATIO),
    ),
}
PEER = (
    Column("name", "", ""),
    Column("seconds", "seconds", SECONDS),
    Column("tokens_per_second", "tokens/s", ",.1f"),
    Column("peak_mib", "peak MiB", MEMORY),
)
HEADING = (
    "job",
    "space",
    "system",
    "refine_steps",
    "num_steps",
    "best_of",
    "candidate_input",
    "candidate_layers",
    "conditioning",
    "size",
    "dtype",
    "vocab",
    "device",
    "jax",
    "date",
)


def table(columns: Sequence[Column], rows: Sequence[dict[str, Any]]) -> str:
    """Rows below their headers, aligned; the first column to the left.

    Args:
      columns: those that no row has a value for are left out.
      rows: values by the columns' keys; a `-` stands for what one lacks.
    """
    used = [column for column in columns if any(column.key in row for row in rows)]
    cells = [[column.header for column in used]]
    for row in rows:
        cells.append(
            [
                format(row[column.key], column.form) if column.key in row else "-"
                for column in used
            ]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" if place == 0 else f"{cell:>{width}}"
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def render(result: dict[str, Any]) -> str:
    """The results of `bench.bench`, or of `bench_peer.against_peer`, as text."""
    about = "  ".join(f"{key}={result[key]}" for key in HEADING if key in result)
    if "peer" in result:
        body = [_peer(result)]
    else:
        rows = result["rows"] if "rows" in result else [result]
        body = [table(COLUMNS[result["job"]], rows), *_notes(result)]
    return "\n\n".join([about, *body])


def _notes(result: dict[str, Any]) -> list[str]:
    lines = []
    kinds = [row["model"] for row in result["rows"]] if "rows" in result else []
    for pair in result.get("comparisons", []):
        where = f"batch {pair['batch']}"
        where += f", prompt {pair['prompt']}" if "prompt" in pair else ""
        line = f"{kinds[0]} / {kinds[1]}, {where}: time {pair['time_ratio']:.2f}"
        if "flop_ratio" in pair:
            line += (
                f", FLOPs {pair['flop_ratio']:.2f}, time / FLOPs "
                f"{pair['time_over_flops']:.2f} ({_span(pair['rounds'])})"
            )
        lines.append(line)
    if "matmul_flops_per_second" in result:
        rate = result["matmul_flops_per_second"]
        lines.append(f"a large product of matrices: {rate:.3e} FLOP/s, MFU 100 %")
    if "peak_mib" in result:
        lines.append(f"peak memory: {result['peak_mib']:,.0f} MiB")
    return ["\n".join(lines)] if lines else []


def _peer(result: dict[str, Any]) -> str:
    peer = result["peer"]
    rows = [{"name": "ours", **result}, {"name": "peer", **peer}]
    return "\n".join(
        [
            table(PEER, rows),
            "",
            f"peer: {peer['command']}",
            f"ours is {result['speedup']:.2f} times as fast as the peer "
            f"({_span(result['speedup_rounds'])})",
            f"peak memory, ours / peer: {result['memory_ratio']:.2f}",
        ]
    )


def _span(ratios: Sequence[float]) -> str:
    return f"rounds {min(ratios):.2f} to {max(ratios):.2f}"
