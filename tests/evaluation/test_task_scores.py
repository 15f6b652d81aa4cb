"""Scores of items against sums by hand, and what they do not depend on."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers as library
from fake_objectives import bigram, cross_entropy, thinker, with_predict
from tiny import tiny

from ebt_jax import models
from ebt_jax.data import tokenizers
from ebt_jax.evaluation.generation import Continued
from ebt_jax.evaluation.metrics import evaluate
from ebt_jax.evaluation.tasks import answers
from ebt_jax.evaluation.tasks.catalogue import TASKS, Speaking
from ebt_jax.evaluation.tasks.likelihood import energy_of_targets
from ebt_jax.evaluation.tasks.rows import (
    batches,
    cut_tokens,
    encode_pair,
    text_rows,
    windows,
)
from ebt_jax.evaluation.tasks.run import Examinee, run_task
from ebt_jax.evaluation.tasks.table import table

BYTES = tokenizers.load("bytes")


def examinee(objective=None, **changes):
    """A model with random parameters."""
    objective = objective or bigram()
    params = objective.init(jax.random.key(0))
    return Examinee(objective, params, BYTES, context=64)._replace(**changes)


def run(tmp_path, task, records, who=None, limit=0, **changes):
    """A task's result on records."""
    path = tmp_path / f"{task}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    described = TASKS[task]._replace(**changes)
    return run_task(
        task, described, [str(path)], who or examinee(), limit=limit, warn=pytest.fail
    )


def nll_by_hand(params, text):
    """Of each byte but the first, `[bytes - 1]`."""
    ids = np.frombuffer(text.encode(), np.uint8)
    logits = np.asarray(params["table"], np.float64)[ids[:-1]]
    picked = np.take_along_axis(logits, ids[1:, None].astype(int), 1)[:, 0]
    return np.log(np.exp(logits).sum(1)) - picked


# Rows ---------------------------------------------------------------------------------


def pair(prompt, answer):
    return encode_pair(BYTES, "p" * prompt, "a" * answer)


@pytest.mark.parametrize("context", [1, 2, 7, 8])
@pytest.mark.parametrize("prompt", [1, 3, 20])
@pytest.mark.parametrize("answer", [1, 6, 8, 9, 30])
def test_every_token_of_an_answer_is_scored_once(context, prompt, answer):
    rows = windows(pair(prompt, answer), context, "item")
    scored = np.concatenate([row.tokens[row.answer :] for row in rows])
    assert scored.tolist() == [ord("a")] * answer
    assert all(2 <= len(row.tokens) <= context + 1 for row in rows)
    assert all(1 <= row.scored <= row.answer for row in rows)
    assert len(rows) == 1 or answer > context
    # All but the first see half a context, and score nothing but the answer.
    assert all(row.answer == row.scored == (context + 1) // 2 for row in rows[1:])
    cut = cut_tokens(pair(prompt, answer), context)
    assert cut == prompt - rows[0].answer
    if prompt + answer <= context + 1:
        assert cut == 0
    assert len({row.index for row in rows}) == len(rows)


def test_windows_follow_on_one_another():
    both = encode_pair(BYTES, "0123456789", "abcdefghijkl")
    texts = [bytes(row.tokens.tolist()).decode() for row in windows(both, 7, "item")]
    assert texts == ["6789abcd", "abcdefgh", "efghijkl"]


def test_a_prompt_is_cut_on_its_left():
    (row,) = windows(encode_pair(BYTES, "0123456789", "abc"), 7, "item")
    assert bytes(row.tokens.tolist()) == b"56789abc"
    assert row.answer == 5


def test_plain_text_is_cut_as_in_concat():
    rows = text_rows(np.arange(8), 3)
    assert [row.tokens.tolist() for row in rows] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7]]
    assert [row.index for row in rows] == [0, 1, 2]


