"""Files of published weights: formats, and what is said of those that do not fit."""

import sys
import types
import zipfile

import numpy as np
import pytest
from encoder_cases import read_case
from safetensors.numpy import save_file

from ebt_jax.errors import UserError
from ebt_jax.models.encoders import clip_text, dinov2, vae
from ebt_jax.models.encoders import weights as published
from ebt_jax.models.encoders.weights import Weights

BUILD = {
    "vae_diffusers": vae.from_weights,
    "vae_compvis": vae.from_weights,
    "dinov2_transformers": dinov2.from_weights,
    "dinov2_facebook": dinov2.from_weights,
    "clip_transformers": clip_text.from_weights,
    "clip_openai": clip_text.from_weights,
}


def refused(name, arrays):
    with pytest.raises(UserError) as caught:
        BUILD[name](Weights(arrays, "FILE", "KIND"))
    message = str(caught.value)
    assert message.startswith("FILE has ") and message.endswith("weights of KIND")
    assert "\n" not in message
    return message.removeprefix("FILE has ").removesuffix("; give the weights of KIND")


@pytest.mark.parametrize("name", list(BUILD))
def test_every_array_counts(name):
    """Each is missed, and none is filled from another."""
    arrays, _ = read_case(name)
    unused = {"embeddings.mask_token", "mask_token", "logit_scale"}
    unused |= {key for key in arrays if key.startswith("visual.")}
    for key in [*arrays][:: max(1, len(arrays) // 8)]:
        if key in unused:
            continue
        message = refused(name, {k: v for k, v in arrays.items() if k != key})
        # Without one of the arrays that sizes are read from, others are left over.
        assert key in message or message.startswith("an array ")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("vae_diffusers", "encoder.conv_in.weight"),
        ("vae_compvis", "decoder.mid.attn_1.q.weight"),
        ("dinov2_transformers", "layernorm.weight"),
        ("dinov2_facebook", "blocks.1.attn.qkv.weight"),
        ("clip_transformers", "final_layer_norm.bias"),
        ("clip_openai", "transformer.resblocks.0.attn.in_proj_bias"),
    ],
)
def test_the_array_that_does_not_fit_is_named(name, key):
    arrays, _ = read_case(name)
    missing = {k: v for k, v in arrays.items() if k != key}
    assert refused(name, missing) == f"no array {key!r}"
    more = arrays | {"head.weight": np.zeros((2, 2))}
    expected = "an array 'head.weight' that nothing is known of"
    assert refused(name, more) == expected
    shape = arrays[key].shape
    wrong = arrays | {key: np.zeros((*shape, 2))}
    assert refused(name, wrong).startswith(f"{key!r} of shape {(*shape, 2)}, where ")


def test_shapes_are_given_as_the_file_has_them():
    arrays, _ = read_case("dinov2_facebook")
    key = "blocks.1.attn.qkv.weight"
    wrong = arrays | {key: np.zeros((128, 384))}
    expected = f"{key!r} of shape (128, 384), where (384, 128) is needed"
    assert refused("dinov2_facebook", wrong) == expected
    arrays, _ = read_case("vae_compvis")
    key = "encoder.down.1.block.0.conv1.weight"
    wrong = arrays | {key: np.zeros((64, 16, 3, 3))}
    expected = f"{key!r} of shape (64, 16, 3, 3), where (64, 32, 3, 3) is needed"
    assert refused("vae_compvis", wrong) == expected


def test_weights_of_another_architecture():
    arrays, _ = read_case("clip_transformers")
    assert refused("vae_diffusers", arrays) == "no array 'encoder.conv_in.weight'"
    assert refused("dinov2_facebook", arrays) == "no array 'embeddings.cls_token'"
    arrays, _ = read_case("vae_compvis")
    expected = "no array 'embeddings.token_embedding.weight'"
    assert refused("clip_openai", arrays) == expected


def test_sizes_that_no_published_model_has():
    arrays, _ = read_case("dinov2_facebook")
    wrong = arrays | {"cls_token": np.zeros((1, 1, 100))}
    expected = "'cls_token' of width 100, which does not split into heads of 64"
    assert refused("dinov2_facebook", wrong) == expected
    arrays, _ = read_case("vae_diffusers")
    key = "encoder.down_blocks.0.resnets.0.conv1.weight"
    wrong = arrays | {key: np.zeros((48, 32, 3, 3))}
    expected = f"{key!r} of 48 channels, which are not a multiple of 32"
    assert refused("vae_diffusers", wrong) == expected


