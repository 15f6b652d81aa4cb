"""Continued clips and retrieved captions, with fakes whose answers are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ebt_jax import models
from ebt_jax.errors import UserError
from ebt_jax.evaluation.vision import horizons, retrieval, samples
from ebt_jax.interfaces import EnergyModel
from ebt_jax.models.config import ModelConfig
from ebt_jax.objective_config import ObjectiveConfig
from ebt_jax.objectives import feed_forward

SIDE, FRAMES = 2, 6  # frames of 2 x 2 grey pixels, clips of 6 of them


def decode(frames):
    """Grey pictures of frames."""
    pixels = np.clip(np.round((np.asarray(frames) + 1) * 127.5), 0, 255)
    pixels = pixels.astype(np.uint8).reshape(*frames.shape[:-1], SIDE, SIDE, 1)
    return np.repeat(pixels, 3, axis=-1)


def clip_batches(clips=5, size=3):
    """Clips that grow brighter at a pace of their own; the last batch is filled up."""
    for first in range(0, clips, size):
        index = np.arange(first, first + size)
        pace = 0.02 * (1 + index[:, None, None])
        time = np.arange(FRAMES)[None, :, None]
        shade = np.array([0.0, 0.1, 0.2, 0.3])
        frames = (pace * time + shade - 0.5).astype(np.float32)
        counts = (index < clips).astype(np.float32)
        yield {
            "frames": frames[:, :-1],
            "targets": frames[:, 1:],
            "weights": np.repeat(counts[:, None], FRAMES - 1, axis=1),
            "index": index.astype(np.int32),
        }


@pytest.fixture(scope="module")
def video():
    """A Transformer++ whose frames are not zero."""
    config = ModelConfig(
        space="video",
        kind="transformer_pp",
        num_layers=1,
        num_heads=2,
        dim=16,
        frame_size=SIDE * SIDE,
    )
    objective = feed_forward(models.build(config), ObjectiveConfig())
    return objective, jax.jit(objective.init)(jax.random.key(0))


def predicted(objective, params, ahead):
    """Continuations of all clips, by predicting whole clips again and again."""
    (batch,) = clip_batches(5, 5)
    clips = horizons.whole_clips(batch)
    predict = jax.jit(objective.predict, static_argnums=3)
    made = clips[:, : FRAMES - ahead]
    for _ in range(ahead):
        padded = np.zeros((5, FRAMES, SIDE * SIDE), np.float32)
        padded[:, : made.shape[1]] = made
        shown = {"frames": padded, "index": batch["index"]}
        following = predict(params, shown, jax.random.key(0), None)
        made = np.concatenate([made, following[:, made.shape[1] - 1, None]], axis=1)
    return clips, made


def test_errors_grow_with_the_horizon_as_by_hand(video):
    objective, params = video
    rows = horizons.horizons(
        objective,
        params,
        clip_batches(),
        context=FRAMES,
        ahead=3,
        decode=decode,
        seed=0,
    )
    clips, made = predicted(objective, params, 3)
    for i, row in enumerate(rows):
        assert row.ahead == i + 1
        at = FRAMES - 3 + i
        error = (made - clips)[:, at]
        assert row.model["mse"] == pytest.approx(np.square(error).mean(), rel=1e-4)
        # A clip moves by its pace in each frame, from 0.02 to 0.1.
        moved = np.square(0.02 * np.arange(1, 6) * (i + 1)).mean()
        assert row.copying["mse"] == pytest.approx(moved, rel=1e-4)
        assert row.copying["smooth_l1"] == pytest.approx(moved / 2, rel=1e-4)
        # 8 bits of a pixel: 0.4 % of the range.
        expected = 10 * np.log10(4 / moved)
        assert row.copying["psnr"] == pytest.approx(expected, abs=0.5)
    lines = horizons.table(rows).splitlines()
    assert len(lines) == 4 and lines[0].split()[:2] == ["ahead", "MSE"]
    assert f"{rows[2].model['psnr']:.2f}" in lines[3]
    assert f"{rows[2].copying['mse']:.4g}" in lines[3]


def test_without_a_way_back_to_pictures_there_is_no_psnr(video):
    objective, params = video
    (row,) = horizons.horizons(
        objective,
        params,
        clip_batches(),
        context=FRAMES,
        ahead=1,
        decode=None,
        seed=0,
    )
    assert list(row.model) == ["mse", "smooth_l1"]


@pytest.mark.parametrize("ahead", [0, FRAMES])
def test_at_least_one_frame_is_given_and_one_predicted(video, ahead):
    with pytest.raises(UserError, match=f"{ahead} frames ahead.* from 1 to 5"):
        horizons.horizons(
            *video, clip_batches(), context=FRAMES, ahead=ahead, decode=None, seed=0
        )


def test_clips_that_do_not_count_are_no_clips(video):
    (batch,) = clip_batches(0 + 1, 1)
    empty = {**batch, "weights": batch["weights"] * 0}
    with pytest.raises(UserError, match="no whole clip"):
        horizons.horizons(*video, [empty], context=FRAMES, ahead=1, decode=None, seed=0)


def test_video_samples_lie_in_the_workdir(tmp_path, video):
    objective, params = video
    batch = next(iter(clip_batches()))
    written = samples.write_video_samples(
        tmp_path,
        objective,
        params,
        batch,
        decode,
        context=FRAMES,
        given=3,
        frame_seconds=0.2,
        seed=0,
        count=2,
    )
    assert [path.name for path in written] == ["samples.gif", "samples.png"]
    with Image.open(written[0]) as image:
        assert image.n_frames == FRAMES and image.info["duration"] == 200
    with Image.open(written[1]) as image:
        assert image.width > 4 * 96 and image.height > 4 * 96


def caption_batches(pictures=40, size=16, informative=True):
    """Pictures that are their caption, or another's; the last batch is filled up."""
    for first in range(0, pictures, size):
        index = np.arange(first, first + size)
        of = index if informative else (index * 7 + 3) % 40
        caption = np.stack([np.cos(index), np.sin(index)], axis=1)
        shown = np.stack([np.cos(of), np.sin(of)], axis=1)
        yield {
            "image": shown[:, None, None].astype(np.float32),
            "caption": caption.astype(np.float32),
            "weights": (index < pictures).astype(np.float32),
            "index": index.astype(np.int32),
        }


