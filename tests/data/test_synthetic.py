"""Text that is made: lines are right, different, of the distribution, and the same."""

import collections
import dataclasses
import re

import pytest

from ebt_jax.data import corpus, pipeline, prepare, sources, synthetic, tokenizers
from ebt_jax.data.config import DataConfig
from ebt_jax.errors import UserError

BYTES = tokenizers.load("bytes")


def lines(path):
    """All documents of a path, as text."""
    return [text.decode() for text in sources.documents(DataConfig(path=path))]


def closed(question):
    """What closes the brackets of a question, by taking pairs out of it."""
    rest = question.removesuffix("=")
    while (shorter := re.sub(r"\(\)|\[\]|\{\}|<>", "", rest)) != rest:
        rest = shorter
    return rest[::-1].translate(str.maketrans("([{<", ")]}>"))


def deepest(question):
    heights = [0]
    for bracket in question.removesuffix("="):
        heights.append(heights[-1] + (1 if bracket in "([{<" else -1))
    assert min(heights) == 0
    return max(heights)


@pytest.mark.parametrize("answer", ["plain", "reversed"])
def test_sums_and_differences_are_right(answer):
    path = f"arithmetic:digits=1-4,ops=+-,answer={answer},examples=400"
    found = lines(path)
    signs = collections.Counter()
    for line in found:
        a, sign, b, result = re.fullmatch(r"(\d+)([+-])(\d+)=(\d+)\n", line).groups()
        signs[sign] += 1
        result = int(result[::-1] if answer == "reversed" else result)
        assert result == (int(a) + int(b) if sign == "+" else int(a) - int(b))
        assert all(str(int(x)) == x and len(x) <= 4 for x in (a, b))
    assert len(set(found)) == 400 and found == lines(path)
    assert min(signs.values()) > 150


def test_each_length_of_an_operand_is_as_likely():
    counts = collections.Counter(
        len(operand)
        for line in lines("arithmetic:digits=3-5,examples=2000")
        for operand in re.findall(r"\d+", line)[:2]
    )
    assert set(counts) == {3, 4, 5}
    assert all(abs(count - 4000 / 3) < 150 for count in counts.values())


def test_brackets_are_closed_and_as_deep_and_long_as_wanted():
    found = lines("dyck:kinds=3,depth=2-4,length=3-9,examples=600")
    depths, shapes = collections.Counter(), collections.Counter()
    for line in found:
        question, answer = re.fullmatch(r"([^=]+=)([^=]+)\n", line).groups()
        assert answer == closed(question) and "<" not in line
        assert 3 <= len(question) - 1 <= 9
        depths[deepest(question)] += 1
        shapes[re.sub(r"[(\[{]", "(", re.sub(r"[)\]}]", ")", question))] += 1
    assert len(set(found)) == 600 and set(depths) == {2, 3, 4}
    assert min(depths.values()) > 130  # the short shallow ones run out


def test_all_shapes_are_as_likely():
    source = synthetic.Dyck(kinds=4, depth=(2, 2), length=(5, 5))
    draws = synthetic.drawn(source, "any", kept=False)
    shape = str.maketrans("[{<]}>", "((()))")
    counts = collections.Counter(
        next(draws).question.removesuffix("=").translate(shape) for _ in range(3000)
    )
    # Of 5 brackets, never below 0 or above 2, 2 deep somewhere, open at the end.
    assert set(counts) == {"()(()", "(()()", "(())("}
    assert all(abs(count - 1000) < 120 for count in counts.values())


def test_one_problem_in_ten_is_kept_whatever_seed_and_range():
    for entry in ("arithmetic:digits=1-2", "dyck:kinds=2,depth=1-3,length=1-12"):
        source = synthetic.parse(entry)
        kept = {p.key for p in synthetic.different(source, 150, kept=True)}
        assert len(kept) == 150
        for seed in (0, 7):
            text = dataclasses.replace(source, seed=seed, examples=1000)
            keys = {p.key for p in synthetic.different(text, 1000)}
            assert len(keys) == 1000 and not keys & kept
    several = list(synthetic.different(synthetic.Arithmetic(digits=(1, 1)), 40))
    assert len({frozenset(re.findall(r"\d", p.question)) for p in several}) == 40


