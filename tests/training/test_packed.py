"""A trained model in one file: `ebt checkpoints pack`, and what takes the file."""

import dataclasses
import json
import shutil
import zipfile

import jax
import numpy as np
import pytest

from ebt_jax.cli import run as ebt
from ebt_jax.data.config import DataConfig
from ebt_jax.data.vision_config import VisionConfig
from ebt_jax.models.config import ModelConfig
from ebt_jax.training import checkpoint, packed, workdir
from ebt_jax.training import config as c
from ebt_jax.training.loop import train
from ebt_jax.training.objective import build_objective
from ebt_jax.training.optim import make_optimizer
from ebt_jax.training.resolve import resolve_vision
from ebt_jax.training.saving import Saver
from ebt_jax.training.step import init_state

QUIET = c.LogConfig(tensorboard=False, plots=False, compilation_cache=False)


def small(**model):
    return ModelConfig(num_layers=1, num_heads=1, dim=8, **model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds a run of text, `run`, and its model in two files, `whole` and `half`."""
    folder = tmp_path_factory.mktemp("packed")
    (folder / "corpus.txt").write_text("Energy falls until nothing changes. " * 40)
    config = c.Config(
        model=small(conditioning="default"),
        data=DataConfig(path=str(folder / "corpus.txt"), context=16),
        train=c.TrainConfig(steps=2, batch_size=8, seed=4),
        eval=c.EvalConfig(batch_size=8, curve_steps=0, sample_tokens=0),
        mesh=c.MeshConfig(data=1),
        log=QUIET,
    )
    train(config, str(folder / "run"))
    pack(folder / "run", folder / "whole.npz", "--note=Of nobody.")
    pack(folder / "run", folder / "half.npz", "--dtype=float16")
    return folder


def pack(run, out, *flags):
    argv = ["checkpoints", "pack", f"--workdir={run}", f"--out={out}", *flags]
    assert ebt(argv) == 0


def numbers(capsys, trained, folder, *flags):
    data = f"--data={folder / 'corpus.txt'}"
    capsys.readouterr()
    assert ebt(["evaluate", f"--workdir={trained}", data, "--json", *flags]) == 0
    told = json.loads(capsys.readouterr().out)
    return {k: v for k, v in told.items() if k not in ("workdir", "data")}


def refused(capsys, *argv):
    capsys.readouterr()
    assert ebt(list(map(str, argv))) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: ") and told.err.count("\n") == 1, told.err
    return told.err


def test_a_file_holds_what_the_workdir_does(folder):
    run, file = folder / "run", folder / "whole.npz"
    _, config = workdir.open_workdir(file)
    before = checkpoint.named(checkpoint.restore_params(run))
    after = checkpoint.named(checkpoint.restore_params(file))
    assert list(before) == list(after)
    for name, array in before.items():
        assert after[name].dtype == array.dtype
        np.testing.assert_array_equal(after[name], array)
    given = c.differences(workdir.read_config(run), config)
    assert given == {"data.path": (str(folder / "corpus.txt"), "corpus.txt")}
    found, summary = packed.read(file), json.loads((run / "summary.json").read_text())
    assert found.step == 2 and found.note == "Of nobody."
    assert found.results["eval/nll"] == summary["eval/nll"]


def test_numbers_and_texts_are_those_of_the_workdir(folder, capsys):
    run, file = folder / "run", folder / "whole.npz"
    assert numbers(capsys, file, folder) == numbers(capsys, run, folder)
    texts = []
    for trained in (run, file):
        flags = ["--prompt=Energy", "--new=20", "--json"]
        assert ebt(["generate", f"--workdir={trained}", *flags]) == 0
        texts.append(json.loads(capsys.readouterr().out))
    assert texts[0] == texts[1] and len(texts[0]["tokens"]) == 20


def test_half_the_bits(folder, capsys):
    whole, half = (folder / name for name in ("whole.npz", "half.npz"))
    assert half.stat().st_size < 0.7 * whole.stat().st_size
    a, b = packed.read(whole).arrays, packed.read(half).arrays
    for name, array in a.items():
        # float16 rounds to 11 bits; below its normal numbers to multiples of 2**-24.
        np.testing.assert_allclose(b[name], array, rtol=2**-11, atol=2**-25)
    assert b["step_size"] == a["step_size"]
    assert any((b[name] != array).any() for name, array in a.items())
    ours, theirs = (numbers(capsys, file, folder)["nll"] for file in (whole, half))
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_equal_contents_are_equal_files(folder, tmp_path):
    pack(folder / "run", tmp_path / "again.npz", "--note=Of nobody.")
    assert (tmp_path / "again.npz").read_bytes() == (folder / "whole.npz").read_bytes()
    pack(folder / "whole.npz", tmp_path / "half.npz", "--dtype=float16")
    once, twice = (packed.read(f / "half.npz") for f in (folder, tmp_path))
    assert once.results == twice.results and twice.files == ("corpus.txt",)
    for name, array in once.arrays.items():
        np.testing.assert_array_equal(twice.arrays[name], array)


def test_files_stand_in_for_other_runs_too(folder, capsys):
    file = folder / "whole.npz"
    alone = numbers(capsys, file, folder)
    together = numbers(capsys, file, folder, f"--ensemble={file}")
    assert together["nll"] == pytest.approx(alone["nll"], rel=1e-5)
    argv = ["generate", f"--workdir={file}", "--prompt=En", "--temperature=0"]
    texts = []
    for flags in ([], [f"--draft={file}"]):
        assert ebt([*argv, "--new=9", *flags]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_a_run_begins_with_a_file(folder, tmp_path):
    config = workdir.read_config(folder / "run")
    frozen = dataclasses.replace(config.optim, peak_lr=1e-30, weight_decay=0.0)
    once = dataclasses.replace(
        config.train, steps=1, init_from=str(folder / "whole.npz")
    )
    train(dataclasses.replace(config, optim=frozen, train=once), str(tmp_path / "run"))
    before = checkpoint.named(checkpoint.restore_params(folder / "run"))
    after = checkpoint.named(checkpoint.restore_params(tmp_path / "run"))
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)


def test_results_are_kept_where_there_is_a_folder(folder, tmp_path, capsys):
    argv = ["evaluate", f"--workdir={folder / 'whole.npz'}", "--uncertainty"]
    argv += [f"--data={folder / 'corpus.txt'}", "--sequences=8", "--json"]
    before = sorted(folder.iterdir())
    assert ebt(argv) == 0
    told = capsys.readouterr()
    assert "is a file: give --out=FOLDER" in told.err
    assert sorted(folder.iterdir()) == before
    assert ebt([*argv, f"--out={tmp_path}"]) == 0
    assert not capsys.readouterr().err
    kept = json.loads((tmp_path / "uncertainty" / "corpus.json").read_text())
    assert kept["workdir"] == str(folder / "whole.npz") and kept["results"]
    assert "is no folder; make it first" in refused(
        capsys, *argv, f"--out={tmp_path / 'no'}"
    )


def test_a_file_is_listed_and_verified(folder, capsys):
    capsys.readouterr()
    for word in ("list", "verify"):
        assert ebt(["checkpoints", word, f"--workdir={folder / 'whole.npz'}"]) == 0
    out = capsys.readouterr().out
    for part in ("of text,", "2 steps of 8 on corpus.txt", "Of nobody.", "verified"):
        assert part in out
    assert str(folder) not in out


@pytest.mark.parametrize(
    "argv, message",
    [
        (["evaluate", "--workdir=FILE"], "data of its run, corpus.txt; give the text"),
        (["evaluate", "--workdir=NO.npz"], "there is no file"),
        (["evaluate", "--workdir=FILE", "--data=x", "--checkpoint=1"], "of step 2 al"),
        (["checkpoints", "pack", "--workdir=RUN"], "--out is missing; give it a file"),
        (
            ["checkpoints", "pack", "--workdir=RUN", "--out=a.safetensors"],
            "end with .n",
        ),
        (
            ["checkpoints", "pack", "--workdir=RUN", "--out=a.npz", "--dtype=int8"],
            "--dtype is 'int8', but has to be float32 or float16",
        ),
        (
            ["checkpoints", "list", "--workdir=RUN", "--note=x"],
            "--note belongs to pack",
        ),
    ],
)
def test_mistakes_are_one_line(folder, capsys, argv, message):
    places = {"FILE": folder / "whole.npz", "RUN": folder / "run", "NO": folder / "no"}
    for name, place in places.items():
        argv = [word.replace(f"={name}", f"={place}") for word in argv]
    assert message in refused(capsys, *argv)


def test_a_file_is_no_state(folder, tmp_path, capsys):
    config = workdir.read_config(folder / "run")
    with pytest.raises(c.UserError, match="is a file, which has no optimiser's state"):
        train(config, str(tmp_path / "run"), str(folder / "whole.npz"))


def rewritten(source, file, change):
    """A copy with other arrays, `change(arrays)`, and its old sum."""
    with np.load(source) as opened:
        arrays = dict(opened)
    change(arrays)
    np.savez(file, **arrays)


def flipped(source, file):
    """A copy with a bit turned over in the middle of the largest array."""
    content = bytearray(source.read_bytes())
    with zipfile.ZipFile(source) as archive:
        largest = max(archive.infolist(), key=lambda info: info.compress_size)
    content[largest.header_offset + 100 + largest.compress_size // 2] ^= 4
    file.write_bytes(content)


def cut(source, file):
    file.write_bytes(source.read_bytes()[:-200])


def pickled(source, file):
    rewritten(source, file, lambda a: a.update(x=np.array([{}], object)))


def other_about(**changes):
    def change(arrays):
        about = json.loads(arrays["about"].tobytes()) | changes
        arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)

    return lambda source, file: rewritten(source, file, change)


DAMAGES = {
    "a bit": (flipped, "is damaged"),
    "the end": (cut, "is damaged, or no file"),
    "pickled": (pickled, "Object arrays cannot be loaded"),
    "text": (lambda _, file: file.write_text("no zip"), "is damaged, or no file"),
    "one array": (lambda _, file: np.save(file.open("wb"), np.ones(3)), "is one array"),
    "another number": (
        lambda s, f: rewritten(s, f, lambda a: a["step_size"].fill(1)),
        "do not fit its own SHA-256 sum",
    ),
    "an array less": (
        lambda s, f: rewritten(s, f, lambda a: a.pop("step_size")),
        "do not fit its own SHA-256 sum",
    ),
    "another step": (other_about(step=3), "do not fit its own SHA-256 sum"),
    "another format": (other_about(format="ebt-jax model 9"), "is of format"),
    "no json": (
        lambda s, f: rewritten(s, f, lambda a: a.update(about=np.zeros(3, np.uint8))),
        "about is not readable",
    ),
    "arrays alone": (
        lambda s, f: rewritten(s, f, lambda a: a.pop("about")),
        "no model that says what it is",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_file_is_one_line(folder, tmp_path, capsys, damage):
    make, message = DAMAGES[damage]
    make(folder / "whole.npz", tmp_path / "bad.npz")
    for argv in (["generate", "--prompt=a"], ["checkpoints", "verify"]):
        argv = [*argv, f"--workdir={tmp_path / 'bad.npz'}"]
        assert message in refused(capsys, *argv)


def test_what_float16_cannot_hold(folder, tmp_path):
    found = packed.read(folder / "whole.npz")
    name = "embed/embedding"
    found.arrays[name][0, 0] = 7e4
    with pytest.raises(c.UserError, match=f"{name} reaches 7e[+]04"):
        packed.write(tmp_path / "x.npz", found._replace(dtype="float16"))


def test_a_tokenizer_does_not_go_into_a_file(folder, tmp_path, capsys):
    path = shutil.copytree(folder / "run", tmp_path / "run")
    content = json.loads((path / "config.json").read_text())
    content["data"]["tokenizer"] = "words.json"
    (path / "config.json").write_text(json.dumps(content))
    out = f"--out={tmp_path / 'x.npz'}"
    told = refused(capsys, "checkpoints", "pack", f"--workdir={path}", out)
    assert "data.tokenizer is 'words.json', a file that its model needs" in told


@pytest.mark.parametrize("data", ["digits", "PICTURES"])
def test_images(tmp_path, capsys, data):
    """Whose data ship with a package, or lie in a folder that is not in the file."""
    path, out = tmp_path / "run", tmp_path / "images.npz"
    (tmp_path / "PICTURES").mkdir()
    config = c.Config(
        model=small(space="image", patch=4),
        refine=dataclasses.replace(c.Config().refine, initial_candidate="noised"),
        data=DataConfig(path=data.replace("PICTURES", str(tmp_path / "PICTURES"))),
        vision=VisionConfig(size=8, channels=1),
        mesh=c.MeshConfig(data=1),
    )
    config = resolve_vision(config, image_shape=(8, 8, 1))
    objective = build_objective(config)
    shapes = jax.eval_shape(objective.init, jax.random.key(0))
    optimizer = make_optimizer(config.optim, config.refine, shapes)
    state = init_state(objective, optimizer, 0)
    workdir.claim_workdir(path, config)
    with Saver(path, config.checkpoint) as saver:
        saver.save(1, state, 16, config, {"eval/psnr": 20.0}, wait=True)
    pack(path, out)
    assert "eval/psnr         20.0000" in capsys.readouterr().out
    told = refused(capsys, "generate", f"--workdir={out}", "--prompt=a")
    assert "--out is missing" in told and ".png to write" in told
    argv = ["evaluate", f"--workdir={out}", "--sequences=4", "--passes=1"]
    if data == "digits":
        pytest.importorskip("sklearn")
        assert ebt([*argv, f"--out={tmp_path}"]) == 0
        assert (tmp_path / "vision" / "held_out.json").is_file()
    else:
        assert "of its run, PICTURES; evaluate the workdir" in refused(capsys, *argv)
