"""Clips: where they come from, which of their frames an example has."""

import io
import json
import sys

import av
import numpy as np
import pytest
from PIL import Image
from vision_files import write, write_tar

from ebt_jax.data import pictures, vision_pipeline
from ebt_jax.data.config import DataConfig
from ebt_jax.data.vision_config import VisionConfig
from ebt_jax.errors import UserError

RATE = 20  # frames per second of videos that are written here


def grey(number, side=8):
    """A frame whose brightness tells which it is."""
    return np.full((side, side, 3), 20 + 6 * number, np.uint8)


def video(count, side=16, suffix="matroska"):
    """A video file of so many frames."""
    file = io.BytesIO()
    with av.open(file, "w", format=suffix) as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(grey(number, side), format="rgb24")
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return file.getvalue()


def frames(count, folder="clip"):
    """A clip as pictures, by name."""
    found = {}
    for number in range(count):
        file = io.BytesIO()
        Image.fromarray(grey(number)).save(file, "PNG")
        found[f"{folder}/{number:03}.png"] = file.getvalue()
    return found


def opened(path, split="all", *, context=3, held_out=0.1, like=None, **vision):
    """A split of clips."""
    vision = {"frame_seconds": 1 / RATE, "frame_rate": float(RATE)} | vision
    return vision_pipeline.open_data(
        DataConfig(path=str(path), context=context, held_out=held_out),
        VisionConfig(**vision),
        "video",
        split,
        like=like,
        progress=False,
    )


