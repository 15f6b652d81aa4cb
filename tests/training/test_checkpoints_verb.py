"""`ebt checkpoints`, through the command line's function."""

import re
import shutil

import jax
import pytest

from ebt_jax.cli import run as ebt
from ebt_jax.training import manifest
from ebt_jax.training.optim import make_optimizer
from ebt_jax.training.saving import Saver
from ebt_jax.training.step import init_state
from ebt_jax.training.workdir import claim_workdir


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    """A workdir with checkpoints 2 and 4, the first of them evaluated."""
    path = tmp_path_factory.mktemp("finished") / "run"
    config = toy.config()
    objective = toy.bigram().objective
    shapes = jax.eval_shape(objective.init, jax.random.key(0))
    optimizer = make_optimizer(config.optim, config.refine, shapes)
    claim_workdir(path, config)
    with Saver(path, config.checkpoint) as saver:
        state = init_state(objective, optimizer, 0)
        saver.save(2, state, 16, config, {"eval/nll": 1.25})
        saver.save(4, state, 32, config)
    return path


@pytest.fixture
def path(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def flip(file):
    content = bytearray(file.read_bytes())
    content[-2] ^= 4
    file.write_bytes(content)


def test_a_list_says_what_there_is(path, capsys):
    assert ebt(["checkpoints", "list", f"--workdir={path}"]) == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["step", "saved", "MB", "held-out", "files"]
    assert re.fullmatch(
        r" +2  \d{4}-\d\d-\d\d \d\d:\d\d +\d\.\d +1.2500  verified", first
    )
    assert re.fullmatch(r" +4  \d{4}-\d\d-\d\d \d\d:\d\d +\d\.\d +verified", second)


def test_a_list_says_what_is_wrong(path, capsys):
    (path / "checkpoints" / "2" / manifest.NAME).unlink()
    (path / "checkpoints" / "4" / "config" / "metadata").unlink()
    assert ebt(["checkpoints", "list", f"--workdir={path}"]) == 0
    _, first, second = capsys.readouterr().out.splitlines()
    assert first.split(None, 1) == ["2", manifest.UNFINISHED]
    assert second.endswith("  config/metadata is missing")


def test_verify_names_every_damage_and_exits_with_one(path, capsys):
    assert ebt(["checkpoints", "verify", f"--workdir={path}"]) == 0
    assert capsys.readouterr().out == "checkpoint 2: verified\ncheckpoint 4: verified\n"
    names = ["config/metadata", "state/_METADATA"]
    for name in names:
        flip(path / "checkpoints" / "4" / name)
    assert ebt(["checkpoints", "verify", f"--workdir={path}"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "checkpoint 2: verified",
        *(f"checkpoint 4: {name} has another content than was saved" for name in names),
    ]
    one = ["checkpoints", "verify", f"--workdir={path}", "--checkpoint=2"]
    assert ebt(one) == 0
    assert capsys.readouterr().out == "checkpoint 2: verified\n"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["list"], "--workdir is missing"),
        (
            ["list", "--workdir=DIR", "--out=x.npz"],
            "--out belongs to export and pack, not to list",
        ),
        (
            ["list", "--workdir=DIR", "--checkpoint=3"],
            "has no checkpoint of step 3; it",
        ),
        (["list", "--workdir=NOWHERE"], "holds no run: there is no config.json"),
        (["verify", "--workdir=EMPTY"], "holds no checkpoint yet"),
        (["export", "--workdir=DIR"], "--out is missing"),
        (["export", "--workdir=DIR", "--out=x.txt"], "has to end with .safetensors or"),
        (["export", "--workdir=DIR", "--out=DIR/no/x.npz"], "is not a directory"),
        (["export", "--workdir=DIR", "--out=DIR/x.npz", "--names=my"], "ours or publ"),
        (["copy", "--workdir=DIR"], "one of list, verify, export, pack"),
    ],
)
def test_mistakes_are_one_line(path, toy, tmp_path, capsys, flags, message):
    claim_workdir(tmp_path / "empty", toy.config())
    places = {"DIR": path, "NOWHERE": tmp_path / "no", "EMPTY": tmp_path / "empty"}
    for name, place in places.items():
        flags = [flag.replace(name, str(place)) for flag in flags]
    assert ebt(["checkpoints", *flags]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and message in told and told.count("\n") == 1


def test_a_format_without_its_library(path, tmp_path, capsys, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr("ebt_jax.training.export.importlib.import_module", missing)
    out = tmp_path / "x.safetensors"
    assert ebt(["checkpoints", "export", f"--workdir={path}", f"--out={out}"]) == 2
    assert (
        "needs `pip install 'ebt-jax[torch]'`; or give .npz" in capsys.readouterr().err
    )
    assert not out.exists()
