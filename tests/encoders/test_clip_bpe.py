"""CLIP's tokenizer agrees with transformers' on a small vocabulary made for it."""

import gzip
import json

import pytest
from encoder_cases import FOLDER

from ebt_jax.errors import UserError
from ebt_jax.models.encoders.clip_bpe import END, START, load_clip_bpe


@pytest.fixture(scope="module")
def case():
    return json.loads((FOLDER / "clip_bpe.json").read_text(encoding="ascii"))


@pytest.fixture(scope="module")
def lines(case):
    return "\n".join(["#version: 0.2", *map(" ".join, case["merges"]), ""])


@pytest.fixture
def file(tmp_path, lines):
    path = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    path.write_bytes(gzip.compress(lines.encode()))
    return path


@pytest.fixture
def tokenizer(file):
    return load_clip_bpe(str(file))


def test_the_tokens_of_transformers(tokenizer, case):
    for text, ids in zip(case["texts"], case["ids"], strict=True):
        assert tokenizer.encode(text) == ids, text
    assert tokenizer.batch(case["texts"], 24).tolist() == case["rows"]


def test_words_met_before_are_encoded_alike(tokenizer, case):
    first = [tokenizer.encode(text) for text in case["texts"]]
    assert [tokenizer.encode(text) for text in case["texts"]] == first


def test_decoding(tokenizer, case):
    for ids, decoded in zip(case["ids"], case["decoded"], strict=True):
        assert tokenizer.decode(ids) == decoded


def test_rows_start_end_and_are_cut(tokenizer):
    start, end = tokenizer.ids[START], tokenizer.ids[END]
    assert end == max(tokenizer.ids.values())  # where the text encoder pools
    rows = tokenizer.batch(["", "a b c d e f g h"], 5)
    assert rows.dtype == "int32"
    assert rows[0].tolist() == [start, end, end, end, end]
    assert rows[1][0] == start and rows[1][-1] == end and end not in rows[1][:-1]
    assert tokenizer.batch([]).shape == (0, 77)
    with pytest.raises(UserError, match="texts cut to 2 tokens keep none"):
        tokenizer.batch(["a"], 2)


def test_every_kind_of_file_is_the_same(tokenizer, file, lines, tmp_path):
    assert load_clip_bpe(str(file.parent)) == tokenizer
    folder = tmp_path / "huggingface"
    folder.mkdir()
    (folder / "merges.txt").write_text(lines, encoding="utf-8")
    with pytest.raises(UserError, match="there is no vocab.json beside"):
        load_clip_bpe(str(folder))
    (folder / "vocab.json").write_text(json.dumps(tokenizer.ids), encoding="utf-8")
    assert load_clip_bpe(str(folder)) == tokenizer
    assert load_clip_bpe(str(folder / "merges.txt")) == tokenizer
    plain = tmp_path / "vocabulary.txt"
    plain.write_text(lines, encoding="utf-8")
    assert load_clip_bpe(str(plain)) == tokenizer


def test_files_that_are_no_vocabulary(tmp_path):
    with pytest.raises(UserError, match="there is no file 'none.gz'; give bpe_simple"):
        load_clip_bpe("none.gz")
    with pytest.raises(UserError, match="has neither bpe_simple_vocab_16e6.txt.gz nor"):
        load_clip_bpe(str(tmp_path))
    cases = {"a.gz": b"no gzip", "b.txt": b"#\na b c\n", "c.txt": b"#\n\xff \xff\n"}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} cannot be read .*; fetch it agai"):
            load_clip_bpe(str(tmp_path / name))
    (tmp_path / "merges.txt").write_text("#\na b\n")
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(UserError, match="no number for '<|endoftext|>'"):
        load_clip_bpe(str(tmp_path))
