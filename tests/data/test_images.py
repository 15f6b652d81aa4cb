"""Sources of pictures: what each holds, and what is said where one cannot be read."""

import gzip
import json
import struct
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from vision_files import many, pixels_of, png, write, write_tar, write_zip

from ebt_jax.data import images, items
from ebt_jax.data.vision_config import VisionConfig
from ebt_jax.errors import UserError


def read(path, **vision):
    """Names, pixels as they lie there, and classes."""
    found = images.find(str(path), VisionConfig(**vision))
    pictures = [next(found.read(index).images) for index in range(len(found))]
    return found.names, [np.asarray(picture) for picture in pictures], found.classes


def error_of(path, **vision):
    """The message with which reading stops."""
    with pytest.raises(UserError) as caught:
        read(path, **vision)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folders_and_archives_hold_the_same(tmp_path):
    contents = many(6)
    noise = {"a/._000.png": b"macOS's", "LICENSE": b"text"}
    paths = [
        write(tmp_path / "folder", contents | noise),
        write_tar(tmp_path / "plain.tar", contents | noise),
        write_tar(tmp_path / "packed.tar.gz", contents | noise),
        write_zip(tmp_path / "packed.zip", contents | noise),
        f"{tmp_path}/folder/*/*.png",
    ]
    for path in paths:
        names, pictures, classes = read(path)
        assert names == sorted(contents)
        assert classes == ["a"] * 3 + ["b"] * 3
        for name, pixels in zip(names, pictures, strict=True):
            assert np.array_equal(pixels, pixels_of(contents[name]))


def test_an_archive_in_a_folder_and_several_sources(tmp_path):
    write(tmp_path / "folder", {"x.png": png(0)})
    write_tar(tmp_path / "folder" / "y.tar", {"y.png": png(1)})
    write_zip(tmp_path / "z.zip", {"z.png": png(2)})
    names, _, classes = read(f"{tmp_path}/folder, {tmp_path}/z.zip")
    assert names == ["x.png", "y.png", "z.png"] and not classes


def test_classes_are_the_folders_below_what_all_have_in_common():
    names = ["top/a/1/x.png", "top/a/2/x.png", "top/b/x.png"]
    assert images.classes(names) == ["a/1", "a/2", "b"]
    assert images.classes(["x.png", "a/x.png"]) == [".", "a"]
    assert images.classes(["top/x.png", "top/y.png"]) == []


def test_digits_are_scikit_learns():
    names, pictures, classes = read("digits")
    assert len(names) == 1797
    assert {picture.shape for picture in pictures} == {(8, 8)}
    assert classes[:10] == list("0123456789")
    assert max(picture.max() for picture in pictures) == 255


def test_photographs_are_cut_into_squares_side_by_side():
    names, pictures, classes = read("photographs", size=64)
    assert len(names) == 2 * (427 // 64) * (640 // 64)
    assert {picture.shape for picture in pictures} == {(64, 64, 3)}
    assert set(classes) == {"china", "flower"}
    assert "427 pixels high" in error_of("photographs", size=500)


def idx(array, magic):
    """The bytes of an IDX file."""
    return struct.pack(f">{array.ndim + 1}I", magic, *array.shape) + array.tobytes()


def test_idx_files_with_and_without_labels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 4), np.uint8)
    path = tmp_path / "t-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(idx(pixels, 0x803)))
    _, pictures, classes = read(path)
    assert np.array_equal(pictures, pixels) and classes == []
    labels = np.array([3, 1, 4, 1, 5], np.uint8)
    beside = tmp_path / "t-labels-idx1-ubyte.gz"
    beside.write_bytes(gzip.compress(idx(labels, 0x801)))
    assert read(path)[2] == list("31415")
    assert read(tmp_path)[2] == list("31415")  # of the folder
    beside.write_bytes(gzip.compress(idx(labels[:4], 0x801)))
    assert "has 5 pictures, but" in error_of(path)
    path.write_bytes(gzip.compress(idx(pixels, 0x803)[:-1]))
    assert "declares 80 bytes, but has 79" in error_of(path)
    path.write_bytes(gzip.compress(b"something else"))
    assert "is not an IDX file" in error_of(path)
    path.write_bytes(b"not compressed")
    assert "cannot be read" in error_of(path)