def test_a_row_is_as_wide_as_it_would_be_alone():
    rows = [row for n in (3, 40, 70) for row in windows(pair(n, 2), 100, str(n))]
    together = {
        place: batch["tokens"].shape[1]
        for places, batch in batches(rows, 8, 100, pad_id=0)
        for place in places
    }
    assert together == {0: 32, 1: 64, 2: 100}
    (places, batch) = next(batches(rows, 8, 100, pad_id=9))
    assert places == [0]
    assert batch["weights"].sum() == 4 and batch["answer"].sum() == 2
    assert not batch["weights"][1:].any()
    assert (batch["tokens"][1:] == 9).all()


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A byte-level tokenizer that knows a few words and one pair of punctuation."""
    alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(alphabet)}
    merges = [("Ġ", "n"), ("Ġn", "o"), (":", "Ġ"), ("(", ")")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    model = library.models.BPE(vocab, merges)
    made = library.Tokenizer(model)
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    made.decoder = library.decoders.ByteLevel()
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    made.save(str(path))
    return tokenizers.load(str(path))


def test_the_boundary_falls_between_two_tokens(bpe):
    joined = encode_pair(bpe, "say", " no")
    assert len(joined.answer) == 1 and not joined.apart
    # Together, "()" is one token: it would belong to neither.
    apart = encode_pair(bpe, "f(", ")")
    assert apart.apart
    assert bpe.decode(apart.prompt) == "f(" and bpe.decode(apart.answer) == ")"


# Scores -------------------------------------------------------------------------------


def test_likelihood_of_all_and_of_the_answer(tmp_path):
    asked = [
        {"context": "1 + 1 =", "continuation": "2"},
        {"context": "10 + 10 =", "continuation": "20"},
    ]
    who = examinee()
    result = run(tmp_path, "simple_arithmetic", asked, who)
    texts = ["Question: 1 + 1 =\nAnswer: 2", "Question: 10 + 10 =\nAnswer: 20"]
    nll = [nll_by_hand(who.params, text) for text in texts]
    told = np.concatenate([nll[0][-2:], nll[1][-3:]])
    every = np.concatenate(nll)
    assert result.numbers == pytest.approx(
        {
            "nll": every.mean(),
            "perplexity": np.exp(every.mean()),
            "bits_per_byte": every.mean() / np.log(2),
            "tokens": len(every),
            "answer_nll": told.mean(),
            "answer_perplexity": np.exp(told.mean()),
            "answer_bits_per_byte": told.mean() / np.log(2),
            "answer_tokens": 5,
        },
        rel=1e-6,
    )
    assert [row["answer_nll"] for row in result.items] == pytest.approx(
        [nll[0][-2:].sum(), nll[1][-3:].sum()]
    )
    assert result.counts["items"] == 2
    assert run(tmp_path, "simple_arithmetic", asked, who, limit=1).counts["items"] == 1


LONG = [
    {"context": "x" * (3 * n), "continuation": "yz" * n} for n in (1, 4, 9, 15, 21, 40)
]


@pytest.mark.parametrize("make", [bigram, thinker])
def test_batch_size_and_order_change_no_score(tmp_path, make):
    who = examinee(make())
    names = {json.dumps(record): str(i) for i, record in enumerate(LONG)}

    def named(record):
        item = TASKS["dyck_languages"].parse(record)
        return item._replace(id=names[json.dumps(record)])

    def scored(records, batch_size):
        who_now = who._replace(batch_size=batch_size)
        result = run(tmp_path, "dyck_languages", records, who_now, parse=named)
        assert result.counts["answers in several windows"] == 1
        assert result.counts["prompts cut on the left"] == 3
        return sorted(result.items, key=lambda row: row["id"])

    for row, same in zip(scored(LONG[::-1], 5), scored(LONG, 2), strict=True):
        assert row.pop("id") == same.pop("id")
        assert row == pytest.approx(same, rel=1e-6)


def choices(right):
    texts = ["one", "twotwo", "three"]
    return {"query": "Which?", "choices": texts, "gold": texts.index(right)}


def test_multiple_choice_by_likelihood(tmp_path):
    who = examinee()
    records = [choices("one"), choices("twotwo"), choices("three")]
    result = run(tmp_path, "arc_cloze", records, who)
    prompt = "Question: Which?\nAnswer:"
    sums = np.array(
        [
            nll_by_hand(who.params, f"{prompt} {text}")[len(prompt) - 1 :].sum()
            for text in records[0]["choices"]
        ]
    )
    assert result.items[0]["choices_nll"] == pytest.approx(sums, rel=1e-5)
    # One of three is right, by whatever measure: the same one is chosen each time.
    assert result.numbers["accuracy"] == pytest.approx(1 / 3)
    assert result.numbers["chance"] == pytest.approx(1 / 3)
    best = int(np.argmin(sums))
    assert [row["accuracy"] for row in result.items] == [best == i for i in range(3)]
    best = int(np.argmin(sums / [3, 6, 5]))
    assert [row["accuracy_per_byte"] for row in result.items] == [
        best == i for i in range(3)
    ]
    assert "accuracy_energy" not in result.numbers


def test_multiple_choice_by_energy(tmp_path):
    letters = lambda params, batch: jnp.where(
        batch["targets"] == ord("w"),
        -5.0,
        jnp.where(batch["targets"] > 0, 1.0, jnp.nan),
    )
    who = examinee(thinker(), energy=letters)
    records = [choices("one"), choices("twotwo")]
    result = run(tmp_path, "arc_cloze", records, who)
    assert result.numbers["accuracy_energy"] == 0.5
    # " one" has 4 tokens, " twotwo" 7 of which 2 are w, " three" 6.
    assert result.items[0]["choices_energy"] == [4, -5, 6]
    assert result.items[1]["accuracy_energy"] == 1
    assert "accuracy_excess_energy" in result.numbers


def test_a_choice_that_is_not_finite_is_never_the_best(tmp_path):
    def nll(params, batch, key, num_steps):
        return {"nll": jnp.where(batch["targets"] == ord("w"), jnp.nan, 1.0)[None]}

    who = examinee(bigram()._replace(evaluate=nll))
    result = run(tmp_path, "arc_cloze", [choices("one"), choices("twotwo")], who)
    assert [row["accuracy"] for row in result.items] == [1, 0]


def test_energies_of_targets_are_those_of_the_right_answer():
    config = tiny(num_layers=1)
    model = models.build(config)
    params = jax.jit(model.init)(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 5), 0, config.vocab_size)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}

    @jax.jit
    def both(params):
        context = model.encode_context(params, batch)
        right = jax.nn.one_hot(batch["targets"], config.vocab_size)
        expected = model.energy(params, context, right, jnp.int32(1))
        return energy_of_targets(model, 2)(params, batch), expected

    energy, expected = both(params)
    np.testing.assert_allclose(energy, expected, rtol=1e-6)
    assert energy.shape == (2, 4)


def always(text):
    """A model that continues any token of a text with the text's next byte."""
    ids = jnp.array(np.frombuffer(text.encode(), np.uint8), jnp.int32)
    follows = jnp.zeros(256, jnp.int32).at[ids[:-1]].set(ids[1:])

    def predict(params, batch, key, thinking):
        return 10 * jax.nn.one_hot(follows[batch["tokens"]], 256)

    def evaluate(params, batch, key, num_steps):
        return {"nll": cross_entropy(predict(params, batch, key, None), batch)[None]}

    return with_predict(predict)._replace(evaluate=evaluate)


