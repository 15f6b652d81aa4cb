"""Packing and batches: what is counted, in which order, by which process."""

import dataclasses
import itertools
import json
import pathlib

import numpy as np
import pytest

from ebt_jax.data import corpus, packing, pipeline, tokenizers
from ebt_jax.data.config import DataConfig
from ebt_jax.errors import UserError

PACKINGS = ("concat", "first_fit", "document")
CONTEXT = 16


@dataclasses.dataclass(frozen=True)
class WithEnd(tokenizers.ByteTokenizer):
    """Bytes and an end token."""

    vocab_size: int = 257
    pad_id: int = 255
    eos_id: int | None = 256

    def token_bytes(self):
        """The end token stands for no text."""
        return np.append(super().token_bytes(), np.int32(0))


TOKENIZERS = (tokenizers.ByteTokenizer(), WithEnd())


def documents(count=40, longest=50):
    """Texts of many lengths, in which every character occurs in one place only."""
    lengths = np.random.default_rng(0).integers(1, longest, count)
    starts = itertools.accumulate(lengths, initial=0x4E00)
    texts = zip(starts, lengths, strict=False)
    return ["".join(map(chr, range(start, start + n))) for start, n in texts]


@pytest.fixture
def config(tmp_path):
    """Many documents."""
    path = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"text": text}) for text in documents()]
    path.write_text("\n".join(lines))
    return DataConfig(path=str(path), context=CONTEXT)


@pytest.fixture
def single(tmp_path):
    """One document, every byte of which is known by its place."""
    path = tmp_path / "single.txt"
    path.write_bytes(bytes(1 + i % 100 for i in range(5000)))
    return DataConfig(path=str(path), context=CONTEXT)


def train(config, tokenizer=TOKENIZERS[0], *, batch_size=4, seed=0, **processes):
    """Training batches; closes the iterator."""
    batches = pipeline.train_batches(
        config, tokenizer, batch_size=batch_size, seed=seed, **processes
    )
    try:
        yield from batches
    finally:
        batches.close()


def held_out(config, tokenizer=TOKENIZERS[0], *, batch_size=4, **options):
    """Evaluation batches."""
    return list(
        pipeline.held_out_batches(config, tokenizer, batch_size=batch_size, **options)
    )


def rows(batches):
    """Sequences of batches, each a dict of arrays."""
    return [
        {name: array[row] for name, array in batch.items()}
        for batch in batches
        for row in range(len(batch["index"]))
    ]


def pairs(batches):
    """How often each (input, target) counts."""
    counted = [
        (int(a), int(b))
        for row in rows(batches)
        for a, b, w in zip(row["tokens"], row["targets"], row["weights"], strict=True)
        if w
    ]
    return sorted(counted)


