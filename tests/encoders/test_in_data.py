"""Published encoders where data is prepared: pixels and captions in, numbers out."""

import functools
import gzip
import json

import numpy as np
import pytest
from encoder_cases import FOLDER, random_arrays, read_case

from ebt_jax.data import captions, encoding
from ebt_jax.data.vision_config import VisionConfig
from ebt_jax.errors import UserError
from ebt_jax.models.encoders import clip_text, dinov2, vae
from ebt_jax.models.encoders.clip_bpe import load_clip_bpe
from ebt_jax.models.encoders.weights import compiled

PIXELS = np.random.RandomState(0).randint(0, 256, (16, 8, 8, 3)).astype(np.uint8)


def make(vision, whole=False):
    return encoding.make(vision, 8, whole, fit_on=lambda: PIXELS)


def test_pictures_through_an_autoencoder(tmp_path):
    arrays, _ = read_case("vae_diffusers")
    path = str(tmp_path / "vae.npz")
    np.savez(path, **arrays)
    made = make(VisionConfig(encoder="vae", encoder_path=path, encoder_scale=0.5))
    latents = made.encode(PIXELS)
    assert made.shape == (2, 2, 4) and latents.shape == (16, 2, 2, 4)
    ours = vae.load_vae(path)
    encode = compiled(functools.partial(ours.encode, scale=0.5), ours.params)
    expected = encode(PIXELS / np.float32(127.5) - 1)
    np.testing.assert_allclose(latents, expected, rtol=0, atol=1e-4)
    assert made.decode is not None
    pictures = made.decode(latents)
    assert pictures.shape == PIXELS.shape and pictures.dtype == np.uint8


def test_frames_through_dinov2(tmp_path, monkeypatch):
    arrays, _ = read_case("dinov2_facebook")
    path = str(tmp_path / "dinov2.npz")
    np.savez(path, **arrays)
    monkeypatch.setitem(dinov2.SIZES, "small", (2, 128))
    settings = VisionConfig(encoder="dinov2", encoder_path=path, encoder_size="small")
    whole, patches = make(settings, whole=True), make(settings)
    assert whole.shape == (1, 1, 128) and patches.shape == (2, 2, 128)
    ours = dinov2.load_dinov2(path, "small")
    images = dinov2.imagenet_normalised(PIXELS / np.float32(127.5) - 1)
    expected = compiled(ours.encode, ours.params)(images)
    frames = whole.encode(PIXELS)
    np.testing.assert_allclose(frames[:, 0, 0], expected.image, rtol=0, atol=1e-4)
    squares = patches.encode(PIXELS)
    np.testing.assert_allclose(squares, expected.patches, rtol=0, atol=1e-4)


def test_captions_through_clip(tmp_path):
    case = json.loads((FOLDER / "clip_bpe.json").read_text(encoding="ascii"))
    lines = ["#version: 0.2", *map(" ".join, case["merges"])]
    vocabulary = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    vocabulary.write_bytes(gzip.compress("\n".join(lines).encode()))
    arrays, _ = read_case("clip_transformers")
    path = str(tmp_path / "clip.npz")
    np.savez(path, **arrays)
    encode = captions.encoder(VisionConfig(caption_encoder="clip", caption_path=path))
    tokens = 512 + len(case["merges"]) + 2
    expected = f"has 40 tokens, but the vocabulary beside it {tokens}; take both of one"
    with pytest.raises(UserError, match=expected):
        encode(["a photo"])

    name = "embeddings.token_embedding.weight"
    arrays |= random_arrays({name: (tokens, 128)})
    np.savez(path, **arrays)
    encoded = encode(["a photo", "a flower"])
    ours = clip_text.load_clip_text(path)
    rows = load_clip_bpe(str(tmp_path)).batch(["a photo", "a flower"], 9)
    pooled = compiled(ours.encode, ours.params)(rows).pooled
    np.testing.assert_allclose(encoded, pooled, rtol=0, atol=1e-4)