def test_tfds_images_and_their_labels():
    with tfds.testing.mock_data(num_examples=4):
        names, pictures, classes = read("tfds:mnist:test")
        assert len(names) == 4 and pictures[0].shape == (28, 28)
        assert len(classes) == 4 and set(classes) <= set("0123456789")
        assert "has no feature 'image'" in error_of("tfds:lm1b")


@pytest.mark.parametrize("captions", ["captions.jsonl", "captions.jsonl.gz"])
def test_captions_come_to_their_pictures(tmp_path, captions):
    lines = [
        {"file": "x/1.png", "caption": "first"},
        {"file": "2.png", "captions": ["second", "2nd"]},
        {"file": "x/1.png", "caption": "again"},
    ]
    text = "\n".join(map(json.dumps, lines)).encode()
    packed = gzip.compress(text) if captions.endswith(".gz") else text
    expected = [("first", "again"), ("second", "2nd")]
    pictures = {"x/1.png": png(1), "x/2.png": png(2)}
    folder = write(tmp_path / "folder", pictures | {captions: packed})
    assert images.find(folder, VisionConfig()).captions == expected
    archive = write_tar(tmp_path / "pictures.tar.gz", pictures)
    both = f"{archive},{folder}/{captions}"
    assert images.find(both, VisionConfig()).captions == expected


def test_captions_alone_name_the_pictures_beside_them(tmp_path):
    lines = [{"file": f"{n}.png", "caption": str(n)} for n in (2, 1)]
    text = "\n".join(map(json.dumps, lines)).encode()
    folder = write(tmp_path / "f", {"1.png": png(1), "2.png": png(2), "c.jsonl": text})
    found = images.find(f"{folder}/c.jsonl", VisionConfig())
    assert found.names == ["1.png", "2.png"] and found.captions == [("1",), ("2",)]
    lost = write(tmp_path / "lost", {"c.jsonl": text})
    assert "lies beside it" in error_of(f"{lost}/c.jsonl")


@pytest.mark.parametrize("line", ['{"file": "x"', '{"caption": "x"}', "[1]", "7"])
def test_a_line_that_is_no_caption_is_named(tmp_path, line):
    good = '{"file": "1.png", "caption": "a"}'
    text = f"{good}\n\n{line}\n".encode()
    folder = write(tmp_path, {"1.png": png(1), "captions.jsonl": text})
    message = error_of(folder)
    assert "captions.jsonl, line 3" in message


def test_what_is_not_there_is_said(tmp_path):
    assert "no file or folder" in error_of(tmp_path / "nothing")
    assert "no file matches" in error_of(f"{tmp_path}/*.png")
    (tmp_path / "empty").mkdir()
    assert "holds none of" in error_of(tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("x")
    assert "of an unknown kind" in error_of(tmp_path / "notes.txt")
    assert "name pictures" in error_of("pydoc")
    whole = write_tar(tmp_path / "whole.tar.gz", {"1.png": png(1)})
    with open(whole, "rb") as file:
        content = file.read()
    for name in ("broken.tar", "broken.tar.gz", "broken.zip"):
        for damaged in (b"this is no archive", content[: len(content) // 2]):
            (tmp_path / name).write_bytes(damaged)
            assert "not an archive, or a damaged one" in error_of(tmp_path / name)


@pytest.mark.parametrize(
    ("package", "path"), [("PIL.Image", "folder"), ("sklearn.datasets", "digits")]
)
def test_a_missing_package_names_its_extra(tmp_path, monkeypatch, package, path):
    write(tmp_path / "folder", {"1.png": png(1)})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    assert "pip install 'ebt-jax[vision]'" in error_of(path)


def test_without_a_size_all_have_to_be_as_the_first(tmp_path):
    vision = VisionConfig()
    found = images.find(write(tmp_path, {"1.png": png(1), "2.png": png(2, 9)}), vision)
    assert items.side_of(found, vision) == 8
    with pytest.raises(UserError, match="2.png has 9 x 9 pixels, but the first"):
        items.decoded(found, 1, 8, vision)
