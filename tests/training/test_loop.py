import json
import shutil

import jax
import numpy as np
import optax
import pytest

from ebt_jax.data.config import DataConfig
from ebt_jax.errors import UserError
from ebt_jax.models.config import ModelConfig
from ebt_jax.training import checkpoint
from ebt_jax.training.config import (
    Config,
    EvalConfig,
    LogConfig,
    MeshConfig,
    TrainConfig,
)
from ebt_jax.training.loop import fit, train
from ebt_jax.training.opening import enable_compilation_cache
from ebt_jax.training.task import show_text
from ebt_jax.training.workdir import read_config

EXTRAS = {"curve_steps": 3, "sample_tokens": 6}
TIMING = ("seconds", "tokens_per_second", "seconds/input", "seconds/step")
TIMING += ("seconds/checkpoint",)


def run(toy, path, fake=None, batches=None, noise=0.3, **sections):
    config = toy.config(**sections)
    fake = fake or toy.bigram(noise=noise)
    batches = batches or toy.training_batches(config.train.batch_size)
    held_out = toy.held_out_batches()
    return fit(
        config,
        path,
        fake.objective,
        show_text(config, toy.tokenizer),
        batches,
        held_out,
    )


def metrics(path):
    """The lines of metrics.jsonl without their timing."""
    rows = [
        json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()
    ]
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows]


def table(path, toy, monkeypatch):
    objective = toy.bigram().objective
    monkeypatch.setattr(checkpoint, "build_objective", lambda config: objective)
    return np.asarray(checkpoint.restore_params(path)["table"])


class Interrupted:
    """Batches that are cut off, as by a signal, before batch `after + 1` is read."""

    def __init__(self, batches, after):
        self.batches, self.left = batches, after
        self.seek = batches.seek

    @property
    def next_example(self):
        return self.batches.next_example

    def __next__(self):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return next(self.batches)


@pytest.fixture(scope="module")
def straight(toy, tmp_path_factory):
    """Workdir, result and number of loss traces of an uninterrupted run."""
    path = tmp_path_factory.mktemp("straight") / "run"
    fake = toy.bigram(noise=0.3)
    return path, run(toy, path, fake=fake, eval=EXTRAS), len(fake.traces)


def test_a_run_leaves_what_it_says(straight, toy):
    path, result, traces = straight
    assert traces == 1  # compiled once
    rows = metrics(path)
    assert [row["step"] for row in rows] == [1, 2, 4, 5, 6, 8, 10, 12]
    assert [row["step"] for row in rows if "eval/nll" in row] == [5, 10, 12]
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    for name in ("train/nll", "train/gradient_norm", "train/learning_rate/weights"):
        assert name in rows[0]
    summary = json.loads((path / "summary.json").read_text())
    assert summary.pop("step") == 12 and summary == result
    for name in ("thinking/nll/step_1", "thinking/nll/step_3", "eval/energy_gap"):
        assert name in result
    sample = (path / "sample.txt").read_text()
    assert len(sample) == toy.context // 4 + 6 + 1
    assert checkpoint.latest_step(path) == 12


@pytest.mark.parametrize("after", [3, 7])
def test_interrupted_and_continued_equals_uninterrupted(
    straight, toy, tmp_path, monkeypatch, after
):
    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(toy, path, batches=Interrupted(toy.training_batches(8), after))
    # At 3 there is no checkpoint yet: the run starts from scratch again.
    assert checkpoint.latest_step(path) == (5 if after == 7 else None)
    leave_behind(path)
    result = run(toy, path, eval=EXTRAS)
    assert metrics(path) == metrics(straight[0])
    timeless = lambda numbers: {k: v for k, v in numbers.items() if k not in TIMING}
    assert timeless(result) == timeless(straight[1])
    here = table(path, toy, monkeypatch)
    np.testing.assert_array_equal(here, table(straight[0], toy, monkeypatch))
    assert not list((path / "checkpoints").glob("*tmp*"))


