"""Published PyTorch checkpoints in and out.

    flags = {...}                                # the published code's hparams
    config = interop.config_from_reference(flags)
    state, _ = interop.read_checkpoint("model.safetensors")
    params = interop.from_reference(state, config)

State dicts are plain mappings from the published names to arrays (Linear weights are
`[out, in]`). A `.ckpt` file needs torch to be read, `.safetensors` the package of that
name, `.npz` nothing.
"""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from ebt_jax.errors import UserError
from ebt_jax.interop_entry import Entry
from ebt_jax.interop_image import ENCODERS, fixed_arrays, image_entries
from ebt_jax.models.config import ModelConfig
from ebt_jax.models.ends import has_candidate_table
from ebt_jax.published_flags import config_from_reference
from ebt_jax.refine import PyTree
from ebt_jax.training.config import Config
from ebt_jax.training.objective import build_objective

__all__ = [
    "config_from_reference",
    "from_reference",
    "read_checkpoint",
    "to_reference",
]


def from_reference(state_dict: Mapping[str, Any], config: Config) -> PyTree:
    """Parameters from a published state dict.

    Args:
      state_dict: published names to arrays. A common prefix `model.` is dropped, as
        are rotary frequencies and frozen encoders of images and captions.
      config: the model's config, e.g. from `config_from_reference`.

    Returns:
      Parameters as `Objective.init` makes them, float32 NumPy arrays.

    Raises:
      UserError: naming the first array that is missing, not expected, or of another
        shape.
    """
    state = {name: np.asarray(array) for name, array in state_dict.items()}
    if state and all(name.startswith("model.") for name in state):
        state = {name.removeprefix("model."): array for name, array in state.items()}
    state = {
        name: array
        for name, array in state.items()
        if not name.endswith("freqs_cis") and not name.startswith(ENCODERS)
    }
    entries = list(_entries(config))
    for entry in entries:
        if entry.name not in state:
            raise UserError(f"the checkpoint has no array {entry.name!r}")
    if config.model.space == "image":
        state = _without_fixed(state, config.model)
    unexpected = set(state) - {entry.name for entry in entries}
    if unexpected:
        raise UserError(
            f"the checkpoint has an array {min(unexpected)!r} that this model config "
            "has no place for; check ebt_type, ebt_norm and the sizes"
        )
    shapes = jax.eval_shape(build_objective(config).init, jax.random.key(0))
    params = jax.tree.map(lambda s: np.empty(s.shape, np.float32), shapes)
    for entry in entries:
        place, array = entry.place(params), state[entry.name]
        expected = entry.published_shape(place.shape)
        if array.shape != expected:
            raise UserError(
                f"the checkpoint's {entry.name!r} has shape {array.shape}, but the "
                f"model config needs {expected}"
            )
        place[...] = entry.to_ours(array, place.shape)
    return params


def to_reference(params: PyTree, config: Config) -> dict[str, np.ndarray]:
    """The inverse of `from_reference`: published names to float32 NumPy arrays."""
    state = {}
    for entry in _entries(config):
        array = entry.to_theirs(np.asarray(entry.place(params), np.float32))
        state[entry.name] = np.array(array, order="C")  # safetensors needs it
    fixed = fixed_arrays(config.model) if config.model.space == "image" else {}
    return state | fixed


