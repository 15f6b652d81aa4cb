"""Whether a generated answer is right, by the rules that the data sets came with."""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Callable, Sequence

_NUMBER = re.compile(r"#### (-?[0-9.,]+)")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def squad_normal(text: str) -> str:
    """Lower case, without punctuation and articles, words apart by one space.

    As in the official evaluation of SQuAD 1.1 (Rajpurkar et al. 2016).
    """
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(said: str, answers: Sequence[str]) -> float:
    """1 if what was said is one of the answers, both normalised as for SQuAD, else 0.

    Args:
      said: what the model generated.
      answers: the right ones, at least one.
    """
    return float(squad_normal(said) in map(squad_normal, answers))


def same_text(said: str, answers: Sequence[str]) -> float:
    """1 if what was said is one of the answers but for space around it, else 0."""
    return float(said.strip() in (answer.strip() for answer in answers))


def f1(said: str, answers: Sequence[str]) -> float:
    """Largest F1 of the words of what was said and of an answer, in [0, 1].

    Words are normalised as for SQuAD and counted as often as they occur. The official
    script gives 0 where one side has no word left, also if neither has; so does this.

    Args:
      said: what the model generated.
      answers: the right ones, at least one.
    """
    return max(_f1(squad_normal(said).split(), answer) for answer in answers)


def gsm8k_number(text: str) -> str | None:
    """The result `#### 1,234` of a GSM8K answer as "1234", None if there is none.

    The first one, without commas and the full stop that ends a sentence (Cobbe et al.
    2021: compared as text, so "18.0" is not "18").
    """
    found = _NUMBER.search(text)
    return found[1].replace(",", "").rstrip(".") if found else None


def gsm8k_match(said: str, answers: Sequence[str]) -> float:
    """1 if what was said has the number of one of the answers, else 0."""
    number = gsm8k_number(said)
    return float(number is not None and number in map(gsm8k_number, answers))


Match = Callable[[str, Sequence[str]], float]


def _f1(said: list[str], answer: str) -> float:
    words = squad_normal(answer).split()
    common = (collections.Counter(said) & collections.Counter(words)).total()
    return 2 * common / (len(said) + len(words)) if common else 0.0
