"""Token shards: the same batches as from the text, whole or absent."""

import dataclasses
import json
import os

import numpy as np
import pytest

from ebt_jax.data import pipeline, prepare, shards, sources, tokenizers
from ebt_jax.data.config import DataConfig
from ebt_jax.errors import StorageError, UserError

BYTES = tokenizers.ByteTokenizer()


@pytest.fixture
def config(tmp_path):
    """Real documents, some longer than a record and some shorter than a context."""
    texts = list(sources.documents(DataConfig(path="pydoc")))[:30]
    texts = [text.decode()[: 20_000 if i == 3 else 900] for i, text in enumerate(texts)]
    texts[5] = "tiny"
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    return DataConfig(path=str(tmp_path / "corpus.jsonl"), context=64)


def held_out(config, split, tokenizer=BYTES):
    """Evaluation batches of a split."""
    return list(pipeline.held_out_batches(config, tokenizer, batch_size=8, split=split))


def same(left, right):
    """Whether two lists of batches are equal in every bit."""
    return len(left) == len(right) and all(
        set(a) == set(b) and all(np.array_equal(a[k], b[k]) for k in a)
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("packing", ["concat", "first_fit", "document"])
def test_shards_give_the_batches_of_the_text(config, tmp_path, packing):
    config = dataclasses.replace(config, packing=packing)
    output = str(tmp_path / "shards")
    index = prepare.prepare(config, output, shard_tokens=5000, progress=False)
    assert len(index.shards) > 3
    prepared = dataclasses.replace(config, path=output)
    for split in ("train", "held_out", "all"):
        assert same(held_out(prepared, split), held_out(config, split))
    ours, texts = (
        pipeline.train_batches(c, BYTES, batch_size=4, seed=0)
        for c in (prepared, config)
    )
    batches = zip(range(20), ours, texts, strict=False)
    assert all(same([a], [b]) for _, a, b in batches)
    ours.close()
    texts.close()


def test_a_single_document_is_cut_in_shards_too(config, tmp_path):
    (tmp_path / "a.txt").write_text("a plain text " * 2000)
    config = dataclasses.replace(config, path=str(tmp_path / "a.txt"))
    output = str(tmp_path / "shards")
    index = prepare.prepare(config, output, progress=False)
    assert (index.documents, index.tokens, index.bytes) == (1, 26_000, 26_000)
    prepared = dataclasses.replace(config, path=output)
    for split in ("train", "held_out", "all"):
        assert same(held_out(prepared, split), held_out(config, split))


def test_the_index_says_what_there_is(config, tmp_path):
    output = str(tmp_path / "shards")
    index = prepare.prepare(config, output, progress=False)
    texts = list(sources.documents(config))
    assert index.documents == len(texts)
    assert index.tokens == index.bytes == sum(map(len, texts))
    assert (index.tokenizer, index.vocab_size, index.dtype) == ("bytes", 256, "<u2")
    assert shards.read_index(output) == index
    files = sorted(os.listdir(output))
    assert files == ["index.json", "records.npy", *index.shards]


@dataclasses.dataclass(frozen=True)
class WithEnd(tokenizers.ByteTokenizer):
    """A tokenizer of another name, with an end token and a large vocabulary."""

    name: str = "with_end"
    digest: str = "with_end"
    vocab_size: int = 70_000
    eos_id: int | None = 69_999

    def token_bytes(self):
        """One byte each, the rest none."""
        return (np.arange(self.vocab_size) < 256).astype(np.int32)


def test_end_tokens_and_large_vocabularies(config, tmp_path, monkeypatch):
    tokenizer = WithEnd()
    monkeypatch.setattr(tokenizers, "load", lambda name: tokenizer)
    output = str(tmp_path / "shards")
    index = prepare.prepare(config, output, progress=False)
    assert (index.dtype, index.separated) == ("<i4", True)
    assert index.tokens == index.bytes + index.documents
    prepared = dataclasses.replace(config, path=output)
    for split in ("train", "held_out", "all"):
        batches = held_out(prepared, split, tokenizer)
        assert same(batches, held_out(config, split, tokenizer))
        assert any((batch["targets"] == tokenizer.eos_id).any() for batch in batches)


def test_another_tokenizer_is_refused_with_both_names(config, tmp_path):
    output = str(tmp_path / "shards")
    prepare.prepare(config, output, progress=False)
    with pytest.raises(UserError, match="by tokenizer 'bytes'.*is 'with_end'"):
        held_out(dataclasses.replace(config, path=output), "all", WithEnd())


def test_nothing_is_left_of_a_preparation_that_fails(config, tmp_path):
    with open(config.path, "a") as file:
        file.write("\nbroken")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match="line 31: is not JSON"):
        prepare.prepare(config, str(tmp_path / "shards"), progress=False)
    assert sorted(os.listdir(tmp_path)) == before


