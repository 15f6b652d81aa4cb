"""A trained model in one file: `ebt checkpoints pack`, and what takes the file."""

import contextlib
import dataclasses
import io
import json
import math
import shutil
import zipfile

import jax
import numpy as np
import pytest

from ebt_jax.cli import run as ebt
from ebt_jax.data.config import DataConfig
from ebt_jax.data.vision_config import VisionConfig
from ebt_jax.errors import UserError
from ebt_jax.models.config import ModelConfig
from ebt_jax.training import checkpoint, initial, packed, workdir
from ebt_jax.training import config as c
from ebt_jax.training.objective import build_objective
from ebt_jax.training.optim import make_optimizer
from ebt_jax.training.resolve import resolve, resolve_vision
from ebt_jax.training.saving import Saver
from ebt_jax.training.step import init_state
from ebt_jax.verbs.common import results_folder

QUIET = c.LogConfig(tensorboard=False, plots=False, compilation_cache=False)


def small(**model):
    return ModelConfig(num_layers=1, num_heads=1, dim=8, **model)


def first_state(config):
    objective = build_objective(config)
    shapes = jax.eval_shape(objective.init, jax.random.key(0))
    optimizer = make_optimizer(config.optim, config.refine, shapes)
    return jax.jit(lambda: init_state(objective, optimizer, 4))()


