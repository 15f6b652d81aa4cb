"""Published arrays, and where they live in our parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ebt_jax.refine import PyTree


@dataclasses.dataclass(frozen=True)
class Entry:
    """One published array and where it lives in our parameters.

    Attributes:
      name: the published name.
      path: keys into the parameter dict.
      layer: index into the stacked blocks, or None.
      transpose: whether theirs is the transpose of ours.
      part: index into the maps of a fused kernel `[dim, parts, features]`, or None.
      heads: of a kernel whose columns rotary positions turn in pairs: their number.
        Theirs pairs neighbours, ours pairs a head's first half with its second.
      shape: of theirs where ours has its numbers in other axes; else None.
      axes: of theirs with a `shape`, in the order in which ours joins or splits them.
    """

    name: str
    path: tuple[str, ...]
    layer: int | None = None
    transpose: bool = False
    part: int | None = None
    heads: int | None = None
    shape: tuple[int, ...] | None = None
    axes: tuple[int, ...] = ()

    def place(self, params: PyTree) -> Any:
        """Our array; a view into the stacked blocks."""
        for key in self.path:
            params = params[key]
        array = params[...] if self.layer is None else params[self.layer]
        return array if self.part is None else array[:, self.part]

    def published_shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of theirs, by that of ours."""
        if self.shape is not None:
            return self.shape
        return ours[::-1] if self.transpose else ours

    def to_ours(self, theirs: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Our array from theirs, which has its `published_shape`."""
        if self.shape is not None:
            return theirs.transpose(self.axes).reshape(shape)
        return _apart(theirs.T if self.transpose else theirs, self.heads)

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`."""
        if self.shape is not None:
            permuted = [self.shape[axis] for axis in self.axes]
            return ours.reshape(permuted).transpose(np.argsort(self.axes))
        ours = _together(ours, self.heads)
        return ours.T if self.transpose else ours


def _apart(kernel: np.ndarray, heads: int | None) -> np.ndarray:
    """Columns of each head in our order: first of every pair, then the second ones."""
    if heads is None:
        return kernel
    pairs = kernel.reshape(len(kernel), heads, -1, 2)
    return pairs.swapaxes(2, 3).reshape(kernel.shape)


def _together(kernel: np.ndarray, heads: int | None) -> np.ndarray:
    """The inverse of `_apart`."""
    if heads is None:
        return kernel
    halves = kernel.reshape(len(kernel), heads, 2, -1)
    return halves.swapaxes(2, 3).reshape(kernel.shape)