def test_the_size_of_dinov2_is_checked(tmp_path):
    arrays, _ = read_case("dinov2_facebook")
    path = tmp_path / "tiny.npz"
    np.savez(path, **arrays)
    with pytest.raises(UserError, match="'giant' is unknown; choose small, base, la"):
        dinov2.load_dinov2(str(path), "giant")
    expected = r"'cls_token' of shape \(1, 1, 128\), where \(1, 1, 768\) is needed"
    with pytest.raises(UserError, match=expected):
        dinov2.load_dinov2(str(path), "base")


def test_the_depth_of_dinov2_is_checked(tmp_path, monkeypatch):
    arrays, _ = read_case("dinov2_facebook")
    path = tmp_path / "tiny.npz"
    np.savez(path, **arrays)
    monkeypatch.setitem(dinov2.SIZES, "small", (3, 128))
    with pytest.raises(UserError, match="has 2 blocks, where 3 are needed"):
        dinov2.load_dinov2(str(path), "small")
    monkeypatch.setitem(dinov2.SIZES, "small", (2, 128))
    assert dinov2.load_dinov2(str(path), "small").config.width == 128


# Files.


def test_npz_and_safetensors_hold_the_same(tmp_path):
    arrays, _ = read_case("vae_diffusers")
    np.savez(tmp_path / "a.npz", **arrays)
    save_file(arrays, tmp_path / "a.safetensors")
    for name in ("a.npz", "a.safetensors"):
        assert vae.load_vae(str(tmp_path / name)).config.widths == (32, 64, 64)
        read = published.read(str(tmp_path / name), "KIND").arrays
        assert all(np.array_equal(read[key], arrays[key]) for key in arrays)


class Tensor:
    """What is used of a tensor."""

    def __init__(self, array):
        self.array = array

    def float(self):
        return Tensor(self.array.astype(np.float32))

    def numpy(self):
        return self.array


def test_files_of_pytorch(tmp_path, monkeypatch):
    """State dicts, checkpoints that hold one, and programs."""
    state = {"a": Tensor(np.ones(2, np.float16))}

    def load(file, map_location, weights_only):
        assert map_location == "cpu" and weights_only
        return state if file.suffix == ".pth" else {"state_dict": state, "epoch": 3}

    def load_program(file, map_location):
        assert file.suffix == ".pt"
        return types.SimpleNamespace(state_dict=lambda: state)

    jit = types.SimpleNamespace(load=load_program)
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(load=load, jit=jit))
    for name in ("a.pth", "a.ckpt", "a.pt"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("a/data.pkl", "")
            if name == "a.pt":
                archive.writestr("a/constants.pkl", "")
        arrays = published.read(str(tmp_path / name), "KIND").arrays
        assert arrays["a"].dtype == np.float32 and arrays["a"].tolist() == [1, 1]


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(
        UserError, match="'none.npz' is not a file; give the weights of"
    ):
        published.read("none.npz", "KIND")
    (tmp_path / "a.txt").touch()
    expected = (
        "has suffix '.txt', expected .safetensors, .npz, .pt, .pth, .bin or .ckpt"
    )
    with pytest.raises(UserError, match=expected):
        published.read(str(tmp_path / "a.txt"), "KIND")
    for suffix in (".npz", ".safetensors"):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(b"not weights")
        with pytest.raises(UserError, match=f"cannot be read as {suffix} .* damaged"):
            published.read(str(path), "KIND")


@pytest.mark.parametrize(
    ("suffix", "module"), [(".safetensors", "safetensors.numpy"), (".pt", "torch")]
)
def test_a_reader_that_is_not_installed_is_named(tmp_path, monkeypatch, suffix, module):
    monkeypatch.setitem(sys.modules, module, None)
    path = tmp_path / f"a{suffix}"
    path.touch()
    expected = f"reading {suffix} needs {module.partition('.')[0]}: `pip install 'ebt"
    with pytest.raises(UserError, match=expected):
        published.read(str(path), "KIND")