def error_of(path, **changes):
    """The message with which opening stops."""
    with pytest.raises(UserError) as caught:
        opened(path, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def numbers(example):
    """Which frames of their clip an example has."""
    whole = np.concatenate([example["frames"], example["targets"][-1:]])
    pixels = pictures.to_pixels(whole.reshape(*whole.shape, 1))
    return np.round((pixels.reshape(len(whole), -1).mean(1) - 20) / 6).astype(int)


def test_an_example_is_frames_and_the_frame_after_each(tmp_path):
    data = opened(write(tmp_path, frames(20)))
    example = data.examples[0]
    assert {k: (v.shape, v.dtype) for k, v in example.items()} == {
        "frames": ((3, 192), np.float32),
        "targets": ((3, 192), np.float32),
        "weights": ((3,), np.float32),
        "index": ((), np.int32),
    }
    assert np.array_equal(example["frames"][1:], example["targets"][:-1])
    assert data.frame_size == 192 and data.image_shape == (8, 8, 3)
    assert data.decode(example["frames"]).shape == (3, 8, 8, 3)
    assert data.decode(example["frames"])[0, 0, 0, 0] == 20 + 6 * numbers(example)[0]


def test_a_frame_lies_channel_after_channel(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(colours).save(file, "PNG")
    files = {f"clip/{number:03}.png": file.getvalue() for number in range(20)}
    data = opened(write(tmp_path, files))
    frame = data.examples[0]["frames"][0]
    red = colours[..., 0].reshape(-1) / 127.5 - 1
    np.testing.assert_allclose(frame[:64], red, atol=1e-6)
    assert np.array_equal(data.decode(frame), colours)


def test_the_middle_in_evaluation_and_anywhere_in_training(tmp_path):
    data = opened(write(tmp_path, frames(20)), frame_seconds=3 / RATE)
    assert numbers(data.examples[0]).tolist() == [5, 8, 11, 14]
    rngs = map(np.random.default_rng, range(200))
    starts = {int(numbers(data.examples.draw(0, rng))[0]) for rng in rngs}
    assert starts == set(range(11))  # the last of them ends with the clip
    same = [data.examples.draw(0, np.random.default_rng(7)) for _ in range(2)]
    assert np.array_equal(same[0]["frames"], same[1]["frames"])


def test_a_clip_begins_elsewhere_in_every_epoch(tmp_path):
    data = opened(write(tmp_path, frames(20)))
    options = {"batch_size": 1, "seed": 0}
    stream = vision_pipeline.train_batches(data, DataConfig(), **options)
    epochs = [
        numbers({name: array[0] for name, array in next(stream).items()})[0]
        for _ in range(12)
    ]
    assert len(set(epochs)) > 4
    stream.close()
    again = vision_pipeline.train_batches(data, DataConfig(), **options, start=5)
    batch = {name: array[0] for name, array in next(again).items()}
    assert numbers(batch)[0] == epochs[5]
    again.close()


def test_frames_that_are_not_a_whole_number_apart(tmp_path):
    data = opened(write(tmp_path, frames(20)), frame_seconds=2.5 / RATE, context=4)
    assert np.diff(numbers(data.examples[0])).sum() == 10


def test_videos_folders_and_archives(tmp_path):
    contents = {"x/film.mkv": video(12), **frames(12, "y/clip"), "notes.txt": b"x"}
    folder = write(tmp_path / "folder", contents)
    archives = [
        write_tar(tmp_path / f"packed.{kind}", contents) for kind in ("tar", "tar.gz")
    ]
    for path in (folder, *archives):
        data = opened(path, size=8)
        found = [numbers(data.examples[index]).tolist() for index in range(2)]
        assert found == [[4, 5, 6, 7]] * 2


@pytest.mark.parametrize("suffix", ["mp4", "avi", "gif"])
def test_other_kinds_of_video(tmp_path, suffix):
    path = tmp_path / f"film.{suffix}"
    if suffix == "gif":
        images = [Image.fromarray(grey(number)) for number in range(12)]
        options = {"save_all": True, "append_images": images[1:], "duration": 50}
        images[0].save(path, **options)
    else:
        path.write_bytes(video(12, suffix=suffix))
    data = opened(path, size=8)
    assert numbers(data.examples[0]).tolist() == [4, 5, 6, 7]


def test_strides_of_frames_are_told_beside_them(tmp_path):
    contents = frames(30, "slow") | frames(30, "fast")
    table = json.dumps([{"video": "slow", "stride": 2}]).encode()
    folder = write(tmp_path / "f", contents | {"clips.json": table})
    archive = write_tar(tmp_path / "packed.tar.gz", contents)
    write(tmp_path, {"packed.json": table})
    for path in (folder, archive):
        data = opened(path, frame_seconds=4 / RATE)
        steps = [np.diff(numbers(data.examples[index]))[0] for index in range(2)]
        assert steps == [4, 2]  # "fast" comes first
    write(tmp_path, {"packed.json": b'[{"video": "slow"}]'})
    assert "packed.json does not tell" in error_of(archive)


def test_a_single_clip_is_cut(tmp_path):
    folder = write(tmp_path, frames(20))
    train = opened(folder, "train", held_out=0.3)
    held_out = opened(folder, "held_out", held_out=0.3, like=train)
    assert numbers(train.examples[0]).tolist() == [5, 6, 7, 8]  # of 0 to 13
    assert numbers(held_out.examples[0]).tolist() == [15, 16, 17, 18]  # of 14 to 19
    rngs = map(np.random.default_rng, range(100))
    last = max(numbers(train.examples.draw(0, rng))[-1] for rng in rngs)
    assert last == 13


def test_short_and_corrupt_clips_are_listed_and_skipped(tmp_path, caplog):
    contents = frames(20, "good") | frames(3, "short") | {"bad.mkv": b"no video"}
    folder = write(tmp_path / "f", contents)
    message = error_of(folder, max_corrupt=0.34)
    assert "bad.mkv is corrupt" in message
    assert "short is too short: 3 frames" in message
    assert "data.context 3 needs 4 frames" in message
    assert len(opened(folder, max_corrupt=0.7).examples) == 1
    assert "skipped: bad.mkv" in caplog.text and "skipped: short" in caplog.text
    whole = video(40)
    write(tmp_path / "cut", {"cut.mkv": whole[: len(whole) // 3], **frames(20, "good")})
    cut = opened(tmp_path / "cut", size=8, max_corrupt=0.5)
    assert len(cut.examples) in (1, 2)  # what is left of it may be a video
    write(tmp_path / "none", {"a.mkv": b"", "b/1.png": b"x"})
    assert "none of 2 files can be read" in error_of(tmp_path / "none")


def test_frames_cannot_be_closer_than_they_are(tmp_path):
    message = error_of(write(tmp_path, frames(20)), frame_seconds=0.01)
    assert "vision.frame_seconds is 0.01" in message and "0.05 seconds" in message


def test_a_missing_decoder_names_its_extra(tmp_path, monkeypatch):
    folder = write(tmp_path, {"film.mkv": video(4)})
    monkeypatch.setitem(sys.modules, "av", None)
    assert "pip install 'ebt-jax[vision]'" in error_of(folder)


def test_what_is_not_there_is_said(tmp_path):
    assert "no file or folder" in error_of(tmp_path / "nothing.mkv")
    assert "name videos" in error_of("pydoc")


def moving(split, **settings):
    """Clips of moving digits, a few frames each."""
    settings = {"channels": 1, "size": 16, "frame_seconds": 0.1} | settings
    return opened("moving_digits", split, context=1, **settings)


def test_moving_digits_move_and_are_always_the_same(monkeypatch):
    monkeypatch.setattr("ebt_jax.data.defaults._CLIPS", 30)
    data, again = moving("all"), moving("all")
    assert data.frame_size == 256 and len(data.examples) == 30
    for index in range(30):
        example = data.examples[index]
        assert np.array_equal(example["frames"], again.examples[index]["frames"])
        change = np.abs(example["frames"] - example["targets"]).mean()
        assert 0.001 < change < 0.3
        assert example["frames"].max() > 0 and example["frames"].min() == -1
    splits = [moving(split) for split in ("train", "held_out")]
    assert [len(split.examples) for split in splits] == [27, 3]
