"""Latents prepared once: the batches of the pictures, by several processes, resumed."""

import dataclasses
import json
import os
import pickle

import numpy as np
import pytest
from vision_files import many, png, write

from ebt_jax.data import latents, vision_pipeline
from ebt_jax.data import prepare_vision as prepare_module
from ebt_jax.data.config import DataConfig
from ebt_jax.data.prepare_vision import prepare_vision
from ebt_jax.data.vision_config import VisionConfig
from ebt_jax.errors import StorageError, UserError

PIXELS = VisionConfig(size=8, caption_features=16)
PCA = dataclasses.replace(PIXELS, encoder="pca", encoder_patch=4, encoder_features=6)
PARTS = 3  # of 10 pictures, 4 in each


@pytest.fixture
def data(tmp_path):
    """Pictures of two classes with captions, one of them corrupt."""
    contents = many(10)
    names = sorted(contents)
    told = [{"file": name, "captions": [f"picture {name}", "any"]} for name in names]
    contents[names[5]] = contents[names[5]][:60]
    contents["captions.jsonl"] = "\n".join(map(json.dumps, told)).encode()
    return DataConfig(path=write(tmp_path / "pictures", contents))


def tolerant(vision):
    """With one of ten pictures that may be corrupt."""
    return dataclasses.replace(vision, max_corrupt=0.1)


def prepare(data, output, vision=PIXELS, space="image", **options):
    """Encodes, four files in a part."""
    options = {"part_files": 4, "progress": False} | options
    return prepare_vision(data, tolerant(vision), space, str(output), **options)


def opened(data, path, split="all", vision=PIXELS, space="image"):
    """A split of pictures or of latents."""
    data = dataclasses.replace(data, path=str(path))
    return vision_pipeline.open_data(
        data, tolerant(vision), space, split, progress=False
    )


