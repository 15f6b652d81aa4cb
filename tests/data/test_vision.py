"""Splits and batches of pictures: which, in which order, and what is left out."""

import dataclasses
import pickle
import sys

import numpy as np
import pytest
from vision_files import many, pixels_of, png, write

from ebt_jax.data import pictures, pipeline, vision_pipeline
from ebt_jax.data.config import DataConfig
from ebt_jax.data.vision_config import VisionConfig
from ebt_jax.errors import UserError

COUNT = 20


def opened(path, split="train", data=None, like=None, limit_bytes=1 << 20, **vision):
    """A split of pictures."""
    data = dataclasses.replace(data or DataConfig(), path=str(path))
    return vision_pipeline.open_data(
        data,
        VisionConfig(**vision),
        "image",
        split,
        like=like,
        progress=False,
        limit_bytes=limit_bytes,
    )


def error_of(path, split="train", **changes):
    """The message with which opening stops."""
    with pytest.raises(UserError) as caught:
        opened(path, split, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def seen(data):
    """The pixels of all pictures, as bytes."""
    return [
        pictures.to_pixels(data.examples[i]["image"]).tobytes()
        for i in range(len(data.examples))
    ]


@pytest.fixture
def folder(tmp_path):
    """Pictures of two classes."""
    return write(tmp_path / "pictures", many(COUNT))


def test_splits_are_apart_and_make_the_whole(folder):
    train, held_out, whole = (opened(folder, s) for s in ("train", "held_out", "all"))
    assert len(held_out.examples) == 2
    assert sorted(seen(train) + seen(held_out)) == sorted(seen(whole))
    expected = {pixels_of(content).tobytes() for content in many(COUNT).values()}
    assert set(seen(whole)) == expected
    everything = opened(folder, data=DataConfig(held_out=0.0))
    assert seen(everything) == seen(whole)


def test_an_example(folder):
    data = opened(folder, "all")
    example = data.examples[11]
    assert data.image_shape == (8, 8, 3) and data.labels == ("a", "b")
    assert {k: (v.shape, v.dtype) for k, v in example.items()} == {
        "image": ((8, 8, 3), np.float32),
        "weights": ((), np.float32),
        "index": ((), np.int32),
        "label": ((), np.int32),
    }
    assert (example["label"], example["index"], example["weights"]) == (1, 11, 1)
    assert data.condition_size == data.frame_size == 0


def test_corrupt_files_are_skipped_and_move_no_other(folder, tmp_path, caplog):
    whole, train = opened(folder, "all"), opened(folder)
    write(tmp_path / "pictures", {"a/006.png": png(6)[:50]})
    left = opened(folder, max_corrupt=0.05)
    assert "a/006.png is corrupt" in caplog.text
    lost = seen(whole)[3]
    assert seen(left) == [picture for picture in seen(train) if picture != lost]
    message = error_of(folder)
    assert "a/006.png is corrupt" in message and "1 unusable of 20" in message
    assert "vision.max_corrupt (0.01)" in message


def test_conversions_are_said_once(folder, caplog):
    opened("digits", "held_out", limit_bytes=1 << 30)
    assert caplog.text.count("180 of 180 pictures are grey") == 1
    caplog.clear()
    opened(folder)
    assert not caplog.text


def test_captions_and_pictures_that_lack_each_other(tmp_path):
    lines = [f'{{"file": "{n}.png", "captions": ["one {n}", "two"]}}' for n in range(9)]
    text = "\n".join(lines).encode()
    contents = {f"{n}.png": png(n) for n in range(1, 11)} | {"c.jsonl": text}
    folder = write(tmp_path, contents)
    assert "0.png has a caption, but is not there" in error_of(folder)
    message = error_of(folder, "all", max_corrupt=0.1)
    assert "10.png has no caption" not in message.partition(";")[0]
    assert "0.png has a caption, but is not there; 10.png has no caption" in message
    data = opened(folder, "all", max_corrupt=0.3, caption_features=32)
    assert len(data.examples) == 8 and data.condition_size == 32
    assert data.captions[2] == ("one 3", "two")
    told = data.encode_captions(["one 3", "two"])
    assert np.array_equal(data.examples[2]["caption"], told[0])
    drawn = [
        data.examples.draw(2, np.random.default_rng(n))["caption"] for n in range(9)
    ]
    both = {tuple(caption) for caption in drawn}
    assert both == {tuple(row) for row in told}


def batches(data, count, config=None, **options):
    """The first training batches."""
    options = {"batch_size": 4, "seed": 0} | options
    stream = vision_pipeline.train_batches(data, config or DataConfig(), **options)
    with_end = [next(stream) for _ in range(count)]
    stream.close()
    return with_end


def same(left, right):
    """Whether two lists of batches are equal in every bit."""
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
        for a, b in zip(left, right, strict=True)
    )


