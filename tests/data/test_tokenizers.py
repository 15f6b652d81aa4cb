"""Tokenizers: round trips, byte lengths, and cuts that change nothing."""

import gzip
import sys

import numpy as np
import pytest
import tokenizers as library

from ebt_jax.data import sources, tokenizers
from ebt_jax.data.config import DataConfig
from ebt_jax.errors import UserError

TEXT = 'Plain words,  numbers 123\n\n\tand "日本 ünïcode" 🙂 at the end\n'


@pytest.fixture(scope="module")
def corpus():
    """A few hundred kilobytes of real text."""
    return b"\n".join(sources.documents(DataConfig(path="pydoc"))).decode()[:200_000]


@pytest.fixture(scope="module")
def bpe(corpus, tmp_path_factory):
    """Path of a small byte-level tokenizer with an end token."""
    trained = library.Tokenizer(library.models.BPE())
    trained.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator([corpus], trainer)
    trained.add_tokens(["    "])
    trained.enable_truncation(8)
    trained.enable_padding(length=8)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    trained.save(str(path))
    return path


def encode_documents(tokenizer, texts):
    """Ids of each text, and the bytes that were reported."""
    counts = []
    ids = list(tokenizer.encode_documents([t.encode() for t in texts], counts.append))
    return ids, sum(counts)


def test_bytes():
    tokenizer = tokenizers.load("bytes")
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int32
    assert bytes(ids.tolist()) == TEXT.encode()
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.token_bytes().tolist() == [1] * 256
    assert tokenizer.vocab_size == 256
    assert tokenizer.eos_id is None
    assert tokenizer.decode([0xC3]) == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_documents_encode_like_single_texts(bpe, name):
    tokenizer = tokenizers.load("bytes" if name == "bytes" else str(bpe))
    texts = [TEXT, "", "second", TEXT * 3]
    ids, count = encode_documents(tokenizer, texts)
    assert count == sum(len(text.encode()) for text in texts)
    for text, found in zip(texts, ids, strict=True):
        assert found.dtype == np.int32
        assert found.tolist() == tokenizer.encode(text).tolist()


def test_bpe_round_trips_and_knows_its_special_tokens(bpe):
    tokenizer = tokenizers.load(str(bpe))
    ids = tokenizer.encode(TEXT)
    assert 8 < len(ids) < len(TEXT.encode())  # and is not truncated as its file says
    assert tokenizer.decode(ids) == TEXT
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (0, 1, 601)
    assert ids.max() < tokenizer.vocab_size


def test_token_bytes_add_up_to_the_text(bpe, corpus):
    tokenizer = tokenizers.load(str(bpe))
    sizes = tokenizer.token_bytes()
    assert sizes.shape == (tokenizer.vocab_size,)
    for text in (TEXT, corpus):
        assert sizes[tokenizer.encode(text)].sum() == len(text.encode())
    assert sizes[[tokenizer.eos_id, tokenizer.pad_id]].tolist() == [0, 0]


def test_token_bytes_with_byte_fallback(tmp_path):
    vocab = {"<unk>": 0, "<0xE6>": 1, "\u2581cat": 2, "é": 3}
    model = library.models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True)
    path = tmp_path / "tokenizer.json"
    library.Tokenizer(model).save(str(path))
    assert tokenizers.load(str(path)).token_bytes().tolist() == [5, 1, 4, 2]


def test_gzipped_file_is_the_same_tokenizer(bpe, tmp_path):
    path = tmp_path / "tokenizer.json.gz"
    path.write_bytes(gzip.compress(bpe.read_bytes()))
    assert tokenizers.load(str(path)).digest == tokenizers.load(str(bpe)).digest
    assert tokenizers.load(str(path)).encode(TEXT).size


def test_long_documents_are_cut_without_changing_a_token(bpe, corpus, monkeypatch):
    monkeypatch.setattr(tokenizers, "_PIECE_CHARS", 1000)
    tokenizer = tokenizers.load(str(bpe))
    assert len(list(tokenizer._pieces(corpus))) > 50
    (ids, other), count = encode_documents(tokenizer, [corpus, TEXT])
    assert ids.tolist() == tokenizer.encode(corpus).tolist()
    assert other.tolist() == tokenizer.encode(TEXT).tolist()
    assert count == len((corpus + TEXT).encode())


def test_a_tokenizer_that_marks_the_start_is_never_cut(bpe, corpus, monkeypatch):
    monkeypatch.setattr(tokenizers, "_PIECE_CHARS", 1000)
    tokenizer = tokenizers.load(str(bpe))
    tokenizer.tokenizer.normalizer = library.normalizers.Prepend("#")
    assert len(list(tokenizer._pieces(corpus[:20_000]))) == 1


def test_what_is_not_a_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match="there is no file"):
        tokenizers.load(str(path))
    for content in (b"", b"{}", b"not json", b"\xff\xfe\0"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is not a tokenizer.json"):
            tokenizers.load(str(path))
    path = tmp_path / "tokenizer.json.gz"
    for content in (b"{}", gzip.compress(b"{}" * 99)[:-9]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is not a tokenizer.json"):
            tokenizers.load(str(path))


def test_a_missing_package_is_named_with_the_extra(bpe, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'ebt-jax\[text\]'"):
        tokenizers.load(str(bpe))