def test_lambada_wants_each_token_of_the_last_word(tmp_path):
    who = examinee(always("t no!"))
    records = [{"text": "say it no"}, {"text": "say it not"}, {"text": "it nx"}]
    result = run(tmp_path, "lambada", records, who)
    assert [row["accuracy"] for row in result.items] == [1, 0, 0]
    assert result.numbers["accuracy"] == pytest.approx(1 / 3)


def test_generated_answers_end_where_they_should(tmp_path):
    question = {"question": "?", "answer": "a\n#### 7"}
    who = examinee(always(": x\n#7"))
    one_line = Speaking(9, True, answers.exact_match)
    result = run(tmp_path, "gsm8k", [question] * 3, who, speaking=one_line)
    assert [row["said"] for row in result.items] == ["x"] * 3
    several = Speaking(9, False, answers.gsm8k_match)
    result = run(tmp_path, "gsm8k", [question], who, speaking=several)
    assert result.items[0]["said"].startswith("x\n#7")
    assert result.numbers["exact_match"] == 0


def test_generating_makes_room_and_stops_at_the_next_question(tmp_path, monkeypatch):
    asked = {}

    def generate_ids(objective, params, prompts, **options):
        asked.update(options, prompts=prompts)
        said = BYTES.encode(" a\n#### 7\nQuestion: #### 8")
        return [Continued(said, np.zeros(len(said), np.int32))] * len(prompts)

    path = "ebt_jax.evaluation.tasks.speaking.generate_ids"
    monkeypatch.setattr(path, generate_ids)
    question = {"question": "?" * 99, "answer": "a\n#### 7"}
    result = run(tmp_path, "gsm8k", [question])
    assert result.items[0]["said"] == "a\n#### 7"
    assert result.numbers["exact_match"] == 1 and result.numbers["f1"] == 1
    assert result.counts["prompts cut for generating"] == 1
    assert asked["new_tokens"] == 512 and asked["stop_ids"] == []
    assert bytes(asked["prompts"][0].tolist()) == b"?" * 24 + b"\nAnswer:"
    assert asked["sampling"].temperature == 0


def test_plain_text_has_the_numbers_of_ebt_evaluate(tmp_path):
    path = tmp_path / "valid.txt"
    path.write_text("Energy falls until the answer no longer changes. " * 9)
    who = examinee(thinker(), batch_size=4)
    result = run_task(
        "wikitext2", TASKS["wikitext2"], [str(path)], who, warn=pytest.fail
    )
    ids = BYTES.encode(path.read_text())
    rows = text_rows(ids, 64)
    whole = [
        batch | {"bytes": batch["weights"]} for _, batch in batches(rows, 8, 64, 0)
    ]
    for batch in whole:
        width = 64 - batch["tokens"].shape[1]
        for name in ("tokens", "targets", "weights", "bytes"):
            batch[name] = np.pad(batch[name], ((0, 0), (0, width)))
    expected = evaluate(who.objective, who.params, whole, seed=0)
    for name in ("nll", "bits_per_byte", "tokens", "nll/step_1"):
        assert result.numbers[name] == pytest.approx(expected[name], rel=1e-6)
    assert result.counts == {"items": 7}
    first = run_task(
        "wikitext2", TASKS["wikitext2"], [str(path)], who, limit=2, warn=pytest.fail
    )
    assert first.items == result.items[:2]


def test_the_table_says_what_was_scored(tmp_path):
    who = examinee()
    results = {
        "arc_cloze": run(tmp_path, "arc_cloze", [choices("one")], who),
        "dyck_languages": run(tmp_path, "dyck_languages", LONG, who),
    }
    head, *lines = table(results).splitlines()
    assert head.split()[:3] == ["task", "items", "ppl"]
    assert lines[0].startswith("arc_cloze           1 ")
    assert lines[0].endswith("chance 33.3%")
    assert lines[3].startswith("arc_cloze: 1 items, multiple choice, by text; of ")
    assert "6 items, the answer; 3 prompts cut on the left; " in lines[4]
    assert "1 answers in several windows" in lines[4]