class Captions:
    """Batches, as often as wanted."""

    def __init__(self, **settings):
        self.settings = settings

    def __iter__(self):
        return caption_batches(**self.settings)


def distance_model(scale=1.0):
    """Energies are squared distances of captions and pictures."""

    def energy(params, context, candidate, landscape):
        return scale * jnp.square(candidate[:, 0, 0] - context).sum(-1)

    nothing = lambda *args: None
    return EnergyModel(
        init=nothing,
        encode_context=lambda params, batch: batch["caption"],
        energy=energy,
        initial_candidate=nothing,
        normalize=lambda candidate: candidate,
        loss=nothing,
        target=nothing,
    )


def test_the_right_caption_has_the_lowest_energy():
    found = retrieval.retrieve(distance_model(), {}, Captions(), choices=8, seed=0)
    assert found == (1.0, 1.0, 1.0, 1 / 8, 40, 8)
    worst = retrieval.retrieve(distance_model(-1.0), {}, Captions(), choices=8, seed=0)
    assert worst.accuracy < 1 / 8


def test_energies_that_tell_nothing_are_right_by_chance():
    flat = retrieval.retrieve(distance_model(0.0), {}, Captions(), choices=5, seed=0)
    assert flat.accuracy == flat.low == flat.high == pytest.approx(1 / 5)
    others = Captions(informative=False)
    found = retrieval.retrieve(distance_model(), {}, others, choices=2, seed=0)
    assert found.low < 0.5 < found.high or found.accuracy < 0.5
    again = Captions(informative=False, size=5)
    batched = retrieval.retrieve(distance_model(), {}, again, choices=2, seed=0)
    assert batched == pytest.approx(found)


def test_shares_and_the_bootstrap():
    energies = np.array([[0, 1, 0, np.nan, np.inf], [1, 0, 0, 2, np.inf]])
    assert retrieval.shares(energies).tolist() == [1, 0, 0.5, 0, 0]
    coin = np.arange(400) % 2
    low, high = retrieval.bootstrap(coin, 0)
    # Two standard errors of a fair coin thrown 400 times: 0.05.
    assert low == pytest.approx(0.45, abs=0.01) and high == pytest.approx(
        0.55, abs=0.01
    )


def test_what_cannot_be_retrieved():
    for choices in (1, 41):
        with pytest.raises(UserError, match=f"{choices} captions.* from 2 to 40"):
            retrieval.retrieve(
                distance_model(), {}, Captions(), choices=choices, seed=0
            )
    bare = [{"image": np.zeros((1, 1)), "weights": np.ones(1), "index": np.zeros(1)}]
    with pytest.raises(UserError, match="the data has none"):
        retrieval.retrieve(distance_model(), {}, bare, choices=2, seed=0)
