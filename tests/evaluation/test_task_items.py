"""From files to items: formats, and everything that can be wrong with a file."""

import gzip
import json
import lzma

import pytest

from ebt_jax.errors import UserError
from ebt_jax.evaluation.tasks import answers
from ebt_jax.evaluation.tasks.catalogue import TASKS
from ebt_jax.evaluation.tasks.items import Item, find_files, read_items, read_text

GSM8K = {"question": "How many?", "answer": "1 + 1 = 2.\n#### 2"}
ANSWERS = [{"text": "in May", "answer_start": 0}, {"text": "May", "answer_start": 3}]
SQUAD = {
    "data": [
        {
            "title": "t",
            "paragraphs": [
                {
                    "context": "It was in May.",
                    "qas": [
                        {"id": "q1", "question": "When?", "answers": ANSWERS},
                        {"id": "q2", "question": "Why?", "answers": []},
                    ],
                }
            ],
        }
    ]
}
PLAN = {
    "instance_id": 7,
    "query": "I have blocks.\n[PLAN]\n",
    "ground_truth_plan": "up\n",
}
ARC = {"query": "Question: Which?", "choices": ["one", "two"], "gold": 1}
ARC_LABELS = {"text": ["one", "two"], "label": ["A", "B"]}


def item(task, record):
    """The item of one record."""
    return TASKS[task].parse(record)


def write_lines(path, *records):
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_formats_are_those_of_the_paper():
    assert item("gsm8k", GSM8K) == Item(
        "Question: How many?\nAnswer:", (" 1 + 1 = 2.\n#### 2",)
    )
    asked = {"context": "Close: ( [\nOutput:", "continuation": "] )"}
    assert item("dyck_languages", asked) == Item(
        "Question: Close: ( [\nOutput:\nAnswer:", (" ] )",)
    )
    asked = {"input": "1 + 1?\n choice:2\n choice:3\nA:", "target": "2"}
    assert item("elementary_math_qa", asked | {"choices": ["2", "3"]}) == Item(
        "Question: 1 + 1?\n choice:2\n choice:3\nAnswer:", (" 2",), (" 2", " 3")
    )
    assert item("lambada", {"text": "He said\nno more."}) == Item(
        "He said\nno", (" more.",)
    )
    assert item("planbench", PLAN) == Item("I have blocks.\n[PLAN]", ("\nup",), id="7")


def test_other_collections_names_make_the_same_items():
    theirs = {"inputs": "1 + 1 =", "targets": ["2"], "multiple_choice_targets": []}
    ours = {"context": "1 + 1 =", "continuation": "2"}
    assert item("simple_arithmetic", theirs) == item("simple_arithmetic", ours)
    assert item("lambada", {"passage": "a b"}) == item("lambada", {"text": "a b"})
    listed = PLAN | {"ground_truth_plan": ["up"]}
    assert item("planbench", listed) == item("planbench", PLAN)


@pytest.mark.parametrize(
    "record",
    [
        ARC,
        {"question": "Which?", "choices": ARC_LABELS, "answerKey": "B"},
        {
            "question": {
                "stem": "Which?",
                "choices": [
                    {"text": "one", "label": "1"},
                    {"text": "two", "label": "2"},
                ],
            },
            "answerKey": "2",
        },
        {  # as TFDS has it
            "question": "Which?",
            "choices": {"text": ["one", "two"], "label": [0, 1]},
            "answerKey": 1,
        },
    ],
)
def test_arc_in_every_layout(record):
    assert item("arc", record) == Item(
        "Question: Which?\nA: one\nB: two\nAnswer:", (" B",), (" A", " B")
    )
    assert item("arc_cloze", record) == Item(
        "Question: Which?\nAnswer:", (" two",), (" one", " two")
    )


def read(task, *sources, limit=0):
    """What a task finds in files, and the warnings."""
    warnings = []
    found = read_items(
        [str(source) for source in sources],
        TASKS[task].parse,
        nested=TASKS[task].nested,
        limit=limit,
        warn=warnings.append,
    )
    return found, warnings


