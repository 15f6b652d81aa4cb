"""One picture: what is made of its bytes, and what is said of it."""

import io

import numpy as np
import pytest
from PIL import Image

from ebt_jax.data import pictures
from ebt_jax.data.pictures import Corrupt

RNG = np.random.default_rng(0)


def encoded(image, kind="PNG", **options):
    """The bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read(content, channels=3):
    """Pixels and notes of a file."""
    image, notes = pictures.flattened(pictures.opened(content), channels)
    return np.asarray(image), notes


def test_colour_stays_as_it_is():
    pixels = RNG.integers(0, 256, (5, 7, 3), np.uint8)
    read_pixels, notes = read(encoded(Image.fromarray(pixels)))
    assert np.array_equal(read_pixels, pixels) and not notes


def test_grey_is_made_colour_and_said():
    pixels = RNG.integers(0, 256, (5, 7), np.uint8)
    content = encoded(Image.fromarray(pixels))
    read_pixels, notes = read(content)
    assert np.array_equal(read_pixels, np.repeat(pixels[..., None], 3, -1))
    assert notes == {"grey"}
    assert np.array_equal(read(content, channels=1)[0], pixels)
    assert not read(content, channels=1)[1]


def test_16_bits_are_scaled():
    pixels = np.array([[0, 257, 65535]], np.uint16)
    read_pixels, _ = read(encoded(Image.fromarray(pixels)))
    assert read_pixels[..., 0].tolist() == [[0, 1, 255]]


def test_alpha_is_laid_on_white_and_said():
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    image.putpixel((1, 0), (200, 0, 0, 0))
    pixels, notes = read(encoded(image))
    assert pixels.tolist() == [[[200, 0, 0], [255, 255, 255]]]
    assert notes == {"alpha"}
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([9, 9, 9])
    pixels, notes = read(encoded(palette, transparency=0))
    assert pixels.tolist() == [[[255] * 3]] and notes == {"alpha"}


def test_of_an_animation_the_first_frame_is_taken_and_said():
    frames = [Image.new("RGB", (3, 3), colour) for colour in ("red", "blue", "lime")]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    pixels, notes = read(content)
    assert pixels[0, 0].tolist() == [255, 0, 0]
    assert notes == {"frames"}


def test_a_picture_is_turned_upright():
    image = Image.new("RGB", (4, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # has to be turned by 90 degrees
    assert read(encoded(image, "JPEG", exif=exif))[0].shape == (4, 2, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_what_cannot_be_decoded_is_corrupt(kind):
    pixels = RNG.integers(0, 256, (40, 40, 3), np.uint8)
    content = encoded(Image.fromarray(pixels), kind)
    with pytest.raises(Corrupt, match="is corrupt"):
        pictures.opened(content[: len(content) // 2])
    with pytest.raises(Corrupt, match="is corrupt .no picture."):
        pictures.opened(b"no picture at all")


def test_the_centre_is_cropped_as_published():
    """Halved while twice too large, resized bicubically, cut out of the middle."""
    image = Image.fromarray(RNG.integers(0, 256, (90, 70, 3), np.uint8))
    halved = image.resize((35, 45), Image.Resampling.BOX)
    resized = halved.resize((24, round(45 * 24 / 35)), Image.Resampling.BICUBIC)
    expected = np.asarray(resized)[3:27, :]
    assert np.array_equal(pictures.squared(image, 24, "center"), expected)


def test_squashing_keeps_the_whole():
    image = Image.fromarray(RNG.integers(0, 256, (90, 70), np.uint8))
    expected = np.asarray(image.resize((24, 24), Image.Resampling.BILINEAR))
    assert np.array_equal(pictures.squared(image, 24, "squash")[..., 0], expected)


@pytest.mark.parametrize("crop", ["center", "squash"])
def test_the_right_size_is_left_alone(crop):
    pixels = RNG.integers(0, 256, (8, 8, 3), np.uint8)
    made = pictures.squared(Image.fromarray(pixels), 8, crop)
    assert np.array_equal(made, pixels)


def test_floats_and_back():
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    floats = pictures.to_floats(pixels)
    assert floats.dtype == np.float32
    assert floats.min() == -1 and floats.max() == 1
    back = pictures.to_pixels(floats)
    assert back.shape == (16, 16, 3)
    assert all(np.array_equal(back[..., i], pixels[..., 0]) for i in range(3))
    assert pictures.to_pixels(np.full((1, 1, 3), 9.0)).tolist() == [[[255] * 3]]