def test_what_is_held_out_has_no_problem_of_the_training_text(tmp_path):
    config = DataConfig(path="dyck:examples=300,seed=3", held_out=0.2, context=32)

    def problems(config, split):
        ids = corpus.from_text(config, BYTES, split, progress=False).ids
        return set(BYTES.decode(ids).splitlines())

    train, held_out = problems(config, "train"), problems(config, "held_out")
    assert len(train) == 240 and len(held_out) == 60 and not train & held_out
    batch = next(iter(pipeline.held_out_batches(config, BYTES, batch_size=2)))
    assert batch["tokens"].shape == (2, 32)
    index = prepare.prepare(config, str(tmp_path / "shards"), progress=False)
    assert index.documents == 300
    prepared = dataclasses.replace(config, path=str(tmp_path / "shards"))
    same = pipeline.held_out_batches(prepared, BYTES, batch_size=2)
    assert (next(iter(same))["tokens"] == batch["tokens"]).all()


def test_settings_follow_their_source_in_a_path():
    path = "arithmetic:digits=2, ops=-,examples=3,pydoc,dyck,examples=2, kinds=1"
    assert sources.entries(path) == [
        "arithmetic:digits=2,ops=-,examples=3",
        "pydoc",
        "dyck:examples=2,kinds=1",
    ]
    assert sources.size(DataConfig(path="dyck")) is None
    for entry in ("arithmetic", "dyck:kinds=2,length=4-9", "arithmetic:ops=+-,seed=4"):
        assert synthetic.spelled(synthetic.parse(entry)) == entry


def test_out_of_the_distribution():
    far = synthetic.farther(synthetic.parse("arithmetic:digits=1-3,ops=-"))
    assert synthetic.spelled(far) == "arithmetic:digits=4-5,ops=-"
    far = synthetic.farther(synthetic.parse("dyck:depth=2-3,length=3-5"))
    assert synthetic.spelled(far) == "dyck:depth=4-6,length=3-6"
    assert synthetic.farther(synthetic.parse("dyck")).length == (1, 16)
    assert {deepest(p.question) for p in synthetic.different(far, 60)} == {4, 5, 6}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("arithmetic:digit=3", "'digit=3' is no setting of it; there are digits=..., "),
        ("dyck:kinds", "'kinds' is no setting of it; there are kinds=..., depth="),
        ("arithmetic:digits=x", "digits is 'x', but has to be a number, or a range"),
        ("arithmetic:digits=1-", "digits is '1-', but has to be a number, or a range"),
        ("arithmetic:digits=3-1", "digits is 3-1, but goes from 1 to 100"),
        ("arithmetic:ops=*", "ops is '*', but has to be one of +, -, +-"),
        (
            "arithmetic:answer=no",
            "answer is 'no', but has to be one of plain, reversed",
        ),
        ("arithmetic:seed=-1", "seed is '-1', but has to be a whole number"),
        ("arithmetic:examples=0", "examples is 0, but has to be at least 1"),
        ("dyck:kinds=5", "kinds is 5, but goes from 1 to 4"),
        ("dyck:depth=0", "depth is 0, but goes from 1 to 200"),
        ("dyck:depth=3,length=2", "length is 2, but none of those can be 3 deep"),
        ("dyck:kinds=1,kinds=2", "kinds is said twice; leave one out"),
    ],
)
def test_mistakes_in_a_path(path, message):
    with pytest.raises(UserError) as caught:
        sources.entries(path)
    assert str(caught.value).startswith(f"data.path: {path}: {message}")


def test_too_few_problems(monkeypatch):
    monkeypatch.setattr(synthetic, "_MOST_REPEATS", 200)
    with pytest.raises(UserError, match="digits=1,examples=60 has little more than 50"):
        lines("arithmetic:digits=1,examples=60")
    with pytest.raises(UserError, match="none is kept for tasks; widen its ranges"):
        source = synthetic.parse("dyck:kinds=1,depth=1,length=1")
        next(synthetic.drawn(source, "any", kept=True))
