"""The trained models that lie in the repository: small, sound, and described."""

import json
import re
from pathlib import Path

import jax
import pytest

from ebt_jax.cli import run as ebt
from ebt_jax.training import checkpoint, packed
from ebt_jax.training.objective import build_objective

FOLDER = Path(__file__).parents[1] / "experiments" / "trained"
FILES = {file.stem: file for file in sorted(FOLDER.glob("*.npz"))}
ONE_MB, ALL_MB = 5, 20


def test_all_together_are_small():
    assert FILES
    assert sum(file.stat().st_size for file in FILES.values()) < ALL_MB * 1e6


@pytest.mark.parametrize("name", FILES)
def test_a_model_fits_its_config(name):
    file = FILES[name]
    assert file.stat().st_size < ONE_MB * 1e6
    found = packed.read(file)
    shapes = jax.eval_shape(build_objective(found.config).init, jax.random.key(0))
    checkpoint.check_fit(file, found.step, shapes)
    assert found.step == found.config.train.steps and found.note


@pytest.mark.parametrize("name", FILES)
def test_a_model_tells_of_no_machine(name):
    found = packed.read(FILES[name])
    paths = [found.config.data.path, found.config.data.held_out_path, *found.files]
    assert not [path for path in paths if "/" in path or "\\" in path]


@pytest.mark.parametrize("name", FILES)
def test_a_card_has_the_numbers_of_the_file(name):
    """Held-out numbers in the table are those in the file, to the digits shown."""
    found, text = packed.read(FILES[name]), (FOLDER / "README.md").read_text()
    (row,) = re.findall(rf"^\| `{re.escape(FILES[name].name)}` .*$", text, re.M)
    forms = {"eval/psnr": "{:.2f} dB", "eval/solved": "{:.1%}", "eval/nll": "{:.2f}"}
    key = next(name for name in forms if name in found.results)
    assert f" {forms[key].format(found.results[key])}" in row
    size = FILES[name].stat().st_size / 1e6
    assert f" {size:.2f} MB" in row


def of_space(space):
    return [n for n, f in FILES.items() if packed.read(f).config.model.space == space]


@pytest.mark.parametrize("name", of_space("text"))
def test_text_goes_on(name, capsys):
    """As a new user would, with nothing trained."""
    argv = [f"--workdir={FILES[name]}", "--prompt=The value of", "--new=8", "--json"]
    assert ebt(["generate", *argv]) == 0
    made = json.loads(capsys.readouterr().out)
    assert len(made["tokens"]) == 8 and made["refinement_steps"] >= 1


@pytest.mark.parametrize("name", of_space("image"))
def test_images_are_denoised(name, capsys):
    pytest.importorskip("sklearn")
    argv = [f"--workdir={FILES[name]}", "--sequences=8", "--passes=1", "--json"]
    assert ebt(["evaluate", *argv]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["psnr"] > 15 and scored["sequences"] == 8
