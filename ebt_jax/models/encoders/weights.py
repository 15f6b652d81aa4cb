"""Published weights of encoders: files, names, and what does not fit.

Each encoder says, array by array, where a published layout keeps what its parameters
need; whatever is missing, left over or of another shape is named.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pathlib
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np

from ebt_jax.errors import UserError

_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")

# Permutations of their axes that make them ours.
LINEAR = (1, 0)  # theirs are [out, in]
CONV = (2, 3, 1, 0)  # theirs are [out, in, height, width]


class Entry(NamedTuple):
    """One published array, or a part of one, and where it lives in our parameters.

    Attributes:
      name: the published name.
      path: keys into the parameter dict.
      axes: permutation of their axes that makes them ours; None: as they are.
      part: (index, parts) where theirs stacks several of ours along its first axis.
    """

    name: str
    path: tuple[str, ...]
    axes: tuple[int, ...] | None = None
    part: tuple[int, int] = (0, 1)


@dataclasses.dataclass(frozen=True)
class Weights:
    """The arrays of a file, and whose weights they are meant to be.

    Attributes:
      arrays: names to arrays.
      path: the file.
      kind: the model and its known layouts, for messages.
    """

    arrays: Mapping[str, np.ndarray]
    path: str
    kind: str

    def refuse(self, reason: str) -> NoReturn:
        """Raises a `UserError` that says why the file is not taken."""
        raise UserError(f"{self.path} {reason}; give the weights of {self.kind}")

    def shape(self, name: str, axes: int) -> tuple[int, ...]:
        """The shape of an array, which has to be there and have so many axes."""
        if name not in self.arrays:
            self.refuse(f"has no array {name!r}")
        shape = self.arrays[name].shape
        if len(shape) != axes:
            self.refuse(f"has {name!r} of shape {shape}, where {axes} axes are needed")
        return shape

    def count(self, pattern: str) -> int:
        """How many names there are of a pattern with 0, 1, 2, ... in place of {}."""
        number = 0
        while pattern.format(number) in self.arrays:
            number += 1
        return number

    def without(self, *prefixes: str) -> Weights:
        """The arrays whose names start with none of the prefixes."""
        kept = {k: v for k, v in self.arrays.items() if not k.startswith(prefixes)}
        return dataclasses.replace(self, arrays=kept)

    def below(self, prefix: str) -> Weights:
        """The arrays below a prefix, without it; all where none is below it."""
        kept = {
            name.removeprefix(prefix): array
            for name, array in self.arrays.items()
            if name.startswith(prefix)
        }
        return dataclasses.replace(self, arrays=kept) if kept else self


def linear(
    name: str, path: tuple[str, ...], axes: tuple[int, ...] = LINEAR, joint: str = "."
) -> Iterator[Entry]:
    """The two arrays of a linear map or, with `axes=CONV`, of a convolution."""
    yield Entry(f"{name}{joint}weight", (*path, "kernel"), axes)
    yield Entry(f"{name}{joint}bias", (*path, "bias"))


def norm(name: str, path: tuple[str, ...]) -> Iterator[Entry]:
    """The two arrays of a normalisation."""
    yield Entry(f"{name}.weight", (*path, "scale"))
    yield Entry(f"{name}.bias", (*path, "bias"))


def convert(weights: Weights, entries: Iterable[Entry], shapes: Any) -> dict[str, Any]:
    """Parameters from published arrays.

    Args:
      weights: the published arrays.
      entries: where each of our arrays comes from.
      shapes: the parameters' shapes, as `jax.eval_shape` of `init` returns them.

    Returns:
      A nested dict of float32 NumPy arrays.

    Raises:
      UserError: naming the first array that is missing, not expected, or of another
        shape.
    """
    params = jax.tree.map(lambda s: np.empty(s.shape, np.float32), shapes)
    known = set()
    for entry in entries:
        place = params
        for key in entry.path[:-1]:
            place = place[key]
        needed = _published_shape(entry, place[entry.path[-1]].shape)
        if entry.name not in weights.arrays:
            weights.refuse(f"has no array {entry.name!r}")
        # Some files keep a linear map as a convolution of one pixel.
        shape = weights.arrays[entry.name].shape
        if shape != needed and shape != (*needed, 1, 1):
            weights.refuse(
                f"has {entry.name!r} of shape {shape}, where {needed} is needed"
            )
        index, parts = entry.part
        array = weights.arrays[entry.name].reshape(needed)
        array = np.split(array, parts)[index]
        array = array if entry.axes is None else array.transpose(entry.axes)
        place[entry.path[-1]][...] = array
        known.add(entry.name)
    for name in weights.arrays:
        if name not in known:
            weights.refuse(f"has an array {name!r} that nothing is known of")
    return params


def read(path: str, kind: str) -> Weights:
    """The arrays of a file.

    Args:
      path: `.safetensors`, `.npz`, or PyTorch's `.pt`, `.pth`, `.bin` or `.ckpt`, whose
        `state_dict` is taken where there is one; TorchScript archives too.
      kind: the model whose weights they are meant to be, for messages.

    Raises:
      UserError: if the file is missing, damaged, of another kind, or its reader is not
        installed.
    """
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{path!r} is not a file; give the weights of {kind}")
    if file.suffix not in (".npz", ".safetensors", *_TORCH_SUFFIXES):
        raise UserError(
            f"{path!r} has suffix {file.suffix!r}, expected .safetensors, .npz, "
            f"{', '.join(_TORCH_SUFFIXES[:-1])} or {_TORCH_SUFFIXES[-1]}"
        )
    try:
        arrays = _read_arrays(file)
    except ImportError as error:
        package = "safetensors" if file.suffix == ".safetensors" else "torch"
        raise UserError(
            f"reading {file.suffix} needs {package}: `pip install 'ebt-jax[torch]'`"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # each reader has exceptions of its own
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} cannot be read as {file.suffix} ({reason}); it may be damaged, "
            "fetch it again or save its arrays as .safetensors"
        ) from error
    return Weights(arrays, path, kind)


def compiled(function: Callable[..., Any], params: Any) -> Callable[..., Any]:
    """An encoder's function, jitted, its parameters on the default device.

    Inside a jitted closure they would be constants of the program, which then takes
    several times as long to compile; NumPy arrays would travel with every call.

    Args:
      function: (params, *inputs) -> outputs.
      params: its parameters.
    """
    return functools.partial(jax.jit(function), jax.device_put(params))


def _read_arrays(file: pathlib.Path) -> dict[str, np.ndarray]:
    if file.suffix == ".npz":
        with file.open("rb") as opened, np.load(opened) as arrays:
            return dict(arrays)
    if file.suffix == ".safetensors":
        return importlib.import_module("safetensors.numpy").load_file(file)
    # Not a plain import: type checkers need not have torch.
    torch = importlib.import_module("torch")
    if _is_torchscript(file):
        state = torch.jit.load(file, map_location="cpu").state_dict()
    else:
        state = torch.load(file, map_location="cpu", weights_only=True)
        state = state["state_dict"] if "state_dict" in state else state
    return {name: tensor.float().numpy() for name, tensor in state.items()}


def _is_torchscript(file: pathlib.Path) -> bool:
    """OpenAI publishes its CLIP models as programs, which hold weights as well."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _published_shape(entry: Entry, ours: tuple[int, ...]) -> tuple[int, ...]:
    theirs = list(ours)
    if entry.axes is not None:
        for place, axis in enumerate(entry.axes):
            theirs[axis] = ours[place]
    return (theirs[0] * entry.part[1], *theirs[1:])
