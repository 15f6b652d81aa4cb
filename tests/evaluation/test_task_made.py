"""Tasks that are made: items, kinds of tokens, and the pipeline from text to scores."""

import json

import numpy as np
import pytest
from fake_objectives import bigram

from ebt_jax import cli
from ebt_jax.data import synthetic, tokenizers
from ebt_jax.evaluation.intervals import wilson
from ebt_jax.evaluation.tasks.catalogue import TASKS
from ebt_jax.evaluation.tasks.made import (
    character_kinds,
    entry_for,
    make_items,
    token_kinds,
)
from ebt_jax.evaluation.tasks.rows import encode_pair, windows
from ebt_jax.evaluation.tasks.run import Examinee, run_task
from ebt_jax.evaluation.tasks.table import table

BYTES = tokenizers.load("bytes")
QUIET = (
    "--config.eval.curve_steps=0",
    "--config.eval.sample_tokens=0",
    "--config.log.plots=False",
    "--config.log.tensorboard=False",
    "--config.mesh.data=1",
    "--config.data.path=dyck:examples=500",
)


def test_wilson():
    # Newcombe (1998), table I: 81 of 263, 0 of 20, 1 of 29.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert wilson(5, 5)[1] == 1


@pytest.mark.parametrize("entry", ["arithmetic:digits=1-2,ops=+-", "dyck:depth=2-3"])
def test_items_look_like_text_and_are_not_in_it(entry):
    found = make_items(entry, 40)
    source = synthetic.parse(entry)
    text = {p.line for p in synthetic.different(source, 2000)}
    assert found.sources == [entry] and len({item.id for item in found.items}) == 40
    for item in found.items:
        (answer,) = item.answers
        empty, first, second, question = item.prompt.split("\n")
        assert not empty and answer.endswith("\n") and question == item.id
        assert f"{question}{answer}" not in text
        lines = [line + "\n" for line in (first, second)]
        kept = {p.line for p in synthetic.different(source, 40, kept=True)}
        assert not kept & set(lines)
        assert len(item.kinds) == len(item.prompt + answer)
        assert set(item.kinds[: -len(question + answer)]) == {""}
        assert item.kinds[-1] == "end" and "" not in item.kinds[-len(question) :]
    assert found == make_items(entry, 40)


@pytest.mark.parametrize(
    ("source", "question", "answer", "kinds"),
    [
        (
            synthetic.Arithmetic(),
            "57+85=",
            "142",
            "operand operand sign operand operand equals|answer 10^2 carry|"
            "answer 10^1 carry|answer 10^0|end",
        ),
        (
            synthetic.Arithmetic(ops="-", answer="reversed"),
            "52-7=",
            "54",
            "operand operand sign operand equals|answer 10^0|answer 10^1 carry|end",
        ),
        (
            synthetic.Dyck(),
            "()<{=",
            "}>",
            "opening closing opening opening equals|answer 1|answer 2|end",
        ),
    ],
)
def test_kinds_of_characters(source, question, answer, kinds):
    asked, *told = kinds.split("|")
    problem = synthetic.Problem(question, answer, question)
    assert character_kinds(source, problem) == (*asked.split(), *told)


def test_a_token_is_of_the_kind_of_its_first_byte():
    class Pairs:
        """Tokens of two bytes."""

        def token_bytes(self):
            return np.full(9, 2, np.int32)

    kinds = token_kinds(Pairs(), np.arange(3), "abcdef", tuple("uvwxyz"))
    assert kinds == ["u", "w", "y"]


def test_windows_keep_kinds_with_their_tokens():
    pair = encode_pair(BYTES, "0123456789", "abcdefghijkl")
    pair = pair._replace(kinds=np.concatenate([pair.prompt, pair.answer]))
    for row in windows(pair, 7, "item"):
        np.testing.assert_array_equal(row.kinds, row.tokens)


def test_what_a_task_is_made_of():
    dyck = "dyck:kinds=2,depth=1-2"
    path = f"pydoc,{dyck},examples=40"
    assert entry_for("dyck", False, None, path) == f"{dyck},examples=40"
    assert entry_for("dyck", True, None, path).startswith("dyck:kinds=2,depth=3-4,")
    assert entry_for("dyck", True, "dyck:depth=5", path) == "dyck:depth=6-10"
    assert entry_for("arithmetic", True, None, path) == "arithmetic:digits=4-5"