def error_of(function, *arguments, **options):
    """The message with which something stops."""
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_same(ours, theirs, tolerance=0.0):
    """Both have equal examples, classes and captions."""
    assert len(ours.examples) == len(theirs.examples)
    assert ours.labels == theirs.labels and ours.captions == theirs.captions
    assert ours.image_shape == theirs.image_shape
    for index in range(len(ours.examples)):
        a, b = ours.examples[index], theirs.examples[index]
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_allclose(a[name], b[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("vision", [PIXELS, PCA], ids=["pixels", "pca"])
def test_latents_give_the_examples_of_the_pictures(data, tmp_path, vision):
    output = tmp_path / "latents"
    assert prepare(data, output, vision)
    assert len(list(output.glob("part-*.array_record"))) == PARTS
    for split in ("train", "held_out", "all"):
        left = opened(data, output, split, vision)
        assert_same(left, opened(data, data.path, split, vision), 1e-6)
    example = left.examples[3]
    copied = pickle.loads(pickle.dumps(left.examples))
    assert np.array_equal(copied[3]["image"], example["image"])
    assert left.decode(example["image"]).shape == (8, 8, 3)


def test_processes_share_the_work(data, tmp_path):
    output = tmp_path / "latents"
    done = [
        prepare(data, output, process_index=process, process_count=2)
        for process in (1, 0)
    ]
    assert done == [False, True]
    assert_same(opened(data, output), opened(data, data.path))


def test_what_was_stopped_goes_on(data, tmp_path):
    output = tmp_path / "latents"
    prepare(data, output)
    whole = opened(data, output)
    kept = output / "part-00000.array_record"
    before = os.stat(kept).st_mtime_ns
    (output / "part-00001.json").unlink()
    message = error_of(opened, data, output)
    assert "has 2 of its 3 parts" in message and "ebt prepare" in message
    assert prepare(data, output)
    assert os.stat(kept).st_mtime_ns == before
    assert_same(opened(data, output), whole)


def test_other_settings_do_not_mix(data, tmp_path):
    output = tmp_path / "latents"
    prepare(data, output)
    grey = dataclasses.replace(PIXELS, channels=1)
    message = error_of(prepare, data, output, grey)
    assert "was begun with" in message and "[8, 8, 3]" in message
    assert "vision.channels 3, but it is 1" in error_of(
        opened, data, output, vision=grey
    )
    assert "vision.encoder 'none'" in error_of(opened, data, output, vision=PCA)
    large = dataclasses.replace(PIXELS, size=16)
    assert "vision.size 8" in error_of(opened, data, output, vision=large)
    assert "latents of image" in error_of(opened, data, output, space="video")
    again = dataclasses.replace(data, path=str(output))
    assert "holds latents already" in error_of(prepare, again, tmp_path / "more")
    # What pixels do not depend on may differ.
    other = dataclasses.replace(PIXELS, encoder_features=3, frame_seconds=9.0)
    assert len(opened(data, output, vision=other).examples) == 9


def test_outputs_that_cannot_be(data, tmp_path):
    write(tmp_path / "mine", {"thesis.txt": b"x"})
    assert "holds no latents" in error_of(prepare, data, tmp_path / "mine")
    assert "cannot be written" in error_of(
        prepare, data, tmp_path / "mine" / "thesis.txt" / "latents"
    )
    wrong = {"process_index": 2, "process_count": 2}
    assert "process_index is 2" in error_of(prepare, data, tmp_path / "x", **wrong)
    assert not (tmp_path / "x").exists()


def test_full_storage_is_named_and_what_is_there_stays(data, tmp_path, monkeypatch):
    output = tmp_path / "latents"
    writes = []

    class Full(prepare_module.ArrayRecordWriter):
        """Has room for five records."""

        def write(self, record):
            writes.append(record)
            if len(writes) > 5:
                raise RuntimeError("write() failed: No space left on device")
            super().write(record)

    monkeypatch.setattr(prepare_module, "ArrayRecordWriter", Full)
    with pytest.raises(StorageError, match="No space left .*give the same command"):
        prepare(data, output)
    monkeypatch.undo()
    names = sorted(path.name for path in output.iterdir())
    assert names == ["latents.json", "part-00000.array_record", "part-00000.json"]
    assert prepare(data, output)
    assert_same(opened(data, output), opened(data, data.path))


def test_too_many_corrupt_pictures_stop_it(data, tmp_path):
    write(tmp_path / "pictures", {"a/000.png": png(0)[:60]})
    message = error_of(prepare, data, tmp_path / "latents")
    assert "2 unusable of 10" in message


def test_damage_is_named(data, tmp_path):
    output = tmp_path / "latents"
    prepare(data, output)
    part = output / "part-00002.array_record"
    part.write_bytes(part.read_bytes()[:100])
    assert "part-00002.array_record is missing or damaged" in error_of(
        opened, data, output
    )
    (output / "part-00002.json").write_text("{")
    assert "part-00002.json is damaged" in error_of(opened, data, output)
    (output / latents.INDEX).write_text('{"format": "other", "version": 1}')
    assert "not an index of latents" in error_of(opened, data, output)


def test_clips_keep_all_their_frames(tmp_path):
    contents = {f"{clip}/{n:02}.png": png(n) for clip in "abc" for n in range(12)}
    contents |= {f"short/{n}.png": png(n) for n in range(2)}
    path = write(tmp_path / "clips", contents)
    data = DataConfig(path=path, context=2)
    vision = dataclasses.replace(PIXELS, frame_rate=4.0, max_corrupt=0.3)
    output = str(tmp_path / "latents")
    assert prepare_vision(data, vision, "video", output, progress=False)
    for context, stride in ((2, 1), (3, 2)):
        given = dataclasses.replace(data, context=context)
        wanted = dataclasses.replace(vision, frame_seconds=stride / 4)
        raw, prepared = (
            vision_pipeline.open_data(
                dataclasses.replace(given, path=p), wanted, "video", "all"
            )
            for p in (path, output)
        )
        assert len(prepared.examples) == 3 and prepared.frame_size == 192
        assert_same(prepared, raw)
        rng = [np.random.default_rng(5) for _ in range(2)]
        drawn = [
            d.examples.draw(1, r) for d, r in zip((raw, prepared), rng, strict=True)
        ]
        assert np.array_equal(drawn[0]["frames"], drawn[1]["frames"])


def test_held_out_latents_of_another_encoder_are_refused(data, tmp_path):
    other = dataclasses.replace(data, path=write(tmp_path / "other", many(9)))
    for source, name in ((data, "ours"), (other, "theirs")):
        prepare(source, tmp_path / name, PCA)
    mixed = dataclasses.replace(
        data, held_out=0.0, held_out_path=str(tmp_path / "theirs")
    )
    message = error_of(opened, mixed, tmp_path / "ours", "held_out", PCA)
    assert "fitted to other pictures" in message