def test_nested_files(tmp_path):
    path = tmp_path / "dev.json.gz"
    path.write_bytes(gzip.compress(json.dumps(SQUAD).encode()))
    found, _ = read("squad", path)
    assert found.items == [
        Item("Question: It was in May.\nWhen?\nAnswer:", (" in May", " May"), id="q1")
    ]
    assert found.unanswered == 1
    path = tmp_path / "plans.json.xz"
    path.write_bytes(lzma.compress(json.dumps({"instances": [PLAN, {}]}).encode()))
    found, warnings = read("planbench", path)
    assert [each.id for each in found.items] == ["7"]
    (warning,) = warnings
    assert f"{path}, instances 2: has no field 'ground_truth_plan'" in warning


def test_malformed_lines_are_named_and_counted(tmp_path):
    path = write_lines(tmp_path / "test.jsonl", GSM8K, {"question": "?"}, GSM8K)
    with path.open("ab") as file:
        file.write(b'{"half\n\n\xff\n')
    found, warnings = read("gsm8k", path)
    assert [each.id for each in found.items] == [
        "test.jsonl, line 1",
        "test.jsonl, line 3",
    ]
    assert found.malformed == 3
    assert [warning.split(": ")[0] for warning in warnings] == [
        f"skipped {path}, line {number}" for number in (2, 4, 6)
    ]
    assert "has no field 'answer'" in warnings[0]
    assert "is not JSON" in warnings[1]
    assert "is not UTF-8" in warnings[2]


def test_half_a_character_is_no_text(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", GSM8K, GSM8K | {"question": "a \ud83d"})
    found, (warning,) = read("gsm8k", path)
    assert len(found.items) == 1
    assert warning.endswith(r"line 2: holds '\ud83d', which is no character")


def test_many_malformed_lines_are_summed_up(tmp_path):
    path = write_lines(tmp_path / "test.jsonl", *[{}] * 30, GSM8K)
    found, warnings = read("gsm8k", path)
    assert found.malformed == 30 and len(warnings) == 21
    assert warnings[-1] == "skipped 30 malformed items in all"


def test_the_first_items_of_several_files(tmp_path):
    paths = [write_lines(tmp_path / f"{i}.jsonl", GSM8K, GSM8K) for i in range(2)]
    paths[1].write_text(json.dumps(GSM8K) + "\nnever read")
    found, warnings = read("gsm8k", *paths, limit=3)
    assert [each.id for each in found.items] == [
        "0.jsonl, line 1",
        "0.jsonl, line 2",
        "1.jsonl, line 1",
    ]
    assert not warnings


@pytest.mark.parametrize(
    ("task", "record", "problem"),
    [
        ("gsm8k", [], "is not an object"),
        ("gsm8k", GSM8K | {"question": 3}, "field 'question' is not text but int"),
        ("gsm8k", GSM8K | {"question": " "}, "field 'question' is empty"),
        ("gsm8k", GSM8K | {"answer": "2"}, "field 'answer' has no line '#### NUMBER'"),
        ("squad", {"answers": 1}, "field 'answers' is not a list"),
        ("squad", {"answers": {"text": [1]}}, "field 'answers' holds what is not text"),
        ("dyck_languages", {}, "has none of the fields inputs, input, context, query"),
        ("dyck_languages", {"input": "a", "target": 1}, "target is not text but int"),
        ("dyck_languages", {"input": "a", "target": " "}, "the answer is empty"),
        (
            "elementary_math_qa",
            {"input": "a", "target": "b", "choices": ["c", "d"]},
            "the target 'b' is none of the choices",
        ),
        (
            "elementary_math_qa",
            {"input": "a", "target": "b", "choices": ["b"]},
            "has fewer than two choices",
        ),
        (
            "elementary_math_qa",
            {"input": "a", "target": "b", "choices": ["b", ""]},
            "has an empty choice",
        ),
        (
            "elementary_math_qa",
            {"input": "a", "target": "b", "choices": "bc"},
            "field 'choices' is not a list of texts",
        ),
        ("lambada", {"text": "word"}, "has no word before the last one"),
        ("arc", ARC | {"gold": 2}, "field 'gold' is 2, but there are 2"),
        (
            "arc",
            {"question": "Which?", "choices": ARC_LABELS, "answerKey": "C"},
            r"field 'answerKey' is 'C', none of \['A', 'B'\]",
        ),
        (
            "arc",
            {
                "question": "Which?",
                "choices": ARC_LABELS | {"label": ["A"]},
                "answerKey": "A",
            },
            "has not as many labels as choices, 2",
        ),
        ("arc", ARC | {"choices": ["a"] * 11}, "has 11 choices, more than 10"),
        ("planbench", PLAN | {"ground_truth_plan": 1}, "is not text or empty"),
    ],
)
def test_what_is_no_item(task, record, problem):
    with pytest.raises(ValueError, match=problem):
        item(task, record)


def test_files_that_cannot_be_read(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {}, {})
    with pytest.raises(
        UserError, match="all 2 are malformed, the first: .*line 1: has"
    ):
        read("gsm8k", path)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(UserError, match="has no item that can be scored; mend"):
        read("gsm8k", empty)
    torn = tmp_path / "torn.jsonl.gz"
    torn.write_bytes(gzip.compress(b"{}\n" * 99)[:-9])
    with pytest.raises(
        UserError, match=r"torn.jsonl.gz cannot be read \(.*\); replace"
    ):
        read("gsm8k", torn)
    path = tmp_path / "bad.json"
    path.write_text("{")
    with pytest.raises(UserError, match=r"bad.json cannot be read \("):
        read("squad", path)
    path.write_text('{"data": 1}')
    with pytest.raises(UserError, match="bad.json: has no list 'data'"):
        read("squad", path)
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match="bad.json cannot be read"):
        read_text(str(path))


