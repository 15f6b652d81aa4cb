"""Sources: every format gives the same text, every mistake one clear error."""

import dataclasses
import gzip
import json
import lzma
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from ebt_jax.data import sources
from ebt_jax.data.config import DataConfig
from ebt_jax.errors import UserError

TEXTS = ["One line.\nÜber zwei Zeilen.\n", "second 日本 text", "third\r\n\tdocument"]
COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}
COMPRESS[".zst"] = zstandard.compress


def read(path, **changes):
    """All documents of a path, as text."""
    config = dataclasses.replace(DataConfig(path=str(path)), **changes)
    return [text.decode() for text in sources.documents(config)]


def json_lines(texts, key="text"):
    """JSON lines, one for each text."""
    return "".join(json.dumps({key: text}) + "\n" for text in texts).encode()


def error_of(path, **changes):
    """The message with which reading stops."""
    with pytest.raises(UserError) as caught:
        read(path, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_pydoc_is_one_document_for_each_topic_and_always_the_same():
    topics = read("pydoc")
    assert len(topics) > 50
    assert sum(map(len, topics)) > 400_000
    assert topics == read("pydoc")


@pytest.mark.parametrize("compression", COMPRESS)
def test_every_compression_gives_the_same_text(tmp_path, compression):
    compress = COMPRESS[compression]
    for number, text in enumerate(TEXTS):
        path = tmp_path / f"{number}.txt{compression}"
        path.write_bytes(compress(text.encode()))
    (tmp_path / f"all.jsonl{compression}").write_bytes(compress(json_lines(TEXTS)))
    assert read(f"{tmp_path}/*.txt{compression}") == TEXTS
    assert read(f"{tmp_path}/all.jsonl{compression}") == TEXTS


@pytest.mark.parametrize("compression", [c for c in COMPRESS if c])
def test_concatenated_and_padded_streams_are_read_whole(tmp_path, compression):
    compress = COMPRESS[compression]
    path = tmp_path / f"a.txt{compression}"
    path.write_bytes(compress(b"first ") + compress(b"second") + bytes(8))
    assert read(path) == ["first second"]


def test_lines_longer_than_what_is_read_at_once(tmp_path):
    texts = ["x" * 3_000_000, "short", "y" * 1_100_000]
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts).rstrip(b"\n"))
    assert read(tmp_path / "a.jsonl") == texts


def test_parquet(tmp_path):
    table = pyarrow.table({"text": TEXTS, "other": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == TEXTS
    assert "['text', 'other']" in error_of(tmp_path / "a.parquet", text_key="body")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and then nothing of the sort")
    assert "not a readable parquet file" in error_of(tmp_path / "b.parquet")


def test_sources_are_joined_in_the_order_given(tmp_path):
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "c.jsonl").write_bytes(json_lines(["c", "", "d"], key="body"))
    path = f"{tmp_path}/b.txt, {tmp_path}/a.txt,{tmp_path}/c.jsonl"
    assert read(path, text_key="body") == ["b", "a", "c", "d"]


def test_size_is_what_on_read_adds_up_to(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text " * 1000))
    (tmp_path / "b.jsonl").write_bytes(json_lines(TEXTS))
    config = DataConfig(path=f"{tmp_path}/*")
    counts = []
    list(sources.documents(config, counts.append))
    assert sum(counts) == sources.size(config) > 0
    assert sources.size(DataConfig(path=f"pydoc,{tmp_path}/b.jsonl")) is None


BROKEN = {
    b'{"text": "cut off\n': "is not JSON",
    b"[1, 2]\n": "is not an object",
    b'{"body": "x"}\n': "has no field 'text'",
    b'{"text": 3}\n': "field 'text' is not text but int",
    b'{"text": "\xff"}\n': "is not UTF-8",
    b'{"text": "\\ud800"}\n': "is not UTF-8",
    b"[" * 100_000 + b"\n": "is not JSON",
}


@pytest.mark.parametrize("line", BROKEN)
def test_the_first_malformed_record_stops_and_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(["good"]) + b"\n" + line + json_lines(["good"]))
    message = error_of(path)
    assert f"{path}, line 3: {BROKEN[line]}" in message
    assert "data.max_malformed (0.0)" in message


def test_malformed_records_are_skipped_up_to_the_limit(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines("abcdefgh") + b"broken\n" + b'{"text": 1}\n')
    assert "".join(read(path, max_malformed=0.2)) == "abcdefgh"
    assert f"{path}, line 9" in caplog.text
    assert "skipped 2 of 10 records" in caplog.text
    assert "2 of 10 records are malformed" in error_of(path, max_malformed=0.19)


def test_hopeless_data_stops_before_its_end(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"broken\n" * 20_000)
    assert "101 of 101 records" in error_of(path, max_malformed=0.1)


def test_malformed_parquet_rows_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    assert f"{path}, row 2: field 'text' is not text" in error_of(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "holds no text"),
        ("empty.txt.gz", b"", "holds no text"),
        ("empty.txt.gz", gzip.compress(b"", mtime=0), "holds no text"),
        ("empty.jsonl", b"\n\n", "holds no text"),
        ("a.txt", b"text\0", "not a text file (byte 4 is NUL)"),
        ("a.txt", b"caf\xe9 au lait", "not a text file (byte 3 is not UTF-8)"),
        ("a.csv", b"a,b", "unknown kind"),
        ("a.parquet.gz", b"", "unknown kind"),
        ("a.txt.gz", b"plain text", "not a .gz file, or a corrupt one"),
        ("a.txt.xz", b"plain text", "not a .xz file, or a corrupt one"),
        ("a.txt.zst", b"plain text", "not a .zst file, or a corrupt one"),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], "ends too early"),
        ("a.txt.xz", lzma.compress(b"text" * 99)[:-9], "ends too early"),
        ("a.txt.zst", zstandard.compress(b"text" * 99)[:-3], "ends too early"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_file_is_one_clear_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    said = error_of(tmp_path / name)
    assert message in said
    assert str(tmp_path / name) in said


def test_corruption_in_the_middle_is_noticed(tmp_path):
    content = bytearray(
        gzip.compress(b"".join(b"%d " % i for i in range(10_000)), mtime=0)
    )
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "a.txt.gz").write_bytes(content)
    assert "a corrupt one" in error_of(tmp_path / "a.txt.gz")


def test_missing_files(tmp_path):
    assert "there is no file" in error_of(tmp_path / "a.txt")
    assert "no file matches" in error_of(tmp_path / "*.txt")
    assert "directory without token shards" in error_of(tmp_path)
    assert "there is no file ''" in error_of("pydoc,")


def test_a_missing_package_is_named_with_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.txt.zst").write_bytes(b"")
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"text"))
    assert "pip install 'ebt-jax[text]'" in error_of(tmp_path / "a.txt.zst")
