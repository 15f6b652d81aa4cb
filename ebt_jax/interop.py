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
from typing import Any, NamedTuple

import jax
import numpy as np

from ebt_jax.errors import UserError
from ebt_jax.models.config import ModelConfig
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


class Entry(NamedTuple):
    """One published array and where it lives in our parameters.

    Attributes:
      name: the published name.
      path: keys into the parameter dict.
      layer: index into the stacked blocks, or None.
      transpose: whether theirs is the transpose of ours.
      part: index into the maps of a fused kernel `[dim, parts, features]`, or None.
      heads: of a kernel whose columns rotary positions turn in pairs: their number.
        Theirs pairs neighbours, ours pairs a head's first half with its second.
    """

    name: str
    path: tuple[str, ...]
    layer: int | None = None
    transpose: bool = False
    part: int | None = None
    heads: int | None = None


def from_reference(state_dict: Mapping[str, Any], config: Config) -> PyTree:
    """Parameters from a published state dict.

    Args:
      state_dict: published names to arrays. A common prefix `model.` is dropped.
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
    state = {k: v for k, v in state.items() if not k.endswith("freqs_cis")}
    entries = list(_entries(config.model))
    for entry in entries:
        if entry.name not in state:
            raise UserError(f"the checkpoint has no array {entry.name!r}")
    unexpected = set(state) - {entry.name for entry in entries}
    if unexpected:
        raise UserError(
            f"the checkpoint has an array {min(unexpected)!r} that this model config "
            "has no place for; check ebt_type, ebt_norm and the sizes"
        )
    shapes = jax.eval_shape(build_objective(config).init, jax.random.key(0))
    params = jax.tree.map(lambda s: np.empty(s.shape, np.float32), shapes)
    for entry in entries:
        place = _at(params, entry)
        array = state[entry.name].T if entry.transpose else state[entry.name]
        array = _apart(array, entry.heads)
        if array.shape != place.shape:
            expected = place.shape[::-1] if entry.transpose else place.shape
            raise UserError(
                f"the checkpoint's {entry.name!r} has shape "
                f"{state[entry.name].shape}, but the model config needs {expected}"
            )
        place[...] = array
    return params


def to_reference(params: PyTree, config: Config) -> dict[str, np.ndarray]:
    """The inverse of `from_reference`: published names to float32 NumPy arrays."""
    state = {}
    for entry in _entries(config.model):
        array = np.asarray(_at(params, entry), np.float32)
        array = _together(array, entry.heads)
        array = array.T if entry.transpose else array
        state[entry.name] = np.array(array, order="C")  # safetensors needs it
    return state


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


def _entries(config: ModelConfig) -> Iterator[Entry]:
    """Every array of a published checkpoint of this model."""
    if config.candidate_input != "embedding":
        raise UserError(
            "model.candidate_input='anchored' has no published counterpart, so its "
            "parameters cannot be exchanged with published checkpoints"
        )
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
        yield Entry("output.weight", ("output", "kernel"), None, True)
        return
    yield Entry("alpha", ("step_size",))
    yield Entry("langevin_dynamics_noise_std", ("noise_std",))
    if not config.tied_embedding:
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


def _at(params: PyTree, entry: Entry) -> Any:
    """The array of an entry; a view into the stacked blocks."""
    for key in entry.path:
        params = params[key]
    array = params[...] if entry.layer is None else params[entry.layer]
    return array if entry.part is None else array[:, entry.part]


def _apart(kernel: np.ndarray, heads: int | None) -> np.ndarray:
    """Columns of each head in our order: first of every pair, then the second ones."""
    if heads is None or kernel.ndim != 2 or kernel.shape[1] % (2 * heads):
        return kernel  # a wrong shape is reported by whoever compares it
    pairs = kernel.reshape(len(kernel), heads, -1, 2)
    return pairs.swapaxes(2, 3).reshape(kernel.shape)


def _together(kernel: np.ndarray, heads: int | None) -> np.ndarray:
    """The inverse of `_apart`."""
    if heads is None:
        return kernel
    halves = kernel.reshape(len(kernel), heads, 2, -1)
    return halves.swapaxes(2, 3).reshape(kernel.shape)