def read_checkpoint(path: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads a state dict, and the flags stored with it where there are any.

    Args:
      path: `.npz`, `.safetensors`, or a `.ckpt` / `.pt` / `.pth` file of PyTorch.

    Raises:
      UserError: if the file is missing, of another kind, or its reader not installed.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise UserError(f"checkpoint {path!r} does not exist or is not a file")
    if file.suffix == ".npz":
        with file.open("rb") as opened, np.load(opened) as arrays:
            return dict(arrays), {}
    if file.suffix == ".safetensors":
        try:
            from safetensors.numpy import load_file
        except ImportError as error:
            raise UserError(
                "reading .safetensors needs `pip install 'ebt-jax[torch]'`"
            ) from error
        return load_file(file), {}
    if file.suffix in (".ckpt", ".pt", ".pth"):
        try:
            # Not a plain import: type checkers need not have torch.
            torch = importlib.import_module("torch")
        except ImportError as error:
            raise UserError(
                f"reading {file.suffix} needs torch: `pip install 'ebt-jax[torch]'`"
            ) from error
        content = torch.load(file, map_location="cpu", weights_only=True)
        state = content["state_dict"] if "state_dict" in content else content
        flags = content["hyper_parameters"] if "hyper_parameters" in content else {}
        return {k: v.float().numpy() for k, v in state.items()}, dict(flags)
    raise UserError(
        f"checkpoint {path!r} has suffix {file.suffix!r}, expected .npz, .safetensors, "
        ".ckpt, .pt or .pth"
    )


def _without_fixed(
    state: dict[str, np.ndarray], config: ModelConfig
) -> dict[str, np.ndarray]:
    """A state dict of an image model without what is not learnt, which is checked."""
    for name, ours in fixed_arrays(config).items():
        if name not in state:
            continue
        theirs = state.pop(name)
        if theirs.shape != ours.shape or np.abs(theirs - ours).max() > 1e-4:
            raise UserError(
                f"the checkpoint's {name!r} {theirs.shape} is not the fixed one "
                f"{ours.shape} of the model config; check its image_size, patch and dim"
            )
    return state


def _entries(config: Config) -> Iterator[Entry]:
    """Every array of a published checkpoint of this model."""
    if config.model.space == "image":
        return image_entries(config.model, config.diffusion)
    return _causal_entries(config.model)


def _causal_entries(config: ModelConfig) -> Iterator[Entry]:
    if config.landscape_scales:
        raise UserError(
            "model.landscape_scales has no published counterpart, so its parameters "
            "cannot be exchanged with published checkpoints"
        )
    if config.candidate_input != "embedding":
        raise UserError(
            f"model.candidate_input={config.candidate_input!r} has no published "
            "counterpart, so its parameters cannot be exchanged with published "
            "checkpoints"
        )
    video = config.space == "video"
    if video:
        yield from _biased("encoder_down_projection", "frame_embed")
    else:
        yield Entry("embeddings.weight", ("embed", "embedding"))
    adaln = config.conditioning in ("adaln", "adaln_zero") and config.kind == "ebt"
    heads = config.heads
    linears = {  # name, fused part, heads
        "attention.wq": ("qkv", 0, heads),
        "attention.wk": ("qkv", 1, heads),
        "attention.wv": ("qkv", 2, None),
        "attention.wo": ("out", None, None),
        "feed_forward.w1": ("gate_up", 0, None),
        "feed_forward.w3": ("gate_up", 1, None),
        "feed_forward.w2": ("down", None, None),
    }
    norms = {"attention_norm": "attention_norm", "ffn_norm": "mlp_norm"}
    parts = {
        "rms": {"weight": "scale"},
        "layer": {"weight": "scale", "bias": "bias"},
        "dyt": {"weight": "scale", "bias": "bias", "alpha": "alpha"},
        "none": {},
    }[config.norm]
    for i in range(config.layers):
        layer = f"transformer.layers.{i}."
        for theirs, (ours, *rest) in linears.items():
            path = ("blocks", ours, "kernel")
            yield Entry(f"{layer}{theirs}.weight", path, i, True, *rest)
        for theirs, ours in norms.items():
            for part, name in parts.items():
                yield Entry(f"{layer}{theirs}.{part}", ("blocks", ours, name), i)
        if adaln:
            theirs, ours = f"{layer}adaLN_modulation.1", ("blocks", "modulation")
            yield Entry(f"{theirs}.weight", (*ours, "kernel"), i, True)
            yield Entry(f"{theirs}.bias", (*ours, "bias"), i)
    for part, name in parts.items():
        yield Entry(f"transformer.norm.{part}", ("final_norm", name))
    if config.kind == "transformer_pp":
        ours = "readout" if video else "output"
        yield Entry("output.weight", (ours, "kernel"), None, True)
        if video:
            yield from _biased("encoder_up_projection", "frame_output")
        return
    yield Entry("alpha", ("step_size",))
    yield Entry("langevin_dynamics_noise_std", ("noise_std",))
    if has_candidate_table(config):
        name = "vocab_to_embed.weight"
        yield Entry(name, ("candidate_embed", "kernel"), None, True)
    if config.conditioning != "default":
        name = "transformer.time_embeddings.weight"
        yield Entry(name, ("step_embed", "embedding"))
    head = "transformer.final_layer.linear.weight" if adaln else None
    head = head or "transformer.final_layer.weight"
    yield Entry(head, ("energy", "kernel"), None, True)
    if adaln:
        theirs = "transformer.final_layer.adaLN_modulation.1"
        yield Entry(f"{theirs}.weight", ("final_modulation", "kernel"), None, True)
        yield Entry(f"{theirs}.bias", ("final_modulation", "bias"))


def _biased(theirs: str, ours: str) -> Iterator[Entry]:
    """A linear map with a bias."""
    yield Entry(f"{theirs}.weight", (ours, "kernel"), None, True)
    yield Entry(f"{theirs}.bias", (ours, "bias"))
