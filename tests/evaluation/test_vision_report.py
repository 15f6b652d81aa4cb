"""A report on runs of images and video: their pictures, and what was measured."""

import json
import re

import numpy as np
import pytest

from ebt_jax.evaluation.report.make import make_report
from ebt_jax.evaluation.vision import grids
from ebt_jax.models.config import ModelConfig
from ebt_jax.objective_config import RefineSetup
from ebt_jax.training.config import Config
from ebt_jax.training.resolve import resolve_vision
from ebt_jax.training.workdir import claim_workdir

SMALL = {"num_layers": 1, "num_heads": 1, "dim": 8}
QUALITY = {"psnr": 21.5, "mse": 460.25, "ssim": 0.875, "l1": 0.0625}


def write_run(workdir, config, numbers, **files):
    claim_workdir(workdir, config)
    row = {"step": 3, "seconds": 2.0, "train/loss": 0.5, "train/tokens": 4.0, **numbers}
    (workdir / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (workdir / "summary.json").write_text(json.dumps(row))
    (workdir / "vision").mkdir()
    for name, content in files.items():
        (workdir / "vision" / f"{name}.json").write_text(content)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a run of images and one of video."""
    path = tmp_path_factory.mktemp("report")
    images = Config(
        model=ModelConfig(space="image", patch=4, **SMALL),
        refine=RefineSetup(num_steps=1, initial_candidate="noised"),
    )
    write_run(
        path / "images",
        resolve_vision(images, image_shape=(8, 8, 1)),
        {
            **{"eval/smooth_l1": 0.0125, "eval/psnr": 21.5, "images_per_second": 7.0},
            **{f"thinking/smooth_l1/step_{i}": 0.25 / i for i in (1, 2, 3)},
        },
        held_out=json.dumps(
            {
                "denoising": [
                    {"noise_level": 0.5, "what": what, "passes": passes, **QUALITY}
                    for what, passes in (("filter 0.40", 0), ("ebt", 1), ("ebt", 3))
                ],
                "probe": {"trained": {"top_1": 0.625, "neighbours": 0.5}},
                "retrieval": {"accuracy": 0.75, "chance": 0.25},
            }
        ),
        broken="{",
    )
    pictures = {"clean": np.zeros((1, 8, 8, 3), np.uint8)}
    grids.write_grid(path / "images" / "samples.png", pictures)
    grids.write_grid(path / "images" / "energy_map.png", pictures)
    video = ModelConfig(space="video", kind="transformer_pp", **SMALL)
    error = {"mse": 0.5, "smooth_l1": 0.25, "psnr": 9.5}
    write_run(
        path / "video",
        resolve_vision(Config(model=video), frame_size=16),
        {"eval/smooth_l1": 0.125, "frames_per_second": 8.0},
        held_out=json.dumps(
            {"horizons": [{"ahead": 1, "model": error, "copying": error}]}
        ),
    )
    frames = {"true": np.zeros((1, 3, 8, 8, 3), np.uint8)}
    grids.write_gif(path / "video" / "samples.gif", frames, given=1, frame_seconds=0.1)
    file = make_report([path / "images", path / "video"], path / "report.html")
    return file.read_text()


def words(page):
    return " ".join(re.sub(r"<[^>]*>", " ", page).split())


def test_pictures_are_in_the_page(page):
    urls = re.findall(r'<img src="data:image/(\w+);base64,([^"]+)"', page)
    assert [kind for kind, _ in urls] == ["png", "png", "gif"]
    assert "Energies of the patches" in page


def test_what_was_measured_is_in_tables(page):
    said = words(page)
    assert "0.5 ebt 3 21.5 460.2 0.875 0.0625" in said
    assert "trained 0.625 0.5" in said
    assert "accuracy chance 0.75 0.25" in said
    assert "1 9.5 0.5 0.25 9.5 0.5 0.25" in said
    assert "vision/broken.json cannot be read" in said


def test_results_and_curves_are_of_images_and_frames(page):
    said = words(page)
    assert "held-out smooth L1 0.0125 0.125" in said and "PSNR, dB 21.5" in said
    assert "images or frames trained on 12 12" in said
    assert "images or frames per second, median 7 8" in said
    assert "nats per token" not in said.split("Settings")[0]
    numbers = json.loads(re.search(r"<script[^>]*json[^>]*>(.*?)</script>", page)[1])
    learning, thinking = (numbers["charts"][n] for n in ("learning", "thinking"))
    assert learning["y"] == "smooth L1" and len(learning["series"]) == 4
    assert thinking["series"][0]["y"] == pytest.approx([0.25, 0.125, 0.083333])
    assert thinking["series"][1]["y"] == 0.125
    assert "Token by token" not in said


def test_passes_and_horizons_are_drawn(page):
    numbers = json.loads(re.search(r"<script[^>]*json[^>]*>(.*?)</script>", page)[1])
    level, curve = numbers["charts"]["passes"]["series"]
    assert level["label"] == "filter 0.40: held_out, noise 0.5" and level["y"] == 21.5
    assert curve["x"]["passes"] == [1, 3] and curve["y"] == [21.5, 21.5]
    model, copying = numbers["charts"]["horizons"]["series"]
    assert model["label"] == "video: held_out" and model["y"] == [0.25]
    assert copying["label"].startswith("copying: ") and copying["run"] == 1
    assert 'data-chart="passes"' in page and 'data-chart="horizons"' in page