def same(left, right):
    """Whether two lists of batches are equal in every bit."""
    return len(left) == len(right) and all(
        set(a) == set(b) and all(np.array_equal(a[k], b[k]) for k in a)
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("name", PACKINGS)
def test_batches_hold_what_is_promised(config, name):
    config = dataclasses.replace(config, packing=name)
    for batch in (next(train(config)), held_out(config)[0]):
        for key, dtype in (("tokens", "i4"), ("targets", "i4"), ("weights", "f4")):
            assert batch[key].shape == (4, CONTEXT)
            assert batch[key].dtype == dtype
        assert batch["index"].shape == (4,) and batch["index"].dtype == np.int32
        assert ("segments" in batch) == ("positions" in batch) == (name == "first_fit")
        assert set(np.unique(batch["weights"])) <= {0, 1}
    assert batch["bytes"].dtype == np.float32
    assert np.array_equal(batch["bytes"], batch["weights"])  # a byte is a byte
    assert "bytes" not in next(train(config))


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_concat_makes_every_token_a_target_once(config, tokenizer):
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    stream = [i for text in documents() for i in [*text.encode(), *end]]
    batches = held_out(config, tokenizer, split="all")
    assert pairs(batches) == sorted(itertools.pairwise(stream))
    in_order = [
        int(target)
        for row in rows(batches)
        for target, weight in zip(row["targets"], row["weights"], strict=True)
        if weight
    ]
    assert in_order == stream[1:]
    text_bytes = sum(len(text.encode()) for text in documents())
    assert sum(batch["bytes"].sum() for batch in batches) == text_bytes - 1


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_first_fit_predicts_inside_documents_only(config, tokenizer):
    config = dataclasses.replace(config, packing="first_fit")
    batches = held_out(config, tokenizer, split="all")
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    streams = [[*text.encode(), *end] for text in documents()]
    expected = [pair for stream in streams for pair in itertools.pairwise(stream)]
    assert pairs(batches) == sorted(expected)
    assert np.mean([row["weights"].mean() for row in rows(batches)]) > 0.9
    for row in rows(batches):
        assert np.array_equal(row["weights"] > 0, row["segments"] > 0)
        used = np.flatnonzero(row["weights"])
        assert np.array_equal(used, np.arange(len(used)))  # padding comes last
        for segment in range(1, row["segments"].max() + 1):
            slots = np.flatnonzero(row["segments"] == segment)
            assert np.array_equal(np.diff(slots), np.ones(len(slots) - 1))
            assert np.array_equal(row["positions"][slots], np.arange(len(slots)))
            # Inside a segment each target is the next input.
            assert np.array_equal(row["targets"][slots][:-1], row["tokens"][slots][1:])


def test_first_fit_fills_sequences_that_are_still_open():
    ends = np.cumsum([11, 8, 6, 4])  # 10, 7, 5 and 3 predictions
    tokens = corpus.MemoryTokens(np.arange(29), ends, False)
    plan = packing.make_plan(tokens, "first_fit", 10)
    sequences = [
        list(range(*plan.firsts[i : i + 2])) for i in range(len(plan.firsts) - 1)
    ]
    sizes = [[int(plan.stops[i] - plan.starts[i] - 1) for i in s] for s in sequences]
    assert sorted(sizes) == [[5], [7, 3], [10]]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_document_packing_is_one_truncated_document_each(config, tokenizer):
    config = dataclasses.replace(config, packing="document")
    found = rows(held_out(config, tokenizer, split="all"))
    texts = [list(text.encode()) for text in documents()]
    assert [row["index"] for row in found] == list(range(len(texts)))
    for row, text in zip(found, texts, strict=True):
        length = min(len(text) - 1, CONTEXT)
        assert row["weights"].tolist() == [1] * length + [0] * (CONTEXT - length)
        assert row["tokens"][:length].tolist() == text[:length]
        assert row["targets"][:length].tolist() == text[1 : length + 1]
        for name in ("tokens", "targets"):
            assert (row[name][length:] == tokenizer.pad_id).all()


def test_a_single_document_keeps_its_end(single):
    content = pathlib.Path(single.path).read_bytes()
    stream = list(content)
    assert pairs(held_out(single)) == sorted(itertools.pairwise(stream[4500:]))
    epoch = dataclasses.replace(single, repeat=False)
    first, last = content[:4500], content[4500:]
    assert pairs(train(epoch, batch_size=1)) == sorted(itertools.pairwise(first))
    assert len(first) == int(0.9 * len(content)) and last


def test_the_cut_of_a_single_document_splits_no_character(single):
    text = "x" * 893 + "日本" * 20
    assert len(text.encode()) == 1013  # nine tenths end inside the fourth 本
    pathlib.Path(single.path).write_text(text, encoding="utf-8")
    single = dataclasses.replace(single, context=200)
    (row,) = rows(held_out(single, batch_size=1))
    assert bytes(row["tokens"][row["weights"] > 0].tolist())[:3].decode()


@pytest.mark.parametrize("name", ["concat", "document"])
def test_held_out_and_training_documents_are_disjoint_and_cover(config, name):
    config = dataclasses.replace(
        config, packing=name, repeat=False, context=10_000, held_out=0.25
    )
    train_text, held_out_text, all_text = (
        {
            character
            for row in rows(held_out(config, split=split, batch_size=1))
            for character in bytes(
                [*row["tokens"][:1], *row["targets"][row["weights"] > 0]]
            ).decode(errors="ignore")
        }
        for split in ("train", "held_out", "all")
    )
    assert not train_text & held_out_text
    assert train_text | held_out_text == all_text
    kept = [text for text in documents() if text[-1] in held_out_text]
    assert len(kept) == len(documents()) // 4


def test_held_out_documents_are_spread_stable_and_never_all():
    mask = corpus.held_out_documents(1000, 0.1)
    assert mask.sum() == 100
    assert min(part.sum() for part in np.split(mask, 5)) > 8
    # A change here changes the split of every corpus: runs are no longer comparable.
    topics = np.flatnonzero(corpus.held_out_documents(79, 0.1)).tolist()
    assert topics == [2, 4, 32, 33, 41, 42, 43, 53]
    assert corpus.held_out_documents(2, 0.01).sum() == 1
    assert corpus.held_out_documents(2, 0.99).sum() == 1


def test_held_out_path_is_evaluated_whole_and_nothing_else_is_kept(config, single):
    both = dataclasses.replace(config, held_out_path=single.path, repeat=False)
    assert pairs(held_out(both)) == pairs(held_out(single, split="all"))
    assert pairs(train(both, batch_size=1)) == pairs(held_out(config, split="all"))
    assert pairs(held_out(both, split="all")) == pairs(held_out(config, split="all"))


def test_evaluation_does_not_depend_on_the_batch_size(config):
    one = rows(held_out(config, batch_size=1, split="all"))
    for batch_size in (3, 7):
        batches = held_out(config, batch_size=batch_size, split="all")
        assert {batch["tokens"].shape for batch in batches} == {(batch_size, CONTEXT)}
        assert same(rows(batches)[: len(one)], one)
        filler = rows(batches)[len(one) :]
        assert all(not r["weights"].any() and not r["bytes"].any() for r in filler)
        index = [int(row["index"]) for row in rows(batches)]
        assert index == list(range(len(index)))


def test_evaluation_can_be_repeated_and_limited(config):
    batches = pipeline.held_out_batches(
        config, TOKENIZERS[0], batch_size=4, sequences=6, split="all"
    )
    assert len(batches) == 2
    assert same(list(batches), list(batches))
    assert [int(r["weights"].any()) for r in rows(batches)] == [1] * 6 + [0] * 2
    unlimited = held_out(config, split="all")
    assert same(rows(batches)[:6], rows(unlimited)[:6])
    assert same(held_out(config, split="all", sequences=10_000), unlimited)


def test_each_epoch_has_every_sequence_once_in_a_new_order(config):
    count = len(held_out(config, split="train", batch_size=1))
    index = [int(r["index"]) for r in rows(itertools.islice(train(config), count))]
    epochs = [index[i * count : (i + 1) * count] for i in range(4)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    other = rows(itertools.islice(train(config, seed=1), 10))
    assert [int(row["index"]) for row in other] != index[: len(other)]
    again = rows(itertools.islice(train(config, seed=0), 10))
    assert [int(row["index"]) for row in again] == index[: len(again)]


def test_without_shuffling_sequences_come_in_order(config):
    config = dataclasses.replace(config, shuffle=False)
    found = rows(itertools.islice(train(config), 5))
    assert [int(row["index"]) for row in found] == list(range(20))


def test_training_on_the_first_tokens_alone(config):
    config = dataclasses.replace(config, train_tokens=3 * config.context + 1)
    found = rows(itertools.islice(train(config), 6))
    assert {int(row["index"]) for row in found} == {0, 1, 2}


def test_without_repeat_an_epoch_ends_and_its_remainder_is_dropped(config):
    count = len(held_out(config, split="train", batch_size=1))
    batches = list(train(dataclasses.replace(config, repeat=False), batch_size=7))
    assert len(batches) == count // 7
    index = [int(row["index"]) for row in rows(batches)]
    assert len(set(index)) == len(index)


@pytest.mark.parametrize("repeat", [True, False])
def test_processes_share_each_batch(config, repeat):
    config = dataclasses.replace(config, repeat=repeat)
    alone = list(itertools.islice(train(config, batch_size=6), 60))
    split = [[0, 1], [5, 2], [3, 4]]  # any rows, in any order
    shares = [
        list(itertools.islice(train(config, batch_size=6, rows=mine), 60))
        for mine in split
    ]
    assert {len(share) for share in shares} == {len(alone)}
    for batch, *parts in zip(alone, *shares, strict=True):
        for mine, part in zip(split, parts, strict=True):
            assert same([part], [{k: v[mine] for k, v in batch.items()}])


@pytest.mark.parametrize("repeat", [True, False])
def test_a_run_goes_on_with_any_number_of_processes(config, repeat):
    config = dataclasses.replace(config, repeat=repeat)
    size = 4
    whole = [batch["index"].tolist() for batch in itertools.islice(train(config), 40)]
    ids, place = [], 0
    for processes, updates in ((1, 3), (2, 1), (4, 7), (2, 60)):
        share = size // processes
        parts = [
            pipeline.train_batches(
                config,
                TOKENIZERS[0],
                batch_size=size,
                seed=0,
                start=place,
                rows=range(i * share, (i + 1) * share),
            )
            for i in range(processes)
        ]
        for batches in itertools.islice(zip(*parts, strict=True), updates):
            ids.append([i for part in batches for i in part["index"].tolist()])
        (place,) = {part.next_example for part in parts}
        assert place == size * len(ids)
        for part in parts:
            part.close()
    assert ids[: len(whole)] == whole


def test_processes_share_each_evaluation_batch(config):
    alone = held_out(config, batch_size=6, split="all")
    shares = [
        held_out(config, batch_size=6, split="all", process_index=i, process_count=2)
        for i in range(2)
    ]
    for batch, even, odd in zip(alone, *shares, strict=True):
        assert same([{k: v[0::2] for k, v in batch.items()}], [even])
        assert same([{k: v[1::2] for k, v in batch.items()}], [odd])


@pytest.mark.parametrize("name", PACKINGS)
def test_a_restored_iterator_goes_on_exactly(config, name):
    config = dataclasses.replace(config, packing=name)
    batches = pipeline.train_batches(config, TOKENIZERS[0], batch_size=4, seed=3)
    for _ in range(50):  # into a later epoch
        next(batches)
    place = batches.next_example
    assert place == 200
    expected = [next(batches) for _ in range(50)]
    other = pipeline.train_batches(config, TOKENIZERS[0], batch_size=4, seed=3)
    next(other)
    other.seek(place)
    assert same([next(other) for _ in range(50)], expected)
    batches.close()
    other.close()


def test_workers_change_nothing(config):
    ahead = dataclasses.replace(config, num_workers=1)
    options = {"start": 8, "rows": [1, 3]}
    assert same(
        list(itertools.islice(train(ahead, **options), 5)),
        list(itertools.islice(train(config, **options), 5)),
    )


def test_the_order_of_examples_stays_what_it_was(config):
    # Were it another, a run that goes on would see some examples twice and some never.
    for packing_name, seed, place, ids in (
        ("concat", 3, 0, [162, 7, 27, 57]),
        ("concat", 3, 356, [116, 58, 22, 166]),  # a later epoch
        ("first_fit", 7, 0, [139, 157, 144, 78]),
        ("first_fit", 7, 356, [58, 92, 127, 167]),
    ):
        changed = dataclasses.replace(config, packing=packing_name)
        found = next(train(changed, seed=seed, start=place))["index"]
        assert found.tolist() == ids


def test_a_place_behind_the_end_has_no_batches(config):
    config = dataclasses.replace(config, repeat=False)
    assert list(train(config, start=10_000)) == []


def test_context_longer_than_the_text(single):
    config = dataclasses.replace(single, context=4500)
    with pytest.raises(UserError, match="takes 4501 tokens.*has only 4500"):
        next(train(config))
    fits = dataclasses.replace(single, context=4499)
    assert next(train(fits, batch_size=1))["weights"].all()


@pytest.mark.parametrize("name", ["first_fit", "document"])
def test_nothing_to_predict(tmp_path, name):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    config = DataConfig(path=f"{tmp_path}/*.txt", packing=name)
    with pytest.raises(UserError, match="nothing to predict"):
        held_out(config)
    with pytest.raises(UserError, match="1 tokens in 1 documents"):
        next(train(config))


def test_nothing_held_out(config):
    with pytest.raises(UserError, match="data.held_out is 0"):
        held_out(dataclasses.replace(config, held_out=0.0))
    everything = dataclasses.replace(config, held_out=0.0, repeat=False)
    assert pairs(train(everything, batch_size=1)) == pairs(
        held_out(config, split="all")
    )


def test_batches_that_do_not_fit(config):
    with pytest.raises(UserError, match="batch size is 5, which 2 processes"):
        held_out(config, batch_size=5, process_count=2)
    once = dataclasses.replace(config, repeat=False)
    with pytest.raises(UserError, match="train.batch_size is 9999"):
        next(train(once, batch_size=9999))
    with pytest.raises(ValueError, match="split is 'test'"):
        held_out(config, split="test")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 0}, "data.context is 0"),
        ({"packing": "best"}, "data.packing is 'best'"),
        ({"held_out": 1.0}, "data.held_out is 1.0"),
        ({"max_malformed": -0.1}, "data.max_malformed is -0.1"),
        ({"num_workers": -1}, "data.num_workers is -1"),
        ({"path": ""}, "data.path is empty"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**changes)
