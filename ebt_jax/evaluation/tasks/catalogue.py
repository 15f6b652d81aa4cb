"""The benchmark tasks: their files, how a record becomes an item, and what is scored.

Formats are those of the published evaluation: `Question: ...` and, on the next line,
`Answer: ...`. The space or line end before an answer is a part of the answer. Answers
are generated from the same prompts; the published code puts its labels in brackets
there, which a model that is not fine-tuned has never seen either way. ARC is also asked
without showing the choices, as is usual for small models. `arithmetic` and `dyck` are
made, in the form that their text has (`made.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from ebt_jax.evaluation.tasks import answers
from ebt_jax.evaluation.tasks.items import Item

_CUE = re.compile(r"\s*\b(Answer|A):\s*$")  # with which a question may end already
_LETTERS = "ABCDEFGHIJ"


class Speaking(NamedTuple):
    """How an answer is generated, always the likeliest token, and judged.

    Attributes:
      longest: bytes of text; as many tokens as that takes on average. 0 for as many
        tokens as the longest right answer has.
      one_line: whether a line end ends it.
      match: exact match of the text and the right answers, 0 or 1.
    """

    longest: int
    one_line: bool
    match: answers.Match


class Task(NamedTuple):
    """A benchmark task.

    Attributes:
      scored: what is scored besides likelihood, for people.
      files: where it may be below the folder, see `items.find_files`.
      parse: makes an item of a record, see `items.read_items`; None for plain text,
        all of which is scored, cut as in packing `concat`.
      nested: see `items.read_items`.
      tfds: its TFDS name, None if it has none.
      last_word: whether the answer counts as right where each of its tokens is the
        likeliest one.
      speaking: how answers are generated; None where they are not.
      made: the name in `synthetic.SOURCES` where items are made, not read.
      far: whether they lie out of the distribution of the text, `synthetic.farther`.
    """

    scored: str
    files: tuple[str, ...]
    parse: Callable[[Any], Item | None] | None
    nested: tuple[str, ...] = ()
    tfds: str | None = None
    last_word: bool = False
    speaking: Speaking | None = None
    made: str = ""
    far: bool = False


def gsm8k(record: Any) -> Item:
    """`{question, answer}`, of GSM8K; the answer ends with `#### NUMBER`."""
    answer = _text(record, "answer")
    if answers.gsm8k_number(answer) is None:
        raise ValueError("field 'answer' has no line '#### NUMBER'")
    return _asked(_text(record, "question"), answer)


def squad(record: Any) -> Item | None:
    """`{context, question, answers, id}`, of SQuAD 1.1 or 2.0."""
    found = _field(record, "answers")
    if isinstance(found, dict):  # as TFDS has them
        texts = _field(found, "text")
    elif isinstance(found, list):
        texts = [_text(each, "text") for each in found]
    else:
        raise ValueError("field 'answers' is not a list")
    if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
        raise ValueError("field 'answers' holds what is not text")
    texts = [text for text in texts if text.strip()]
    if not texts:
        return None
    question = f"{_text(record, 'context')}\n{_text(record, 'question')}"
    others = dict.fromkeys(f" {text.strip()}" for text in texts)
    item = _asked(question, texts[0])
    return item._replace(answers=tuple(others), id=_text(record, "id"))


def bigbench(record: Any) -> Item:
    """`{inputs, targets}`, or with the names that other collections give them.

    With `choices`, or `multiple_choice_targets`, a multiple choice.
    """
    names = ("inputs", "input", "context", "query")
    question = _CUE.sub("", _text(record, _first(record, names)))
    target = _field(record, _first(record, ("targets", "target", "continuation")))
    target = target[0] if isinstance(target, list) and target else target
    if not isinstance(target, str):
        raise ValueError(f"the target is not text but {type(target).__name__}")
    item = _asked(question, target)
    for name in ("choices", "multiple_choice_targets"):
        if record.get(name):
            return _chosen(item.prompt, _texts(record, name), target)
    return item


def lambada(record: Any) -> Item:
    """`{text}`: its last word is to be guessed."""
    text = _text(record, _first(record, ("text", "passage"))).strip()
    *before, word = text.split()
    if not before:
        raise ValueError("has no word before the last one")
    prompt = text[: -len(word)].rstrip()
    return Item(prompt, (text[len(prompt) :],))


def arc(record: Any) -> Item:
    """A question, its choices as lines `A: ...`, and the letter of the right one."""
    question, texts, gold = _arc(record)
    letters = _LETTERS[: len(texts)]
    lines = [f"{letter}: {text}" for letter, text in zip(letters, texts, strict=True)]
    prompt = _asked("\n".join([question, *lines]), "-").prompt
    return _chosen(prompt, list(letters), letters[gold])


def arc_cloze(record: Any) -> Item:
    """A question, answered with the text of a choice; the others are not shown."""
    question, texts, gold = _arc(record)
    return _chosen(_asked(question, "-").prompt, texts, texts[gold])


def planbench(record: Any) -> Item:
    """`{query, ground_truth_plan}`; the query ends where the plan begins."""
    plan = _field(record, "ground_truth_plan")
    plan = plan[0] if isinstance(plan, list) and plan else plan
    if not isinstance(plan, str) or not plan.strip():
        raise ValueError("field 'ground_truth_plan' is not text or empty")
    number = record.get("instance_id")
    name = "" if number is None else str(number)
    return Item(_text(record, "query").rstrip(), ("\n" + plan.strip(),), id=name)


def _bigbench(name: str, scored: str) -> Task:
    files = (f"bigbench/{name}.jsonl", f"bigbench/{name}_*.jsonl")
    return Task(scored, files, bigbench)


def _made(name: str, far: bool, scored: str) -> Task:
    speaking = Speaking(0, True, answers.same_text)
    return Task(scored, (), None, (), None, True, speaking, name, far)


_CHOICE = "multiple choice"
_ARC_FILES = ("arc/*_test.jsonl", "arc/*.jsonl")
TASKS = {
    "gsm8k": Task(
        "the answer, and what is generated: the number after ####, F1 of the words",
        ("gsm8k/test.jsonl", "gsm8k/*.jsonl"),
        gsm8k,
        tfds="gsm8k",
        speaking=Speaking(512, False, answers.gsm8k_match),
    ),
    "squad": Task(
        "the first answer, and what is generated: exact match, F1, of all answers",
        ("squad/dev-*.json", "squad/*.json"),
        squad,
        nested=("data", "paragraphs", "qas"),
        tfds="squad",
        speaking=Speaking(64, True, answers.exact_match),
    ),
    "dyck_languages": _bigbench("dyck_languages", "the answer"),
    "elementary_math_qa": _bigbench("elementary_math_qa", _CHOICE),
    "elementary_math_qa_like": Task(
        _CHOICE, ("elementary_math_qa_like/*.jsonl",), bigbench
    ),
    "simple_arithmetic": _bigbench("simple_arithmetic", "the answer"),
    "repeat_copy_logic": _bigbench("repeat_copy_logic", "the answer"),
    "lambada": Task(
        "the last word: accuracy of the likeliest tokens",
        ("lambada/*.jsonl",),
        lambada,
        tfds="lambada",
        last_word=True,
    ),
    "arc": Task(f"{_CHOICE}, by letter", _ARC_FILES, arc, tfds="ai2_arc"),
    "arc_cloze": Task(f"{_CHOICE}, by text", _ARC_FILES, arc_cloze, tfds="ai2_arc"),
    "planbench": Task(
        "the plan",
        ("planbench/*/task_1_plan_generation.json",),
        planbench,
        nested=("instances",),
    ),
    "planbench_verification": Task(
        "what is said of a plan",
        ("planbench/*/task_3_plan_verification.json",),
        planbench,
        nested=("instances",),
    ),
    "wikitext2": Task(
        "plain text", ("wikitext2/test.txt", "wikitext2/valid.txt"), None
    ),
    "novels": Task("plain text", ("novels/test.txt", "novels/*.txt"), None),
    "tinyshakespeare": Task("plain text", ("tinyshakespeare/*.txt",), None),
    "arithmetic": _made("arithmetic", False, "the answer"),
    "arithmetic_far": _made("arithmetic", True, "the answer, of longer operands"),
    "dyck": _made("dyck", False, "the answer"),
    "dyck_far": _made("dyck", True, "the answer, of deeper nesting"),
}


def _asked(question: str, answer: str) -> Item:
    if not answer.strip():
        raise ValueError("the answer is empty")
    return Item(f"Question: {question.strip()}\nAnswer:", (f" {answer.strip()}",))


def _chosen(prompt: str, texts: list[str], right: str) -> Item:
    """An item whose answer is one of several texts."""
    choices = tuple(f" {text.strip()}" for text in texts)
    if len(choices) < 2:
        raise ValueError("has fewer than two choices")
    if "" in (choice.strip() for choice in choices):
        raise ValueError("has an empty choice")
    answer = f" {right.strip()}"
    if answer not in choices:
        raise ValueError(f"the target {right!r} is none of the choices")
    return Item(prompt, (answer,), choices)


def _arc(record: Any) -> tuple[str, list[str], int]:
    """Question, texts of the choices, and which is right, of three known layouts."""
    if isinstance(record, dict) and "query" in record:
        question = _text(record, "query").removeprefix("Question:").strip()
        texts, gold = _texts(record, "choices"), _field(record, "gold")
        if type(gold) is not int or not 0 <= gold < len(texts):
            raise ValueError(f"field 'gold' is {gold!r}, but there are {len(texts)}")
    else:
        question = _field(record, "question")
        if isinstance(question, dict):  # as the authors have it
            question, choices = _text(question, "stem"), _field(question, "choices")
        else:
            question, choices = _text(record, "question"), _field(record, "choices")
        if isinstance(choices, list):
            choices = {
                name: [_field(choice, name) for choice in choices]
                for name in ("text", "label")
            }
        texts, labels = _texts(choices, "text"), _field(choices, "label")
        key = _field(record, "answerKey")
        if not isinstance(labels, list) or len(labels) != len(texts):
            raise ValueError(f"has not as many labels as choices, {len(texts)}")
        if key not in labels:
            raise ValueError(f"field 'answerKey' is {key!r}, none of {labels}")
        gold = labels.index(key)
    if len(texts) > len(_LETTERS):
        raise ValueError(f"has {len(texts)} choices, more than {len(_LETTERS)}")
    return question, texts, gold


def _dict(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise ValueError("is not an object")
    return record


def _field(record: Any, name: str) -> Any:
    if name not in _dict(record):
        raise ValueError(f"has no field {name!r}")
    return record[name]


def _first(record: Any, names: tuple[str, ...]) -> str:
    for name in names:
        if name in _dict(record):
            return name
    raise ValueError(f"has none of the fields {', '.join(names)}")


def _text(record: Any, name: str) -> str:
    text = _field(record, name)
    if not isinstance(text, str):
        raise ValueError(f"field {name!r} is not text but {type(text).__name__}")
    if not text.strip():
        raise ValueError(f"field {name!r} is empty")
    return text


def _texts(record: Any, name: str) -> list[str]:
    texts = _field(record, name)
    if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
        raise ValueError(f"field {name!r} is not a list of texts")
    return texts
