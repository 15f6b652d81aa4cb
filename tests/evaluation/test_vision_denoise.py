"""Tables and pictures of denoising, with models that take a moment."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ebt_jax import models
from ebt_jax.diffusion_config import DiffusionConfig
from ebt_jax.diffusion_objective import denoising
from ebt_jax.errors import UserError
from ebt_jax.evaluation.vision import denoise, measures, samples
from ebt_jax.models.config import ModelConfig
from ebt_jax.objective_config import ObjectiveConfig, RefineSetup
from ebt_jax.objectives import refined

EBT = ModelConfig(
    space="image",
    num_layers=1,
    num_heads=2,
    dim=16,
    image_size=8,
    channels=1,
    patch=4,
    num_landscapes=1,
)
DIT = dataclasses.replace(EBT, kind="dit")
DIFFUSION = DiffusionConfig(timesteps=20, noise_level=0.5)
SETUP = RefineSetup(num_steps=1, step_size=100.0, initial_candidate="noised")


def build(model, diffusion):
    built = models.build(model, diffusion)
    if model.kind == "dit":
        return denoising(built, diffusion)
    return refined(built, SETUP, ObjectiveConfig())


def batches(count, size=5, side=8):
    """Waves, as last batch one of weight 0 that is no picture at all."""
    y, x = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    for first in range(0, count, size):
        phase = np.arange(first, first + size)[:, None, None]
        weights = (phase[:, 0, 0] < count).astype(np.float32)
        image = np.sin(0.5 * x + 0.2 * y + phase).astype(np.float32)
        image = np.where(weights[:, None, None] > 0, image, np.nan)
        index = np.arange(first, first + size, dtype=np.int32)
        yield {"image": image[..., None], "weights": weights, "index": index}


class Again:
    """The same batches, as often as wanted."""

    def __init__(self, count, size=5):
        self.count, self.size = count, size

    def __iter__(self):
        return batches(self.count, self.size)


def pictures(values):
    grey = np.clip(np.round((np.asarray(values) + 1) * 127.5), 0, 255).astype(np.uint8)
    return np.repeat(grey, 3, axis=-1)


@functools.cache
def params_of(model):
    """Parameters of which none is 0, so that there is something to predict."""
    drawn = jax.jit(build(model, DIFFUSION).init)(jax.random.key(0))
    leaves, tree = jax.tree.flatten(drawn)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [
        leaf + 0.05 * jax.random.normal(key, jnp.shape(leaf))
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return tree.unflatten(moved)


def rows(model, count=7, size=5, levels=(0.5,), passes=(1,), pixels=None):
    return denoise.denoising_rows(
        model,
        DIFFUSION,
        functools.partial(build, model),
        params_of(model),
        Again(count, size),
        Again(6, 6),
        levels=levels,
        passes=passes,
        pixels=pixels,
        seed=3,
    )


@pytest.fixture(scope="module")
def ebt_rows():
    return rows(EBT, levels=(0.25, 0.5), passes=(1, 2))


def test_rows_of_every_level_and_number_of_passes(ebt_rows):
    named = [(row.noise_level, row.what.split()[0], row.passes) for row in ebt_rows]
    each = [("noised", 0), ("filter", 0), ("ebt", 1), ("ebt", 2)]
    assert named == [(level, *what) for level in (0.25, 0.5) for what in each]
    slight, strong = ebt_rows[:4], ebt_rows[4:]
    for better, worse in zip(slight[:2], strong[:2], strict=True):
        assert better.quality["psnr"] > worse.quality["psnr"] + 1
    assert strong[1].quality["psnr"] > strong[0].quality["psnr"] + 1  # the filter helps
    assert float(slight[1].what.split()[1]) <= float(strong[1].what.split()[1])


def test_rows_are_what_evaluation_says(ebt_rows):
    """The same noise, the same steps; and whatever the batch size."""
    objective = build(EBT, DIFFUSION)
    (batch,) = batches(7, 7)
    found = jax.jit(objective.evaluate, static_argnums=3)(
        params_of(EBT), batch, jax.random.key(3), 2
    )
    for step, row in enumerate(ebt_rows[6:]):
        mse, l1 = (float(found[name][step].mean()) for name in ("mse", "l1"))
        assert row.quality["mse"] == pytest.approx(measures.in_255(mse), rel=1e-4)
        assert row.quality["psnr"] == pytest.approx(measures.psnr(mse), rel=1e-4)
        assert row.quality["l1"] == pytest.approx(l1, rel=1e-4)


def test_dit_takes_passes_by_spacing_and_by_applying_itself_again():
    found = rows(DIT, count=3, passes=(2, 20))
    assert [row.passes for row in found] == [0, 0, 2, 20]
    spaced = denoise.passing(DIT, DIFFUSION, 2)
    assert (spaced.sampling_steps, spaced.repeats) == (2, 1)
    twice = denoise.passing(DIT, DIFFUSION, 20)
    assert (twice.sampling_steps, twice.repeats) == (0, 2)
    assert found[2].quality["psnr"] != found[3].quality["psnr"]
    assert denoise.trained_passes(DIT, twice, 1) == 20
    assert denoise.trained_passes(EBT, twice, 3) == 3


def test_what_cannot_be_asked_for_is_said_first():
    never = iter([{}])  # nothing is read
    for model, asked, message in (
        (DIT, {"passes": (15,)}, "15 passes are asked for.* 10 timesteps"),
        (EBT, {"passes": (0,)}, "0 passes are asked for"),
        (EBT, {"levels": (1.5,)}, "diffusion.noise_level is 1.5"),
    ):
        with pytest.raises(UserError, match=message):
            denoise.denoising_rows(
                model,
                DIFFUSION,
                functools.partial(build, model),
                {},
                never,
                never,
                **{"levels": (0.5,), "passes": (1,), **asked},
                pixels=None,
                seed=0,
            )
    assert list(never) == [{}]
    with pytest.raises(UserError, match="no picture to score"):
        measures.mean_quality({})


def test_pictures_of_latents_are_compared_after_decoding(ebt_rows):
    halved = rows(EBT, passes=(), pixels=lambda values: values / 2)
    assert [row.what for row in halved] == ["noised"]  # filters are of pixels
    gain = halved[0].quality["psnr"] - ebt_rows[4].quality["psnr"]
    assert gain == pytest.approx(20 * np.log10(2), abs=1e-3)


def test_a_table_for_people(ebt_rows):
    lines = denoise.table(ebt_rows).splitlines()
    assert lines[0].split() == "noise what passes PSNR dB MSE 0-255 SSIM L1".split()
    assert len(lines) == 1 + len(ebt_rows)
    assert lines[-1].split()[:3] == ["0.5", "ebt", "2"]
    assert lines[-1].split()[3] == f"{ebt_rows[-1].quality['psnr']:.2f}"


@pytest.mark.parametrize("model", [EBT, DIT])
def test_samples_lie_in_the_workdir(tmp_path, model):
    (batch,) = batches(3, 4)  # the fourth is no picture
    written = samples.write_image_samples(
        tmp_path,
        model,
        DIFFUSION,
        build(model, DIFFUSION),
        params_of(model),
        batch,
        pictures,
        steps=(1,),
        seed=3,
        captions=["a wave", "a second wave"],
    )
    names = ["samples.png", "energy_map.png"][: 2 if model is EBT else 1]
    assert [path.name for path in written] == names
    for path in written:
        with Image.open(path) as image:
            assert image.width > 3 * 96 and 300 < image.height < 400
