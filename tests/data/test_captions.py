"""Captions as numbers."""

import numpy as np
import pytest

from ebt_jax.data import captions
from ebt_jax.data.vision_config import VisionConfig
from ebt_jax.errors import UserError


def test_hashed_captions_are_the_same_everywhere():
    """Pinned: latents and checkpoints made elsewhere depend on it."""
    row = captions.hashed(["a cat"], 8)[0]
    expected = captions.hashed(["A  CAT!"], 8)[0]
    assert np.array_equal(row, expected)
    assert np.argmax(np.abs(captions.hashed(["cat"], 1000))) == 588


def test_captions_of_like_words_are_alike():
    texts = ["smiling face", "smile, faces", "red truck", ""]
    encoded = captions.hashed(texts, 512)
    assert encoded.dtype == np.float32
    norms = np.linalg.norm(encoded, axis=1)
    assert np.allclose(norms, [1, 1, 1, 0])
    likeness = encoded @ encoded.T
    assert likeness[0, 1] > 0.15 > abs(likeness[0, 2])


def test_a_name_is_matched_whole_or_by_its_last_part():
    told = {"a/1.png": ("x",), "2.png": ("y",), "3.png": ("z",), "4.png": ("w",)}
    names = ["a/1.png", "b/2.png", "b/3.png", "c/3.png", "b/5.png"]
    matched, strays = captions.match(told, names)
    assert matched == [("x",), ("y",), (), (), ()]  # which 3.png is not known
    assert strays == ["3.png", "4.png"]


def test_all_captions_of_a_picture_stay_together():
    encode = captions.encoder(VisionConfig(caption_features=16))
    rows = captions.encode_all(encode, [("a", "b"), ("c",)])
    assert [row.shape for row in rows] == [(2, 16), (1, 16)]
    assert np.array_equal(rows[1], encode(["c"]))
    assert captions.encode_all(encode, []) == []


def test_weights_that_are_not_there_are_named(tmp_path):
    path = str(tmp_path / "clip.safetensors")
    encode = captions.encoder(VisionConfig(caption_encoder="clip", caption_path=path))
    with pytest.raises(UserError, match="clip.safetensors"):
        encode(["a cat"])
