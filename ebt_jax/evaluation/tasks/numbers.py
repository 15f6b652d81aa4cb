"""What comes out of a task, in numbers: sums over all items, divided at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ebt_jax.evaluation.intervals import wilson
from ebt_jax.evaluation.tasks.likelihood import Scores, add


def likelihood(scores: Sequence[Scores]) -> dict[str, float]:
    """Ratios of sums over all items, never means of ratios."""
    total = add(scores)
    numbers: dict[str, float] = {}
    parts = {
        "": (total.nll, total.tokens, total.bytes),
        "answer_": (total.answer_nll, total.answer_tokens, total.answer_bytes),
    }
    for part, (nll, tokens, size) in parts.items():
        if not tokens:
            continue
        numbers[f"{part}nll"] = float(nll[-1] / tokens)
        with np.errstate(over="ignore"):
            numbers[f"{part}perplexity"] = float(np.exp(nll[-1] / tokens))
        if size:
            numbers[f"{part}bits_per_byte"] = float(nll[-1] / math.log(2) / size)
        if len(nll) > 1:
            for step, value in enumerate(nll / tokens, 1):
                numbers[f"{part}nll/step_{step}"] = float(value)
        numbers[f"{part}tokens"] = float(tokens)
    if np.isfinite(total.gradients):
        numbers["energy_gradients"] = float(total.gradients / total.tokens)
    return numbers


def accuracies(scores: Sequence[Scores]) -> dict[str, float]:
    """Shares after each step: of items all right, and of tokens given what is right."""
    wrong = np.stack([score.wrong for score in scores])
    tokens = sum(score.answer_tokens for score in scores)
    numbers = {"token_accuracy": 1 - float(wrong[:, -1].sum() / tokens)}
    if wrong.shape[1] > 1:
        for step, counts in enumerate(wrong.T, 1):
            numbers[f"accuracy/step_{step}"] = float((counts == 0).mean())
            numbers[f"token_accuracy/step_{step}"] = 1 - float(counts.sum() / tokens)
    return numbers


def of_kinds(kinds: Sequence[str], scores: Sequence[Scores]) -> dict[str, float]:
    """Of each kind of token how many there are, and the means of what is scored."""
    sums = add(scores).kinds
    numbers = {}
    for kind, (count, right, nll, steps) in zip(kinds, sums, strict=True):
        if not count:  # all of them are cut off
            continue
        numbers[f"kind/{kind}/tokens"] = float(count)
        numbers[f"kind/{kind}/accuracy"] = float(right / count)
        numbers[f"kind/{kind}/nll"] = float(nll / count)
        if np.isfinite(steps):
            numbers[f"kind/{kind}/steps"] = float(steps / count)
    return numbers


def means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over the items of what each of them has one of, of shares with intervals.

    `/low` and `/high` are those of 95 %, over items (Wilson).
    """
    shares = (
        "accuracy",
        "accuracy_per_byte",
        "accuracy_energy",
        "accuracy_excess_energy",
        "exact_match",
    )
    numbers = {}
    for name in (*shares, "chance", "f1"):
        found = [row[name] for row in rows if name in row]
        if found:
            numbers[name] = float(np.mean(found))
        if found and name in shares:
            low, high = wilson(sum(found), len(found))
            numbers |= {f"{name}/low": low, f"{name}/high": high}
    return numbers