def test_where_files_are_looked_for(tmp_path):
    patterns = ("gsm8k/test.jsonl", "gsm8k/*.jsonl")
    (tmp_path / "gsm8k").mkdir()
    train = write_lines(tmp_path / "gsm8k" / "train.jsonl", GSM8K)
    assert find_files("gsm8k", patterns, str(tmp_path)) == [str(train)]
    assert find_files("gsm8k", patterns, str(tmp_path / "gsm8k")) == [str(train)]
    assert find_files("gsm8k", patterns, str(train)) == [str(train)]
    best = tmp_path / "gsm8k" / "test.jsonl.gz"
    best.write_bytes(b"")
    assert find_files("gsm8k", patterns, str(tmp_path)) == [str(best)]
    with pytest.raises(UserError, match="looks for gsm8k/test.jsonl or gsm8k/\\*"):
        find_files("gsm8k", patterns, str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match="task arc: nothing is there in"):
        find_files("arc", ("arc/*.jsonl",), str(tmp_path))


# Answers ------------------------------------------------------------------------------


def test_squad_answers_are_compared_as_the_official_script_does():
    assert answers.squad_normal("  The U.S.,  an  Ally!") == "us ally"
    assert answers.exact_match("the Ally", ["foe", "ally."]) == 1
    assert answers.exact_match("allies", ["ally"]) == 0
    # Two of three words said, two of two asked for: P 2/3, R 1.
    assert answers.f1("in late May", ["June", "late, MAY"]) == pytest.approx(0.8)
    assert answers.f1("a b b", ["b b b"]) == pytest.approx(0.8)
    assert answers.f1("", ["the"]) == 0


def test_gsm8k_answers_are_compared_by_their_number():
    assert answers.gsm8k_number("so 3.\n#### 1,234.\n#### 5") == "1234"
    assert answers.gsm8k_number("#### -2.50") == "-2.50"
    assert answers.gsm8k_number("2") is None
    assert answers.gsm8k_match("other words\n#### 1,000", ["#### 1000"]) == 1
    assert answers.gsm8k_match("1000", ["#### 1000"]) == 0