def test_training_goes_on_anywhere_and_in_parts(folder):
    data = opened(folder)
    straight = batches(data, 10)
    assert straight[0]["image"].shape == (4, 8, 8, 3)
    assert same(batches(data, 10), straight)
    assert not same(batches(data, 10, seed=1), straight)
    assert same(batches(data, 7, start=12), straight[3:])
    ours = batches(data, 10, rows=[1, 3])
    for part, whole in zip(ours, straight, strict=True):
        assert all(np.array_equal(part[name], whole[name][[1, 3]]) for name in whole)


def test_every_epoch_has_every_picture_once_in_another_order(folder):
    data = opened(folder)
    order = np.concatenate([b["index"] for b in batches(data, 9, batch_size=6)])
    epochs = order.reshape(3, 18)
    assert all(sorted(epoch) == list(range(18)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    plain = DataConfig(shuffle=False)
    (first,) = batches(data, 1, plain, batch_size=18)
    assert first["index"].tolist() == list(range(18))


def test_examples_travel_to_other_processes(folder):
    """What Grain's worker processes get."""
    data = opened(folder)
    stream = vision_pipeline.train_batches(data, DataConfig(), batch_size=4, seed=0)
    examples = stream._examples
    copied = pickle.loads(pickle.dumps(examples))
    assert same([copied[25]], [examples[25]])


def test_evaluation_has_every_picture_once(folder):
    data = opened(folder, "all")
    for batch_size in (3, 8, 20):
        found = list(vision_pipeline.held_out_batches(data, batch_size=batch_size))
        index, weights = (
            np.concatenate([batch[name] for batch in found])
            for name in ("index", "weights")
        )
        assert index[weights == 1].tolist() == list(range(COUNT))
        assert len({len(batch["index"]) for batch in found}) == 1
    some = vision_pipeline.held_out_batches(data, batch_size=4, sequences=6)
    assert sum(batch["weights"].sum() for batch in some) == 6
    halves = [
        vision_pipeline.held_out_batches(
            data, batch_size=4, process_index=process, process_count=2
        )
        for process in range(2)
    ]
    for first, second in zip(*halves, strict=True):
        index = np.stack([first["index"], second["index"]], 1)
        assert np.all(np.diff(index.ravel()) > 0)


def test_too_small_and_too_large(folder, tmp_path):
    message = error_of(folder, limit_bytes=1000)
    assert "ebt prepare" in message
    once = DataConfig(repeat=False)
    with pytest.raises(UserError, match="no more than 18 pictures"):
        batches(opened(folder, data=once), 1, once, batch_size=19)
    one = write(tmp_path / "one", {"1.png": png(1)})
    assert "single picture" in error_of(one)
    assert len(opened(one, data=DataConfig(held_out=0.0)).examples) == 1
    wide = write(tmp_path / "wide", {"1.ppm": b"P6 2 1 255\n" + bytes(6)})
    assert "is not square" in error_of(wide)
    broken = write(tmp_path / "broken", {"1.png": b"", "2.png": b"x"})
    assert "none of 2 files can be read" in error_of(broken)


def test_components_are_fitted_to_the_training_split(folder, tmp_path):
    settings = {"encoder": "pca", "encoder_patch": 4, "encoder_features": 48}
    train = opened(folder, **settings)
    held_out, again = (
        opened(folder, "held_out", like=like, **settings) for like in (train, None)
    )
    assert train.image_shape == (2, 2, 48)
    image = held_out.examples[0]["image"]
    assert np.array_equal(image, again.examples[0]["image"])
    pixels = held_out.decode(image)
    # All 48 numbers of a patch are kept, so nothing is lost.
    plain = opened(folder, "held_out").examples[0]["image"]
    assert np.abs(pixels.astype(int) - pictures.to_pixels(plain)).max() <= 1
    encoded = np.stack([train.examples[i]["image"] for i in range(len(train.examples))])
    assert np.isclose(np.mean(encoded**2), 1, rtol=1e-3)
    assert "does not divide" in error_of(folder, **settings | {"encoder_patch": 3})


def test_other_pictures_to_evaluate_on(folder, tmp_path):
    other = write(tmp_path / "other", {"a/1.png": png(77), "b/2.png": png(78)})
    config = DataConfig(held_out=0.0, held_out_path=other)
    assert len(opened(folder, data=config).examples) == COUNT
    held_out = opened(folder, "held_out", data=config)
    assert len(held_out.examples) == 2 and held_out.labels == ("a", "b")
    write(tmp_path / "other", {"c/1.png": png(79)})
    assert "class 'c'" in error_of(folder, "held_out", data=config)


def test_reading_pictures_imports_no_video(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    assert len(opened(folder).examples) == 18


def test_text_and_pictures_share_their_batches():
    assert vision_pipeline.TrainBatches is pipeline.TrainBatches
