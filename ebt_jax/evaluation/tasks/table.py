"""Results of tasks for people."""

from __future__ import annotations

from collections.abc import Mapping

from ebt_jax.evaluation.tasks.catalogue import TASKS
from ebt_jax.evaluation.tasks.run import Result

_COLUMNS = {
    "perplexity": ("ppl", ".4g"),
    "bits_per_byte": ("bits/B", ".3f"),
    "tokens": ("tokens", ",.0f"),
    "answer_perplexity": ("answer ppl", ".4g"),
    "answer_bits_per_byte": ("bits/B", ".3f"),
    "answer_tokens": ("tokens", ",.0f"),
}
_SHARES = {
    "accuracy": "accuracy",
    "token_accuracy": "of its tokens",
    "accuracy_per_byte": "per byte",
    "accuracy_energy": "by energy",
    "accuracy_excess_energy": "by excess energy",
    "chance": "chance",
    "exact_match": "exact match",
    "f1": "F1",
}


def table(results: Mapping[str, Result]) -> str:
    """A line for each task, and below what was scored.

    Perplexities are over all tokens, and over those of the right answers; shares are
    in per cent of the items, with intervals of 95 %.
    """
    head = ["task", "items", *(header for header, _ in _COLUMNS.values()), "score"]
    lines = [head, *(_cells(name, result) for name, result in results.items())]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    shown = []
    for line in lines:
        name, *numbers, score = (
            cell.ljust(width) if i in (0, len(head) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        shown.append("  ".join([name, *numbers, score]).rstrip())
    about = [about_result(name, result) for name, result in results.items()]
    kinds = [line for name, result in results.items() for line in _kinds(name, result)]
    return "\n".join([*shown, "", *about, *kinds])


def about_result(name: str, result: Result) -> str:
    """What was scored, of which files, and what was left out or cut; one line."""
    counts = dict(result.counts)
    said = [f"{counts.pop('items'):,} items, {TASKS[name].scored}"]
    said += [f"{count:,} {what}" for what, count in counts.items() if count]
    return f"{name}: {'; '.join(said)}; of {', '.join(result.sources)}"


def _kinds(name: str, result: Result) -> list[str]:
    """A line for each kind of token that results are told apart by."""
    found = [key.split("/")[1] for key in result.numbers if key.startswith("kind/")]
    if not found:
        return []
    lines = ["", f"{name:<22}{'tokens':>8}{'right':>8}{'nll':>8}{'steps':>8}"]
    for kind in dict.fromkeys(found):
        numbers = [
            result.numbers.get(f"kind/{kind}/{what}")
            for what in ("tokens", "accuracy", "nll", "steps")
        ]
        forms = (",.0f", ".1%", ".3f", ".2f")
        cells = [
            "-" if number is None else format(number, form)
            for number, form in zip(numbers, forms, strict=True)
        ]
        lines.append(f"  {kind:<20}{''.join(f'{cell:>8}' for cell in cells)}")
    return lines


def _cells(name: str, result: Result) -> list[str]:
    numbers = result.numbers
    cells = [
        format(numbers[key], form) if key in numbers else "-"
        for key, (_, form) in _COLUMNS.items()
    ]
    shares = [
        f"{label} {100 * numbers[key]:.1f}%{_interval(numbers, key)}"
        for key, label in _SHARES.items()
        if key in numbers
    ]
    return [name, f"{result.counts['items']:,}", *cells, ", ".join(shares) or "-"]


def _interval(numbers: Mapping[str, float], key: str) -> str:
    if f"{key}/low" not in numbers:
        return ""
    return f" ({100 * numbers[f'{key}/low']:.1f}-{100 * numbers[f'{key}/high']:.1f})"