def test_output_that_cannot_be(config, tmp_path):
    with pytest.raises(UserError, match="exists already"):
        prepare.prepare(config, str(tmp_path))
    with pytest.raises(UserError, match="cannot be written"):
        prepare.prepare(config, config.path + "/shards")
    with pytest.raises(UserError, match="shard_tokens is 0"):
        prepare.prepare(config, str(tmp_path / "shards"), shard_tokens=0)
    output = str(tmp_path / "shards")
    prepare.prepare(config, output, progress=False)
    again = dataclasses.replace(config, path=output)
    with pytest.raises(UserError, match="holds token shards already"):
        prepare.prepare(again, str(tmp_path / "other"))


def test_the_bar_knows_the_size_of_compressed_text(config, tmp_path, capsys):
    bar = prepare.corpus.progress_bar("x", None, False)
    seen = prepare._Seen(bar, 100)
    texts = seen.watch(iter([b"x" * 30, b"y" * 10]))
    seen.on_read(50)
    next(texts)
    assert bar.total == 60  # half of the files gave 30 bytes
    seen.on_read(50)
    next(texts)
    assert bar.total == 40
    assert capsys.readouterr().err == ""


def broken(directory, name, content):
    """Writes a file, or removes it where content is None."""
    path = os.path.join(directory, name)
    if content is None:
        os.remove(path)
    else:
        with open(path, "wb") as file:
            file.write(content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("index.json", b"not json", "is not an index of token shards"),
        ("index.json", b'{"version": 1}', "is not an index of token shards"),
        (
            "index.json",
            b'{"format": "ebt-jax token shards", "version": 9}',
            "version 9",
        ),
        ("records.npy", None, "is missing or does not belong"),
        ("records.npy", b"\x93NUMPY", "is missing or does not belong"),
        ("tokens-00001.array_record", None, "the shard .* is missing"),
        ("tokens-00001.array_record", b"x" * 500, "is damaged"),
    ],
)
def test_broken_shards_are_one_clear_error(config, tmp_path, name, content, message):
    output = str(tmp_path / "shards")
    prepare.prepare(config, output, shard_tokens=8000, progress=False)
    broken(output, name, content)
    with pytest.raises(UserError, match=message):
        held_out(dataclasses.replace(config, path=output), "all")


def test_shards_of_another_preparation_are_noticed(config, tmp_path):
    output = str(tmp_path / "shards")
    prepare.prepare(config, output, shard_tokens=8000, progress=False)
    first = (tmp_path / "shards" / "tokens-00000.array_record").read_bytes()
    broken(output, "tokens-00001.array_record", first)
    with pytest.raises(UserError, match="records, but records.npy names"):
        held_out(dataclasses.replace(config, path=output), "all")


@pytest.fixture
def opened(config, tmp_path, monkeypatch):
    """A record of the second shard, the shard's path, and all records."""
    monkeypatch.setattr(shards, "READ_WAITS", (0.0, 0.0))
    output = tmp_path / "shards"
    prepare.prepare(config, str(output), shard_tokens=8000, progress=False)
    prepared = dataclasses.replace(config, path=str(output))
    records = shards.load(prepared, BYTES, "all").source
    return int(records.ends[0]), output / "tokens-00001.array_record", records


class Flaky:
    """Records that fail to be read."""

    def __getitem__(self, index):
        raise RuntimeError("read failed:\n try later")


def test_a_shard_that_fails_once_is_opened_and_read_again(opened):
    index, _, records = opened
    expected = records[index]
    records.sources[1] = Flaky()
    assert records[index] == expected and records[index] == expected


def test_a_shard_that_cannot_be_read_is_named(opened, monkeypatch):
    index, path, records = opened
    os.rename(path, str(path) + ".away")
    records.sources[1] = Flaky()
    with pytest.raises(StorageError) as error:
        records[index]
    assert str(error.value) == (
        f"the shard {path} cannot be read, tried 3 times: No such file or directory; "
        "give the same command again when it can"
    )
    os.rename(str(path) + ".away", path)
    assert records[index]


def test_a_shard_that_is_damaged_is_named(opened):
    index, path, records = opened
    size = path.stat().st_size
    content = bytearray(path.read_bytes())
    content[100 : size - 100] = bytes(size - 200)
    path.write_bytes(content)
    records.sources[1] = Flaky()
    with pytest.raises(UserError, match=f"the shard {path} is damaged .*; copy it or"):
        records[index]