def test_scores_by_kind_and_intervals():
    # After "=" comes ")", after all else the end: right where "(" alone is open.
    follows = np.full(256, ord("\n"))
    follows[ord("=")] = ord(")")
    params = {"table": 50 * np.eye(256, dtype=np.float32)[follows]}
    who = Examinee(bigram(), params, BYTES, context=96, batch_size=20)
    task, entry = TASKS["dyck"], "dyck:depth=1-2"
    result = run_task("dyck", task, [entry], who, limit=60, warn=pytest.fail)
    told = [item.answers[0].removesuffix("\n") for item in make_items(entry, 60).items]
    right = [answer == ")" for answer in told]
    numbers = result.numbers
    assert 0 < sum(right) < 60
    assert numbers["accuracy"] == numbers["exact_match"] == np.mean(right)
    assert (numbers["accuracy/low"], numbers["accuracy/high"]) == wilson(sum(right), 60)
    first = [answer[0] == ")" for answer in told]
    assert numbers["kind/answer 1/accuracy"] == np.mean(first)
    assert numbers["kind/answer 1/tokens"] == numbers["kind/end/tokens"] == 60
    assert numbers["kind/answer 2/accuracy"] == 0
    assert numbers["kind/end/accuracy"] == 1
    assert "kind/answer 1/steps" not in numbers  # of a model that does not think
    assert {row["said"] for row in result.items} == {")"}
    tokens = sum(len(answer) + 1 for answer in told)
    given = tokens - sum(len(answer) - (answer[0] == ")") for answer in told)
    assert numbers["token_accuracy"] == pytest.approx(given / tokens)
    shown = table({"dyck": result})
    assert f"accuracy {100 * np.mean(right):.1f}% (" in shown and "answer 1" in shown


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run that has learnt next to nothing."""
    path = tmp_path_factory.mktemp("made") / "run"
    config = "--config=experiments/algorithmic.py:dyck,anchored_s2,tiny"
    small = ("--config.model.num_layers=1", "--config.model.unroll=0")
    argv = ["train", config, f"--workdir={path}", "--steps=2", *QUIET, *small]
    assert cli.run(argv) == 0
    return path


def test_from_text_to_scores_with_several_policies(folder, capsys):
    policies = ["fixed:steps=4", "until:tolerance=0.01,steps=4"]
    flags = [f"--workdir={folder}", "--task=dyck,dyck_far", "--items=6"]
    flags += [f"--think={';'.join(policies)}", "--batch_size=8", "--json"]
    capsys.readouterr()
    assert cli.run(["evaluate", *flags]) == 0
    said = json.loads(capsys.readouterr().out)
    assert list(said["policies"]) == policies
    fixed, until = (said["policies"][p]["dyck"]["results"] for p in policies)
    assert {f"accuracy/step_{i}" for i in range(1, 5)} < fixed.keys()
    assert fixed["accuracy/step_4"] == fixed["accuracy"] == fixed["exact_match"]
    assert fixed["kind/opening/steps"] == 4 and 1 <= until["kind/opening/steps"] <= 4
    assert fixed["kind/opening/tokens"] == until["kind/opening/tokens"]
    for name in ("dyck", "dyck_far"):
        kept = json.loads((folder / "tasks" / f"{name}.json").read_text())
        assert list(kept["policies"]) == policies
        found = said["policies"][policies[1]][name]
        assert kept["results"] == found["results"]
    assert kept["sources"] == ["dyck:depth=5-8,examples=500"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task=dyck", "--data=arithmetic"], "is of arithmetic, but --task names 'd"),
        (["--task=dyck,arc", "--data=dyck"], "is of dyck, but --task names 'arc'; lea"),
        (["--task=dyck", "--data=dyck:depth=0"], "depth is 0, but goes from 1 to 200"),
        (["--task=dyck,arc"], "--data is missing; give it the folder with the files"),
        (["--task=dyck", "--think=fixed;untill"], "there is no policy 'untill'; did y"),
        (["--task=arithmetic", "--data=arithmetic:digits=1"], "has little more than 5"),
    ],
)
def test_mistakes(folder, capsys, monkeypatch, flags, message):
    monkeypatch.setattr(synthetic, "_MOST_REPEATS", 200)
    capsys.readouterr()
    assert cli.run(["evaluate", f"--workdir={folder}", *flags]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
