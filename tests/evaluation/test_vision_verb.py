"""`ebt evaluate` of images and video from end to end, and each of its errors."""

import json
import re

import jax
import numpy as np
import pytest
from encoder_cases import read_case
from PIL import Image

from ebt_jax import cli
from ebt_jax.data import vision_pipeline
from ebt_jax.data.config import DataConfig
from ebt_jax.data.vision_config import VisionConfig
from ebt_jax.diffusion_config import DiffusionConfig
from ebt_jax.models.config import ModelConfig
from ebt_jax.objective_config import RefineSetup
from ebt_jax.training import checkpoint, objective
from ebt_jax.training.config import Config, EvalConfig
from ebt_jax.training.vision_task import resolve_pictures
from ebt_jax.training.workdir import claim_workdir

SMALL = {"num_layers": 1, "num_heads": 1, "dim": 8}
IMAGES = ModelConfig(space="image", patch=4, condition="caption", **SMALL)
NOISED = RefineSetup(num_steps=1, step_size=50.0, initial_candidate="noised")
SCORED = EvalConfig(batch_size=4)


def write_pictures(folder, count, captions):
    """Stripes, bright ones in one folder and dark ones in another."""
    lines = []
    for number in range(count):
        name = f"{('bright', 'dark')[number % 2]}/{number}.png"
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        shade = np.add.outer(np.arange(8) * 8, np.arange(8) * number)
        pixels = (shade % 128 + 127 * (number % 2 == 0)).astype(np.uint8)
        Image.fromarray(pixels).save(file)
        lines.append(json.dumps({"file": name, "caption": f"stripes, number {number}"}))
    if captions:
        (folder / "captions.jsonl").write_text("\n".join(lines))