def leave_behind(path):
    """What a kill in the middle of a save and of a line leaves behind."""
    half = path / "checkpoints" / "10.orbax-checkpoint-tmp" / "state"
    half.mkdir(parents=True)
    (half / "_METADATA").write_text("{")
    with (path / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 8, "train/lo')


def test_the_lowest_held_out_loss_is_kept(straight):
    path, _, _ = straight
    losses = {r["step"]: r["eval/nll"] for r in metrics(path) if "eval/nll" in r}
    summary = json.loads((path / "summary.json").read_text())
    assert summary["lowest/nll"] == min(losses.values())
    assert losses[summary["lowest/step"]] == summary["lowest/nll"]


def test_a_finished_run_says_so(straight, toy, capsys):
    path, result, _ = straight
    fake = toy.bigram()
    assert run(toy, path, fake=fake) == result
    assert not fake.traces
    assert "has made all of its 12 steps" in capsys.readouterr().err


def test_a_run_killed_at_its_very_end_is_closed_later(straight, toy, tmp_path):
    path = shutil.copytree(straight[0], tmp_path / "run")
    (path / "summary.json").unlink()
    fake = toy.bigram()
    result = run(toy, path, fake=fake, eval=EXTRAS, log={"plots": True})
    assert not fake.traces and result["eval/nll"] == straight[1]["eval/nll"]
    assert metrics(path) == metrics(straight[0])
    for name in ("learning_curve.png", "thinking_curve.png", "summary.json"):
        assert (path / name).stat().st_size


def test_a_run_goes_on_for_longer(straight, toy, tmp_path):
    path = shutil.copytree(straight[0], tmp_path / "run")
    run(toy, path, train={"steps": 14}, optim={"schedule_steps": 12})
    assert [row["step"] for row in metrics(path)][-2:] == [12, 14]
    config = json.loads((path / "config.json").read_text())
    assert config["train"]["steps"] == 14
    assert checkpoint.latest_step(path) == 14


def test_data_that_ends(toy, tmp_path):
    batches = toy.training_batches(8, rows=30, repeat=False)
    message = "data ends after 3 steps, but train.steps is 12; set data.repeat=True"
    with pytest.raises(UserError, match=message):
        run(toy, tmp_path / "run", batches=batches)


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"mesh": {"data": 64}}, "takes 64 devices, but there are 8"),
        ({"train": {"batch_size": 9}}, "train.batch_size is 9"),
        ({"log": {"wandb_project": "p"}}, "wandb"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(
    toy, tmp_path, sections, message, monkeypatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=message):
        run(toy, tmp_path / "run", **sections)
    assert not list(tmp_path.iterdir())


def test_another_config_leaves_a_run_alone(straight, toy):
    before = (straight[0] / "config.json").read_text()
    with pytest.raises(UserError, match="train.seed is 0 there and 1 here"):
        run(toy, straight[0], train={"seed": 1})
    assert (straight[0] / "config.json").read_text() == before


@pytest.mark.parametrize("given", ["nowhere", "directory", "file"])
def test_compilation_cache(tmp_path, monkeypatch, given):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if given == "file":  # in the way: no cache, and no failure
        (tmp_path / "cache").write_text("")
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        if given == "directory":
            jax.config.update("jax_compilation_cache_dir", "elsewhere")
        enable_compilation_cache()
        expected = {
            "nowhere": str(tmp_path / "cache/ebt_jax"),
            "directory": "elsewhere",
        }
        found = jax.config.values["jax_compilation_cache_dir"]
        assert found == (expected[given] if given in expected else None)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_train_with_the_real_pieces(tmp_path):
    text = "".join(f"{n} and {n + 1} make {2 * n + 1}.\n" for n in range(300))
    (tmp_path / "text.txt").write_text(text)
    config = Config(
        model=ModelConfig(kind="transformer_pp", num_layers=1, num_heads=2, dim=8),
        mesh=MeshConfig(data=1),
        data=DataConfig(path=str(tmp_path / "text.txt"), context=16),
        train=TrainConfig(steps=4, batch_size=8),
        eval=EvalConfig(
            every=2, sequences=8, batch_size=8, curve_steps=4, sample_tokens=2
        ),
        log=LogConfig(every=1, plots=False, compilation_cache=False),
    )
    workdir = tmp_path / "run"
    result = train(config, str(workdir))
    assert result["eval/tokens"] == 8 * 16 and "eval/bits_per_byte" in result
    assert [row["step"] for row in metrics(workdir)] == [1, 2, 3, 4]
    resolved = read_config(workdir)
    assert resolved.model.vocab_size == 256 and resolved.optim.schedule_steps == 4
    params = checkpoint.restore_params(workdir)
    norm = np.float32(result["train/parameter_norm"])
    np.testing.assert_allclose(optax.tree.norm(params), norm, rtol=1e-6)
    # A forward pass has neither energies nor a step size.
    assert not any("energy" in name or "step_size" in name for name in result)


def test_a_workdir_that_cannot_be_is_the_first_thing_said(tmp_path):
    (tmp_path / "file").write_text("")
    config = Config(
        data=DataConfig(path="nowhere", tokenizer="nobody"), mesh=MeshConfig(data=64)
    )
    with pytest.raises(UserError, match="is not a directory"):
        train(config, str(tmp_path / "file" / "run"))