def save(path, config, **metrics):
    """A workdir with a checkpoint of step 2, of parameters that nobody has trained."""
    workdir.claim_workdir(path, config)
    named = {f"eval/{name}": value for name, value in metrics.items()}
    with Saver(path, config.checkpoint) as saver:
        saver.save(2, first_state(config), 16, config, named, wait=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds a run of text, `run`, and its model in two files, `whole` and `half`."""
    folder = tmp_path_factory.mktemp("packed")
    (folder / "corpus.txt").write_text("Energy falls until nothing changes. " * 9)
    config = c.Config(
        model=small(conditioning="default"),
        data=DataConfig(path=str(folder / "corpus.txt"), context=16),
        train=c.TrainConfig(steps=2, batch_size=8, seed=4),
        eval=c.EvalConfig(batch_size=8, curve_steps=0, sample_tokens=0),
        mesh=c.MeshConfig(data=1),
        log=QUIET,
    )
    save(folder / "run", resolve(config, 256), nll=5.5, perplexity=math.inf)
    pack(folder / "run", folder / "whole.npz", "--note=Of nobody.")
    pack(folder / "run", folder / "half.npz", "--dtype=float16")
    return folder


def pack(run, out, *flags):
    argv = ["checkpoints", "pack", f"--workdir={run}", f"--out={out}", *flags]
    assert ebt(argv) == 0


def numbers(trained, folder, *flags):
    data, told = f"--data={folder / 'corpus.txt'}", io.StringIO()
    with contextlib.redirect_stdout(told):
        assert ebt(["evaluate", f"--workdir={trained}", data, "--json", *flags]) == 0
    found = json.loads(told.getvalue())
    return {k: v for k, v in found.items() if k not in ("workdir", "data")}


@pytest.fixture(scope="module")
def of_file(folder):
    """Numbers of the file that holds all bits."""
    return numbers(folder / "whole.npz", folder)


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
    found = packed.read(file)
    assert found.step == 2 and found.note == "Of nobody."
    assert found.results == {"eval/nll": 5.5}


def test_numbers_of_the_end_of_a_run(folder, tmp_path):
    """Are in its summary, which is of no checkpoint before."""
    run = shutil.copytree(folder / "run", tmp_path / "run")
    for step, nll in ((2, 5.25), (3, 5.5)):
        told = {"step": step, "eval/nll": 5.25, "train/loss": 1.0, "eval/x": None}
        (run / "summary.json").write_text(json.dumps(told))
        pack(run, tmp_path / "x.npz")
        assert packed.read(tmp_path / "x.npz").results == {"eval/nll": nll}


def test_numbers_and_texts_are_those_of_the_workdir(folder, of_file, capsys):
    run, file = folder / "run", folder / "whole.npz"
    assert of_file == numbers(run, folder)
    capsys.readouterr()
    texts = []
    for trained in (run, file):
        flags = ["--prompt=Energy", "--new=20", "--json"]
        assert ebt(["generate", f"--workdir={trained}", *flags]) == 0
        texts.append(json.loads(capsys.readouterr().out))
    assert texts[0] == texts[1] and len(texts[0]["tokens"]) == 20


def test_half_the_bits(folder, of_file):
    whole, half = (folder / name for name in ("whole.npz", "half.npz"))
    assert half.stat().st_size < 0.7 * whole.stat().st_size
    a, b = packed.read(whole).arrays, packed.read(half).arrays
    for name, array in a.items():
        # float16 rounds to 11 bits; below its normal numbers to multiples of 2**-24.
        np.testing.assert_allclose(b[name], array, rtol=2**-11, atol=2**-25)
    assert b["step_size"] == a["step_size"]
    assert any((b[name] != array).any() for name, array in a.items())
    assert numbers(half, folder)["nll"] == pytest.approx(of_file["nll"], rel=1e-3)


def test_equal_contents_are_equal_files(folder, tmp_path):
    pack(folder / "run", tmp_path / "again.npz", "--note=Of nobody.")
    assert (tmp_path / "again.npz").read_bytes() == (folder / "whole.npz").read_bytes()
    pack(folder / "whole.npz", tmp_path / "half.npz", "--dtype=float16")
    once, twice = (packed.read(f / "half.npz") for f in (folder, tmp_path))
    assert once.results == twice.results and twice.files == ("corpus.txt",)
    for name, array in once.arrays.items():
        np.testing.assert_array_equal(twice.arrays[name], array)


def test_files_stand_in_for_other_runs_too(folder, of_file, capsys):
    file = folder / "whole.npz"
    together = numbers(file, folder, f"--ensemble={file}")
    assert together["nll"] == pytest.approx(of_file["nll"], rel=1e-5)
    capsys.readouterr()
    argv = ["generate", f"--workdir={file}", "--prompt=En", "--temperature=0"]
    texts = []
    for flags in ([], [f"--draft={file}"]):
        assert ebt([*argv, "--new=9", *flags]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_a_run_begins_with_a_file(folder, tmp_path):
    config, file = workdir.read_config(folder / "run"), str(folder / "whole.npz")
    fresh = first_state(config).params
    other = jax.tree.map(lambda x: x + 1, fresh)
    begun = dataclasses.replace(config.train, init_from=file)
    config = dataclasses.replace(config, train=begun)
    origin = initial.find_origin(config, "", fresh)
    assert origin is not None and not origin.whole
    params = initial.warm_start(origin, config, other)
    params["noise_std"] -= 1  # which this run does not learn: it stays its own
    jax.tree.map(np.testing.assert_array_equal, params, fresh)
    with pytest.raises(UserError, match="is a file, which has no optimiser's state"):
        initial.find_origin(config, file, fresh)


def test_results_are_kept_where_there_is_a_folder(folder, tmp_path, capsys):
    file = folder / "whole.npz"
    argv = ["evaluate", f"--workdir={file}", "--uncertainty", "--sequences=8"]
    argv += [f"--data={folder / 'corpus.txt'}", "--json"]
    assert ebt([*argv, f"--out={tmp_path}"]) == 0
    assert "not kept" not in capsys.readouterr().err
    kept = json.loads((tmp_path / "uncertainty" / "corpus.json").read_text())
    assert kept["workdir"] == str(file) and kept["results"]
    assert results_folder(folder / "run", None) == folder / "run"
    assert results_folder(file, None) is None
    assert f"not kept, as {file} is a file" in capsys.readouterr().err
    with pytest.raises(UserError, match="is no folder; make it first"):
        results_folder(file, str(tmp_path / "no"))


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


_ARRAY = io.BytesIO()
np.save(_ARRAY, np.ones(3))
ARRAY = _ARRAY.getvalue()
DAMAGES = {
    "a bit": (flipped, "is damaged"),
    "the end": (cut, "is damaged, or no file"),
    "pickled": (pickled, "Object arrays cannot be loaded"),
    "text": (lambda _, file: file.write_text("no zip"), "is damaged, or no file"),
    "one array": (lambda _, file: file.write_bytes(ARRAY), "is one array"),
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
    with pytest.raises(UserError, match=f"{name} reaches 7e[+]04"):
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
    save(path, config, psnr=20.0)
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