def start(workdir, config):
    """A run of random parameters."""
    opened = vision_pipeline.open_data(
        config.data, config.vision, config.model.space, "held_out", progress=False
    )
    config = resolve_pictures(config, opened)
    claim_workdir(workdir, config)
    made = objective.build_objective(config)
    params = jax.jit(made.init)(jax.random.key(0))
    return jax.tree.map(lambda x: x + 0.05, params)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of images, of images without captions, and of video; their pictures."""
    path = tmp_path_factory.mktemp("vision")
    write_pictures(path / "captioned", 20, True)
    write_pictures(path / "bare", 4, False)
    vision = VisionConfig(channels=1, caption_features=16)
    images = Config(
        model=IMAGES,
        refine=NOISED,
        diffusion=DiffusionConfig(timesteps=20, noise_level=0.5),
        data=DataConfig(path=str(path / "captioned"), held_out=0.4),
        vision=vision,
        eval=SCORED,
    )
    dit = ModelConfig(space="image", kind="dit", patch=4, **SMALL)
    video = ModelConfig(space="video", kind="transformer_pp", **SMALL)
    clips = DataConfig(path="moving_digits", context=4, held_out=0.005)
    configs = {
        "images": images,
        "dit": Config(
            model=dit,
            diffusion=images.diffusion,
            data=images.data,
            vision=vision,
            eval=SCORED,
        ),
        "video": Config(
            model=video,
            data=clips,
            vision=VisionConfig(size=8, channels=1),
            eval=SCORED,
        ),
    }
    params = {name: start(path / name, config) for name, config in configs.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "pick_step", lambda path, step: 1)
        load = lambda folder, *_: params[folder.name]
        patch.setattr(checkpoint, "load_params", load)
        yield path


def evaluate(capsys, workdir, *flags):
    """Exit code, stdout and stderr."""
    capsys.readouterr()
    code = cli.run(["evaluate", f"--workdir={workdir}", *flags])
    return code, *capsys.readouterr()


def test_images_as_json(capsys, runs):
    flags = ["--noise_levels=0.5,0.25", "--passes=1", "--probe", "--retrieval=3"]
    code, out, err = evaluate(capsys, runs / "images", *flags, "--json")
    assert code == 0, err
    said = json.loads(out)
    assert said["data"].startswith("held-out part of ") and said["sequences"] == 8
    rows = said["denoising"]
    assert [(r["noise_level"], r["what"].split()[0], r["passes"]) for r in rows] == [
        (level, *what)
        for level in (0.5, 0.25)
        for what in (("noised", 0), ("filter", 0), ("ebt", 1))
    ]
    assert rows[2]["psnr"] == pytest.approx(said["psnr"], rel=1e-4)
    assert rows[2]["l1"] == pytest.approx(said["l1"], rel=1e-4)
    assert set(rows[0]) == {
        *("noise_level", "what", "passes", "psnr", "mse", "ssim", "l1")
    }
    for of in ("trained", "untrained"):
        # Two classes, far apart: what is likelier than chance.
        assert said["probe"][of]["top_1"] > 0.5
    found = said["retrieval"]
    assert found["pictures"] == 8 and found["chance"] == pytest.approx(1 / 3)
    assert 0 <= found["low"] <= found["accuracy"] <= found["high"] <= 1
    kept = json.loads((runs / "images" / "vision" / "held_out.json").read_text())
    assert kept == said | {"think": None}


def test_dit_on_other_pictures_as_a_table(capsys, runs):
    arrays, _ = read_case("dinov2_transformers")
    np.savez(runs / "dinov2.npz", **arrays)
    flags = [f"--data={runs / 'bare'}", f"--fid={runs / 'dinov2.npz'}"]
    code, out, err = evaluate(capsys, runs / "dit", *flags)
    assert code == 0, err
    lines = out.splitlines()
    assert f"data                    {runs / 'bare'}" in lines
    words = [line.split() for line in lines]
    assert ["sequences", "4"] in words
    (row,) = [line for line in words if line[:2] == ["0.5", "dit"]]
    assert row[2] == "10"  # passes: one for each timestep that noises
    # The same as the loss's own measure says.
    (own,) = [line for line in words if line[:1] == ["psnr"]]
    assert float(row[3]) == pytest.approx(float(own[1]), abs=0.006)
    assert "Frechet distance to 4 true pictures" in out
    kept = json.loads((runs / "dit" / "vision" / "bare.json").read_text())["fid"]
    assert kept["pictures"] == 4 and kept["noised"] > 0 and kept["predicted"] > 0


def test_video_by_horizon(capsys, runs):
    code, out, err = evaluate(capsys, runs / "video", "--horizons=2", "--json")
    assert code == 0, err
    said = json.loads(out)
    assert said["sequences"] == 10 and said["smooth_l1"] > 0
    assert [row["ahead"] for row in said["horizons"]] == [1, 2]
    for row in said["horizons"]:
        for of in ("model", "copying"):
            assert set(row[of]) == {"mse", "smooth_l1", "psnr"}
    near, far = said["horizons"]
    assert near["copying"]["mse"] < far["copying"]["mse"]


@pytest.mark.parametrize(
    ("run", "flags", "message"),
    [
        ("images", ["--horizons=2"], "--horizons is of video, but the run is of image"),
        ("video", ["--probe"], "--probe is of image, but the run is of video"),
        ("images", ["--packing=concat"], "--packing is of text, but the run is of im"),
        ("video", ["--uncertainty"], "--uncertainty is of text, but the run is of vid"),
        ("images", ["--task=arc", "--data=."], "--task is of text, but the run is of"),
        ("images", ["--passes=1,two"], "--passes has 'two', but takes whole numbers"),
        ("images", ["--passes=0"], "0 passes are asked for"),
        ("images", ["--noise_levels=0.1,x"], "--noise_levels has 'x', but takes num"),
        ("images", ["--noise_levels=2"], "diffusion.noise_level is 2.0"),
        ("images", ["--retrieval=9"], "retrieval among 9 captions.* from 2 to 8"),
        ("images", ["--fid=none.npz"], "none.npz"),
        ("dit", ["--retrieval=2"], "by energy, which a dit does not have"),
        ("dit", ["--passes=15"], "15 passes are asked for"),
        ("dit", ["--think=fixed:steps=2"], "predicts in one pass"),
        ("video", ["--horizons=5"], "5 frames ahead are asked for.* from 1 to 4"),
    ],
)
def test_mistakes(capsys, runs, run, flags, message):
    code, out, err = evaluate(capsys, runs / run, *flags)
    assert code == 2 and not out
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert re.search(message, line), line


def test_captions_and_labels_have_to_be_there(capsys, runs):
    code, _, err = evaluate(capsys, runs / "images", f"--data={runs / 'bare'}")
    assert code == 2 and "the pictures have no captions" in err
    flags = ["--probe", f"--data={runs / 'bare' / 'dark' / '*'}"]
    code, _, err = evaluate(capsys, runs / "dit", *flags)
    assert code == 2 and "--probe needs labels" in err
