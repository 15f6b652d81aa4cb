"""Every experiment file resolves, is learnable in small, and says what it does."""

import json
import pathlib
import re
import runpy

import jax
import pytest

from ebt_jax import cli
from ebt_jax.command import load_config
from ebt_jax.errors import UserError
from ebt_jax.models.config import SIZES
from ebt_jax.training import checkpoint
from ebt_jax.training.config import differences, from_config_dict
from ebt_jax.training.presets import KEYS

FILES = [  # those that have configs of their own
    path
    for path in sorted((pathlib.Path(__file__).parent.parent / "experiments").glob("*"))
    if path.suffix == ".py" and "def get_config(" in path.read_text()
]
TEXT = next(path for path in FILES if path.stem == "text")
QUICK = (
    "--steps=2",
    "--config.eval.curve_steps=0",
    "--config.eval.sample_tokens=0",
    "--config.mesh.data=4",  # eight could not replay half of their one sequence
)
QUICKER = (
    "--config.model.unroll=0",
    "--config.model.num_layers=1",
    "--config.log.plots=False",
    "--config.log.tensorboard=False",
)
METHODS = ("s1", "s2", "anchored", "final", "light", "transformer_pp")


def text(words: str):
    return from_config_dict(load_config(f"{TEXT}:{words}"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_resolve_document_themselves_and_sweep(path):
    names = runpy.run_path(str(path))
    assert "ebt train --config=experiments/" in names["__doc__"]
    from_config_dict(names["get_config"]())
    runs = [{"verb": "train", **run} for run in names["sweep"]()]
    assert len({(run["verb"], run["workdir"]) for run in runs}) == len(runs)
    for run in runs:
        verb = run.pop("verb")
        argv = [verb, *(f"--{name}={value}" for name, value in run.items())]
        values = cli.parse(cli.VERBS[verb], argv)
        if verb == "train":
            from_config_dict(values.config)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("setting", ["", "quickstart", "fidelity", "tiny"])
def test_methods_combine_with_settings_and_sizes(method, setting):
    for size in SIZES:
        config = text(f"{method},{setting},size={size}")
        assert config.model.size == size
        assert config.model.kind == (method if method == "transformer_pp" else "ebt")
        inputs = {"anchored": "anchored", "final": "final", "light": "final"}
        given = inputs[method] if method in inputs else "embedding"
        assert config.model.candidate_input == given
        assert (config.model.candidate_layers == 1) == (method == "light")


def test_published_settings():
    s1, s2 = text("s1,size=xxs"), text("s2,size=xxs")
    assert s1 == text("")
    assert (s1.refine.step_size, s1.optim.step_size_lr_multiplier) == (500.0, 1500.0)
    assert (s1.refine.num_steps, s1.refine.num_landscapes) == (2, 2)
    assert s1.model.conditioning == "time_embed"
    assert s1.optim.peak_lr == 1.2e-3
    assert (s1.train.batch_size, s1.data.context) == (256, 256)
    assert (s2.refine.min_steps, s2.refine.num_steps, s2.refine.noise_std) == (
        2,
        3,
        3.0,
    )
    assert (s2.refine.backprop, s2.objective.loss_steps) == ("truncated", "last")
    assert not s2.refine.step_size_learnable
    assert (s2.replay.capacity, s2.replay.fraction, s2.replay.top_k) == (192, 0.5, 0)
    assert s2.replay.dtype == "float32" and not s1.replay.capacity


def test_each_technique_of_system_2_can_be_left_out():
    whole = text("s2")
    left_out = {
        "no_replay": {"replay.capacity": (192, 0)},
        "no_langevin": {"refine.noise_std": (3.0, 0.0)},
        "no_random_step_size": {"refine.step_size_jitter": (2.0, 1.0)},
        "no_random_steps": {"refine.min_steps": (2, 0)},
    }
    together = {
        key: value for change in left_out.values() for key, value in change.items()
    }
    for word, change in left_out.items():
        assert differences(whole, text(f"s2,{word}")) == change
    assert differences(whole, text(",".join(["s2", *left_out]))) == together


def test_muon_goes_with_every_method():
    plain = text("light,fidelity")
    assert differences(plain, text("light,fidelity,muon")) == {
        "optim.name": ("adamw", "muon"),
        "optim.peak_lr": (2.4e-3, 8 * 2.4e-3),
    }
    assert text("transformer_pp,muon").optim.name == "muon"


def test_the_quickstart_is_the_recipe_that_is_worth_choosing():
    assert text("quickstart") == text("quickstart,light,muon")
    assert text("quickstart") == text("quickstart,muon")
    assert text("quickstart,anchored").optim.name == "adamw"


def test_a_step_size_brings_its_learning_rate():
    config = text("s1,step_size=5")
    assert (config.refine.step_size, config.optim.step_size_lr_multiplier) == (
        5.0,
        15.0,
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_docstring_names_every_word(path):
    names = runpy.run_path(str(path))
    listed = names["__doc__"].split("Words,")[1].split("Measured")[0]
    words = re.findall(r"^    (\w+)(?:=\w+)?  ", listed, re.MULTILINE)
    known = (*names["METHODS"], *names["OPTIONS"], *names["SETTINGS"], *KEYS)
    assert sorted(words) == sorted(known)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("image_denoise.py:s1", (3000.0, 9000.0, 1, "per_step", "noised", 1e-4)),
        ("image_denoise.py:s2", (3000.0, None, 3, "truncated", "noised", 1e-4)),
        ("text_to_image.py:s1", (3000.0, 9000.0, 2, "per_step", "noise", 1e-4)),
        ("text_to_image.py:s2", (3000.0, None, 4, "truncated", "noise", 1e-4)),
        ("video.py:s1", (30000.0, 90000.0, 2, "per_step", "noise", 4e-4)),
        ("video.py:s2", (3000.0, None, 3, "truncated", "noise", 4e-4)),
        ("video.py:most_recent", (3e4, 9e4, 2, "per_step", "most_recent", 4e-4)),
    ],
)
def test_published_settings_of_images_and_video(preset, expected):
    config = from_config_dict(load_config(str(TEXT.parent / preset)))
    refine, optim = config.refine, config.optim
    step_size, multiplier, steps, backprop, start, rate = expected
    assert (refine.step_size, refine.num_steps) == (step_size, steps)
    assert refine.step_size_learnable == (multiplier is not None)
    assert multiplier in (None, optim.step_size_lr_multiplier)
    assert (refine.backprop, refine.initial_candidate) == (backprop, start)
    assert optim.peak_lr == pytest.approx(rate)


def test_baselines_of_images_and_video():
    for preset, kind in (
        ("image_denoise.py:dit", "dit"),
        ("text_to_image.py:dit,size=xs", "dit"),
        ("video.py:transformer_pp", "transformer_pp"),
    ):
        config = from_config_dict(load_config(str(TEXT.parent / preset)))
        assert config.model.kind == kind
        assert config.optim.weight_decay == (0.0 if kind == "dit" else 0.01)
    with pytest.raises(UserError, match="transformer_pp has none; leave out 'most_re"):
        load_config(f"{TEXT.parent / 'video.py'}:transformer_pp,most_recent")


@pytest.mark.parametrize(
    "preset",
    [
        "image_denoise.py:tiny",
        "image_denoise.py:tiny,s2",
        "image_denoise.py:tiny,dit",
        "text_to_image.py:tiny,s2",
        "text_to_image.py:tiny,dit",
        "video.py:tiny",
        "video.py:tiny,s2,most_recent",
        "video.py:tiny,transformer_pp",
    ],
)
def test_tiny_pictures_train_evaluate_and_write(preset, tmp_path, capsys):
    workdir = f"--workdir={tmp_path / 'run'}"
    config = f"--config={TEXT.parent / preset}"
    mesh = "--config.mesh.data=4"
    curve = "--config.eval.curve_steps=0"
    argv = ["train", config, workdir, "--steps=2", mesh, curve, *QUICKER]
    assert cli.run(argv) == 0
    said = capsys.readouterr().err
    assert "held-out smooth L1" in said and "samples" in said
    assert (tmp_path / "run" / "samples.png").stat().st_size > 1000
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    row = json.loads(rows[-1])
    assert row["step"] == 2 and {"eval/smooth_l1", "eval/mse", "eval/psnr"} < set(row)
    assert "eval/perplexity" not in row


def test_algorithmic_text_takes_the_methods_of_text():
    path = TEXT.parent / "algorithmic.py"

    def config(words: str):
        return from_config_dict(load_config(f"{path}:{words}"))

    s2 = config("dyck,anchored_s2")
    assert (s2.refine.min_steps, s2.refine.num_steps) == (1, 3)
    assert (s2.refine.backprop, s2.objective.loss_steps) == ("truncated", "last")
    assert s2.refine.step_size_jitter == 2 and not s2.refine.noise_std
    assert s2.model == config("anchored").model and not s2.replay.capacity
    assert config("").refine.num_steps == 1
    assert config("s2").replay.capacity == 6 * config("s2").train.batch_size
    assert config("transformer_pp,size=3xs").optim.peak_lr == 1.8e-3
    with pytest.raises(UserError, match="names both 'dyck' and 'arithmetic'"):
        config("dyck,arithmetic")
    runs = runpy.run_path(str(path))["sweep"]("dyck")
    assert {run["task"] for run in runs if "verb" in run} == {"dyck,dyck_far"}
    assert len(runs) == 2 * 3 * 3


def test_from_system_1_to_system_2_by_the_commands_of_the_docstring(tmp_path):
    doc = runpy.run_path(str(TEXT))["__doc__"]
    recipe = doc.split("From System 1 to System 2")[1].split("Measured")[0]
    commands = recipe.split("    ebt ")[1:]
    assert len(commands) == 2
    for command in commands:
        command = command.replace("experiments/text.py:", f"{TEXT}:tiny,")
        argv = command.replace("=runs/", f"={tmp_path}/").split()
        assert cli.run([*argv, *QUICK, *QUICKER]) == 0
    lines = (tmp_path / "s2" / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line) for line in lines)
    assert (first["train/step_size"], first["train/noise_std"]) == (5.0, 3.0)
    assert first["train/replayed"] == 0 and second["train/replayed"] > 0.2
    begun = checkpoint.restore_params(tmp_path / "s1")
    after = checkpoint.restore_params(tmp_path / "s2")
    change = jax.tree.map(lambda a, b: float(abs(a - b).max()), begun, after)
    assert 0 < max(jax.tree.leaves(change["blocks"])) < 0.02  # of two small updates


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("quikstart", "'quikstart' is unknown; did you mean 'quickstart'"),
        ("s1,s2", "names both 's1' and 's2'"),
        ("tiny,fidelity", "names both 'tiny' and 'fidelity'"),
        ("s1,no_replay", "leaves something out of s2 \\('no_replay'\\), but is 's1'"),
        ("size=huge", "size 'huge' is not one of 4xs"),
        ("sizes=xs", "'sizes=xs' is unknown; did you mean 'size'"),
        ("step_size=big", "'step_size=big': could not convert"),
        ("step_size=0", "step_size is 0.0"),
    ],
)
def test_errors(words, message):
    with pytest.raises(ValueError, match=message) as caught:
        text(words)
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize("method", METHODS)
def test_tiny_runs_train_evaluate_and_write(method, tmp_path, capsys):
    workdir = f"--workdir={tmp_path / 'run'}"
    config = f"--config={TEXT}:tiny,{method}"
    assert cli.run(["train", config, workdir, *QUICK]) == 0
    assert cli.run(["evaluate", workdir]) == 0
    assert "perplexity" in capsys.readouterr().out
    assert cli.run(["generate", workdir, "--prompt=The", "--new=3"]) == 0
    assert capsys.readouterr().out.startswith("The")


@pytest.mark.parametrize("preset", ["image_denoise.py:tiny,dit", "video.py:tiny,s2"])
def test_runs_of_pictures_continue_as_if_never_stopped(preset, tmp_path):
    path = tmp_path / "run"
    flags = (f"--config={TEXT.parent / preset}", f"--workdir={path}")
    argv = ["train", *flags, "--config.eval.sample_tokens=0", "--config.mesh.data=4"]
    argv += ["--config.eval.curve_steps=0", *QUICKER]
    assert cli.run(argv) == 0
    straight = checkpoint.restore_params(path)
    for file in ("summary.json", "checkpoints/4/_CHECKPOINT_METADATA"):
        (path / file).unlink()  # as if killed before the last save was over
    assert cli.run(argv) == 0
    assert (path / "damaged").is_dir()
    again = checkpoint.restore_params(path)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), straight, again)
    assert all(jax.tree.leaves(same))
