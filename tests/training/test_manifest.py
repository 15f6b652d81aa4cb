"""Manifests of real checkpoints: every damage is found and named."""

import json
import os
import shutil

import pytest

from ebt_jax.training import checkpoint, manifest
from ebt_jax.training.loop import fit
from ebt_jax.training.task import show_text


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    """Workdir of six bigram steps with checkpoints 4 and 6."""
    path = tmp_path_factory.mktemp("finished") / "run"
    config = toy.config(
        train={"steps": 6}, eval={"every": 4}, checkpoint={"every": 2, "keep_latest": 2}
    )
    objective = toy.bigram().objective
    batches, held_out = toy.training_batches(8), toy.held_out_batches()
    fit(config, path, objective, show_text(config, toy.tokenizer), batches, held_out)
    return path


@pytest.fixture
def step(finished, tmp_path):
    """The directory of a checkpoint, to be damaged."""
    return shutil.copytree(finished / "checkpoints" / "6", tmp_path / "6")


def every_file(directory):
    found = manifest.list_files(directory)
    assert len(found) > 8
    return found


def flip(file, bit):
    """Turns one bit of a file over, the bit-th modulo their number."""
    content = bytearray(file.read_bytes())
    bit %= 8 * len(content)
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def test_a_checkpoint_as_it_was_saved(finished):
    for number, metrics in (("4", 1), ("6", 1)):
        directory = finished / "checkpoints" / number
        assert manifest.verify(directory) == []
        found = manifest.read(directory)
        assert ("eval/nll" in found.metrics) == metrics
        assert found.bytes == sum(
            (directory / name).stat().st_size for name in every_file(directory)
        )


def test_a_flipped_bit_in_any_file_is_named(step):
    for number, name in enumerate(every_file(step)):
        before = (step / name).read_bytes()
        flip(step / name, 997 * number)
        assert manifest.verify(step) == [f"{name} has another content than was saved"]
        (step / name).write_bytes(before)
    assert manifest.verify(step) == []


def test_any_file_that_is_shortened_missing_or_too_much_is_named(step):
    for name in every_file(step):
        before = (step / name).read_bytes()
        size = len(before)
        os.truncate(step / name, size - 1)
        assert manifest.verify(step) == [f"{name} has {size - 1} bytes, not {size}"]
        (step / name).unlink()
        assert manifest.verify(step) == [f"{name} is missing"]
        (step / name).write_bytes(before)
    (step / "state" / "more").write_text("")
    assert manifest.verify(step) == ["state/more is not in manifest.json"]


def test_all_damages_are_told(step):
    first, second, third, *_ = every_file(step)
    (step / first).unlink()
    flip(step / second, 0)
    os.truncate(step / third, 0)
    told = " | ".join(manifest.verify(step))
    assert all(name in told for name in (first, second, third))


def test_a_manifest_that_is_damaged_is_told_from_damaged_data(step):
    file = step / manifest.NAME
    before = file.read_bytes()
    for bit in range(0, 8 * len(before), 331):
        flip(file, bit)
        (problem,) = manifest.verify(step)
        assert problem == "manifest.json is damaged: it does not fit its own sum"
        file.write_bytes(before)
    for content in (b"", b"[]", b"{}", b"\xff", before[:-1], before + b"\n"):
        file.write_bytes(content)
        assert manifest.verify(step)[0].startswith("manifest.json is damaged")
    file.unlink()
    assert manifest.verify(step) == [manifest.UNFINISHED]


@pytest.mark.parametrize("failures", [2, 3])
def test_a_file_that_cannot_be_read_is_tried_again(step, monkeypatch, failures):
    monkeypatch.setattr(manifest, "READ_WAITS", (0.0, 0.0))
    file, opened, failed = step / every_file(step)[3], manifest.Path.open, []

    def flaky(path, *args, **kwargs):
        if path == file and len(failed) < failures:
            failed.append(path)
            raise OSError(5, "Input/output error", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(manifest.Path, "open", flaky)
    problem = f"{file} cannot be read: Input/output error"
    assert manifest.verify(step) == ([problem] if failures == 3 else [])


def test_shares_together_find_what_one_finds(step):
    for number, name in enumerate(every_file(step)):
        flip(step / name, 13 * number)
    (step / "extra").write_text("")
    whole = manifest.verify(step)
    parts = [manifest.verify(step, share=i, shares=3) for i in range(3)]
    assert all(parts)
    assert sorted(p for part in parts for p in part) == sorted(whole)


def test_a_manifest_is_written_in_one_go(step, monkeypatch):
    before = (step / manifest.NAME).read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        manifest.write(step, saved=1.0, metrics={})
    assert (step / manifest.NAME).read_text() == before
    assert manifest.verify(step) == []  # and nothing else is left behind


def test_numbers_that_json_cannot_hold_are_left_out(step):
    metrics = {"a": float("nan"), "b": float("inf"), "c": 1.5}
    manifest.write(step, saved=2.5, metrics=metrics)
    assert manifest.read(step).metrics == {"c": 1.5}
    assert manifest.read(step).saved == 2.5
    json.loads((step / manifest.NAME).read_text())


def test_whatever_is_damaged_the_checkpoint_before_is_used(finished, tmp_path, capsys):
    path = shutil.copytree(finished, tmp_path / "run")
    directory = path / "checkpoints" / "6"
    for number, name in enumerate([*every_file(directory), manifest.NAME], 1):
        flip(directory / name, 41 * number)
        assert checkpoint.latest_step(path) == 4
        assert checkpoint.recover(path) == 4
        told = capsys.readouterr().err.splitlines()
        assert len(told) == 2 and all(name in line for line in told)
        assert told[0].startswith("warning: checkpoint 6 is not used: ")
        assert f"moved to {path / 'damaged' / f'6-{number}'}" in told[1]
        assert not directory.exists()
        shutil.copytree(finished / "checkpoints" / "6", directory)
    assert checkpoint.recover(path) == 6
    assert len(list((path / "damaged").iterdir())) == number
