"""One benchmark task from its files to its numbers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ebt_jax.data.tokenizers import Tokenizer
from ebt_jax.errors import UserError
from ebt_jax.evaluation.tasks import answers
from ebt_jax.evaluation.tasks.catalogue import Task
from ebt_jax.evaluation.tasks.items import Item, Items, read_items, read_text
from ebt_jax.evaluation.tasks.likelihood import (
    EnergyOfTargets,
    Scorer,
    Scores,
    add,
    score_rows,
)
from ebt_jax.evaluation.tasks.made import make_items, token_kinds
from ebt_jax.evaluation.tasks.numbers import accuracies, likelihood, means, of_kinds
from ebt_jax.evaluation.tasks.rows import (
    Pair,
    Row,
    cut_tokens,
    encode_pair,
    text_rows,
    windows,
)
from ebt_jax.evaluation.tasks.speaking import most_tokens, prompt_room, speak
from ebt_jax.interfaces import Objective
from ebt_jax.refine import PyTree
from ebt_jax.thinking import AS_TRAINED, Thinking


class Examinee(NamedTuple):
    """A model as tasks see it.

    Attributes:
      objective: what predicts.
      params: its parameters.
      tokenizer: its tokenizer.
      context: tokens that it sees.
      energy: see `likelihood.energy_of_targets`; None of a model without energies.
      thinking: how much a prediction is refined.
      batch_size: sequences at once; changes no score.
      seed: of initial candidates and noise.
    """

    objective: Objective
    params: PyTree
    tokenizer: Tokenizer
    context: int
    energy: EnergyOfTargets | None = None
    thinking: Thinking = AS_TRAINED
    batch_size: int = 8
    seed: int = 0


class Result(NamedTuple):
    """What came out of a task.

    Attributes:
      counts: of items, and of what was left out or cut, by name.
      sources: files, or a TFDS name.
      numbers: by name: `nll` (nats per token), `perplexity`, `bits_per_byte`, over all
        tokens of prompts and right answers but the first of each, and with `answer_`
        over those of the answers alone; of a refinement also `nll/step_i`, where it is
        nothing but a number of steps, and `energy_gradients`, evaluations of an energy
        and its gradient for each token. Accuracies are shares of the items,
        `token_accuracy` is of the tokens of right answers, each after what is right;
        both may have `/step_i`, too. `kind/NAME/...` are means over tokens of a kind.
      items: of each item its id and scores; sums over tokens, in nats.
    """

    counts: dict[str, int]
    sources: list[str]
    numbers: dict[str, float]
    items: list[dict[str, Any]]


def run_task(
    name: str,
    task: Task,
    sources: Sequence[str],
    examinee: Examinee,
    *,
    limit: int = 0,
    progress: bool = False,
    warn: Callable[[str], None],
) -> Result:
    """Reads the items of a task and scores them.

    Args:
      name: of the task.
      task: what it is.
      sources: its files, or one TFDS name.
      examinee: what is scored.
      limit: the first so many items, of plain text windows of the context; 0 for all.
      progress: whether to show bars on stderr.
      warn: is told which items are malformed.

    Raises:
      UserError: for a file that cannot be read, or without anything to score.
    """
    if task.made:
        found = make_items(sources[0], limit)
    elif task.parse is None:
        return _run_text(name, sources, examinee, limit, progress)
    else:
        found = read_items(
            sources, task.parse, nested=task.nested, limit=limit, warn=warn
        )
    pairs = [
        [
            encode_pair(examinee.tokenizer, item.prompt, answer)
            for answer in item.choices or item.answers[:1]
        ]
        for item in found.items
    ]
    kinds = sorted({kind for item in found.items for kind in item.kinds if kind})
    if kinds:
        pairs = [
            [_told_apart(item, each[0], kinds, examinee.tokenizer)]
            for item, each in zip(found.items, pairs, strict=True)
        ]
    scores = _scores_of_pairs(
        name, task, found.items, pairs, len(kinds), examinee, progress
    )
    right = [_right(item) for item in found.items]
    gold = [each[place] for each, place in zip(scores, right, strict=True)]
    rows = [_item_row(i, s) for i, s in zip(found.items, gold, strict=True)]
    numbers = likelihood(gold)
    _mark_choices(found.items, scores, rows, examinee.energy is not None)
    if task.last_word:
        for row, score in zip(rows, gold, strict=True):
            row["accuracy"] = float(score.wrong[-1] == 0)
            row["token_accuracy"] = 1 - float(score.wrong[-1]) / score.answer_tokens
        numbers |= accuracies(gold)
    numbers |= of_kinds(kinds, gold)
    counts = _counts(found, pairs, right, examinee.context)
    if task.speaking is not None:
        own = [each[0] for each in pairs]
        new = most_tokens(examinee.tokenizer, own, task.speaking)
        room = prompt_room(examinee.context, new)
        counts["prompts cut for generating"] = sum(len(p.prompt) > room for p in own)
        _mark_said(name, task, found.items, own, rows, examinee, progress)
    numbers |= means(rows)
    return Result(counts, found.sources, numbers, rows)


def _run_text(
    name: str, sources: Sequence[str], examinee: Examinee, limit: int, progress: bool
) -> Result:
    """Plain text; an item is a window of the context."""
    texts = [read_text(path).encode() for path in sources]
    encoded = examinee.tokenizer.encode_documents(texts, lambda size: None)
    ids = np.concatenate(list(encoded))
    rows = text_rows(ids, examinee.context)
    rows = rows[:limit] if limit else rows
    if not rows:
        raise UserError(
            f"{', '.join(sources)} has fewer than two tokens, so there is nothing to "
            "predict; replace it"
        )
    scores = _score(
        name, Scorer(examinee.objective, examinee.thinking), rows, examinee, progress
    )
    each = [
        {"id": f"window {number}", "nll": float(score.nll[-1]), "tokens": score.tokens}
        for number, score in enumerate(scores)
    ]
    return Result({"items": len(rows)}, list(sources), likelihood(scores), each)


def _scores_of_pairs(
    name: str,
    task: Task,
    items: Sequence[Item],
    pairs: Sequence[Sequence[Pair]],
    kinds: int,
    examinee: Examinee,
    progress: bool,
) -> list[list[Scores]]:
    """Scores of each answer to choose from, or the one answer, of each item."""
    rows: list[Row] = []
    spans = []
    for item, each in zip(items, pairs, strict=True):
        for pair in each:
            new = windows(pair, examinee.context, item.id)
            spans.append((len(rows), len(rows) + len(new)))
            rows += new
    wants_energy = any(item.choices for item in items)
    scorer = Scorer(
        examinee.objective,
        examinee.thinking,
        examinee.energy if wants_energy else None,
        task.last_word,
        kinds,
    )
    scored = _score(name, scorer, rows, examinee, progress)
    sums = iter([add(scored[start:stop]) for start, stop in spans])
    return [[next(sums) for _ in each] for each in pairs]


def _score(
    name: str,
    scorer: Scorer,
    rows: Sequence[Row],
    examinee: Examinee,
    progress: bool,
) -> list[Scores]:
    with _bar(f"{name}: scoring", len(rows), progress) as bar:
        return score_rows(
            scorer,
            examinee.params,
            rows,
            batch_size=examinee.batch_size,
            context=examinee.context,
            pad_id=examinee.tokenizer.pad_id,
            token_bytes=examinee.tokenizer.token_bytes(),
            seed=examinee.seed,
            on_done=bar.update,
        )


def _right(item: Item) -> int:
    """The place of the right answer among those that are scored."""
    return item.choices.index(item.answers[0]) if item.choices else 0


def _item_row(item: Item, score: Scores) -> dict[str, Any]:
    return {
        "id": item.id,
        "nll": float(score.nll[-1]),
        "tokens": score.tokens,
        "answer_nll": float(score.answer_nll[-1]),
        "answer_tokens": score.answer_tokens,
    }


def _mark_choices(
    items: Sequence[Item],
    scores: Sequence[Sequence[Scores]],
    rows: list[dict[str, Any]],
    with_energy: bool,
) -> None:
    """Adds to each item which choice is best by each measure, and if it is right."""
    for item, each, row in zip(items, scores, rows, strict=True):
        if not item.choices:
            continue
        nll = np.array([score.answer_nll[-1] for score in each])
        sizes = [len(choice.strip().encode()) for choice in item.choices]
        row["right"] = item.answers[0].strip()
        row["choices_nll"] = nll.tolist()
        measures = {"accuracy": nll, "accuracy_per_byte": nll / sizes}
        if with_energy:
            energy, excess = np.array(
                [(score.energy, score.excess) for score in each]
            ).T
            row["choices_energy"] = energy.tolist()
            row["choices_excess_energy"] = excess.tolist()
            measures |= {"accuracy_energy": energy, "accuracy_excess_energy": excess}
        for name, values in measures.items():
            best = int(np.argmin(np.where(np.isfinite(values), values, np.inf)))
            row[name] = float(item.choices[best] == item.answers[0])
        row["chance"] = 1 / len(item.choices)


def _mark_said(
    name: str,
    task: Task,
    items: Sequence[Item],
    pairs: Sequence[Pair],
    rows: list[dict[str, Any]],
    examinee: Examinee,
    progress: bool,
) -> None:
    """Adds to each item what the model says, and how right that is."""
    assert task.speaking is not None  # the caller has looked
    with _bar(f"{name}: generating", len(items), progress) as bar:
        said = speak(
            examinee.objective,
            examinee.params,
            examinee.tokenizer,
            pairs,
            [item.id for item in items],
            task.speaking,
            context=examinee.context,
            batch_size=examinee.batch_size,
            seed=examinee.seed,
            thinking=examinee.thinking,
            on_done=bar.update,
        )
    for item, row, text in zip(items, rows, said, strict=True):
        row["said"] = text
        row["exact_match"] = task.speaking.match(text, item.answers)
        if not task.made:  # of words, which brackets are not
            row["f1"] = answers.f1(text, item.answers)


def _told_apart(
    item: Item, pair: Pair, kinds: Sequence[str], tokenizer: Tokenizer
) -> Pair:
    """A pair whose tokens have the numbers of their kinds."""
    tokens = np.concatenate([pair.prompt, pair.answer])
    text = item.prompt + item.answers[0]
    own = token_kinds(tokenizer, tokens, text, item.kinds)
    places = {kind: place for place, kind in enumerate(kinds)} | {"": -1}
    return pair._replace(kinds=np.array([places[kind] for kind in own]))


def _counts(
    found: Items,
    pairs: Sequence[Sequence[Pair]],
    right: Sequence[int],
    context: int,
) -> dict[str, int]:
    gold = [each[place] for each, place in zip(pairs, right, strict=True)]
    cut = [cut_tokens(pair, context) for pair in gold]
    return {
        "items": len(found.items),
        "malformed": found.malformed,
        "without an answer": found.unanswered,
        "prompts cut on the left": sum(count > 0 for count in cut),
        "prompt tokens cut": sum(cut),
        "answers in several windows": sum(len(p.answer) > context for p in gold),
        "encoded apart": sum(pair.apart for each in pairs for pair in each),
    }


def _bar(what: str, total: int, shown: bool) -> tqdm:
    return tqdm(desc=what, total=total, file=sys.stderr, delay=1.0, disable=not shown)
