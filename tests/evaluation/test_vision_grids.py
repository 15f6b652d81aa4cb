"""Grids, clips and heat, read back from their files."""

import numpy as np
import pytest
from PIL import Image

from ebt_jax.errors import UserError
from ebt_jax.evaluation.vision import grids


def plain(count, colour, side=8):
    return np.full((count, side, side, 3), colour, np.uint8)


def read(file):
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def test_a_grid_has_a_column_for_each_stage(tmp_path):
    columns = {"clean": plain(2, [255, 0, 0]), "a noised one": plain(2, [0, 0, 255])}
    file = grids.write_grid(tmp_path / "samples.png", columns, ["one", "two" * 99])
    pixels = read(file)
    red = (pixels == [255, 0, 0]).all(-1)
    blue = (pixels == [0, 0, 255]).all(-1)
    assert (
        red.sum() == blue.sum() == 2 * 96 * 96
    )  # each 8 x 8 picture 12 times as large
    assert np.flatnonzero(red.any(0)).max() < np.flatnonzero(blue.any(0)).min()
    assert (pixels.reshape(-1, 3) == grids.INK).all(-1).any()  # there is text


def test_large_pictures_stay_as_they_are(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (1, 128, 128, 3), np.uint8)
    file = grids.write_grid(tmp_path / "a.png", {"clean": pictures}, note="a note")
    pixels = read(file)
    top, left = grids.LINE + grids.GAP, grids.GAP
    assert (pixels[top : top + 128, left : left + 128] == pictures[0]).all()


def test_a_gif_shows_true_frames_above_predicted_ones(tmp_path):
    true = np.stack([plain(1, [0, v, 0])[0] for v in (0, 80, 160, 240)])[None]
    clips = {"true": true, "model": true[:, ::-1]}
    file = grids.write_gif(tmp_path / "a.gif", clips, given=2, frame_seconds=0.25)
    last = []
    with Image.open(file) as image:
        assert image.n_frames == 4 and image.info["duration"] == 250
        for time in range(4):
            image.seek(time)
            last.append(np.asarray(image.convert("RGB")))
        assert image.info["duration"] == 1250 and image.info["loop"] == 0
    red = [np.abs(f.astype(int) - grids.PREDICTED).sum(-1) < 20 for f in last]
    assert not red[0].any() and not red[1].any()
    # Only the lower of the two has red frames, once it is predicted.
    for marked in red[2:]:
        assert marked.any() and np.flatnonzero(marked.any(1)).min() > len(marked) / 2


def test_heat_is_bright_where_energies_are_high():
    energies = np.array([[[0.0, 1.0], [2.0, 3.0]]])
    shown = grids.heat(plain(1, 128, 8), energies, 0.0, 3.0)
    light = shown.astype(int).sum(-1)[0]
    assert shown.shape == (1, 8, 8, 3)
    assert light[0, 0] < light[0, 7] < light[7, 0] < light[7, 7]
    assert (light[:4, :4] == light[0, 0]).all()
    same = grids.heat(plain(1, 128, 8), energies * 0, 0.0, 0.0)
    assert np.ptp(same, axis=(1, 2)).max() == 0


def test_nothing_to_show_is_said(tmp_path):
    with pytest.raises(UserError, match="a.png would show no picture"):
        grids.write_grid(tmp_path / "a.png", {})
    with pytest.raises(UserError, match="a.gif would show no frame"):
        grids.write_gif(tmp_path / "a.gif", {}, given=1, frame_seconds=1)
    assert not list(tmp_path.iterdir())
