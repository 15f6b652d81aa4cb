"""Pictures of slices of energy landscapes: static SVG around a small PNG."""

from __future__ import annotations

import base64
import io

import numpy as np
from jax.typing import ArrayLike
from matplotlib import image
from matplotlib.figure import Figure

from ebt_jax.evaluation.analysis import Slice

WIDTH, HEIGHT = 360, 300  # of the picture, in its own units
LEFT, RIGHT, TOP, BOTTOM = 44, 348, 8, 262  # of the map in it
COLOURS = "viridis"  # readable without colour vision
LEVELS = 9  # contour lines


def landscape_svg(plane: Slice, description: str) -> str:
    """A heat map of the energies with the refinement's path.

    Args:
      plane: of one prediction, without batch axes.
      description: for who does not see it, HTML.
    """
    x, y = np.asarray(plane.x, float), np.asarray(plane.y, float)
    across = lambda v: LEFT + (v - x[0]) / (x[-1] - x[0]) * (RIGHT - LEFT)
    up = lambda v: BOTTOM - (v - y[0]) / (y[-1] - y[0]) * (BOTTOM - TOP)
    path = [(float(across(px)), float(up(py))) for px, py in np.asarray(plane.path)]
    target = float(across(plane.target[0])), float(up(plane.target[1]))
    line = "M" + "L".join(f"{px:.1f},{py:.1f}" for px, py in path)
    return "\n".join(
        [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            f'aria-label="{description}">',
            f'<image href="{_picture(plane.energy)}" x="{LEFT}" y="{TOP}" '
            f'width="{RIGHT - LEFT}" height="{BOTTOM - TOP}" '
            'preserveAspectRatio="none"/>',
            *_contours(x, y, np.asarray(plane.energy), across, up),
            *_ticks(x, y, across, up),
            f'<path class="under" d="{line}"/><path class="way" d="{line}"/>',
            *(
                f'<circle class="point" cx="{px:.1f}" cy="{py:.1f}" r="2.5"/>'
                for px, py in path[1:-1]
            ),
            _named("start", *path[0], "circle"),
            _named("end", *path[-1], "square"),
            _named("right token", *target, "star"),
            "</svg>",
        ]
    )


def _picture(energy: ArrayLike) -> str:
    """A PNG as a data URI, a pixel for each point; the browser smooths it."""
    file = io.BytesIO()
    energy = np.asarray(energy)
    finite = np.where(np.isfinite(energy), energy, np.nan)
    image.imsave(file, finite, format="png", cmap=COLOURS, origin="lower")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _contours(x, y, energy, across, up) -> list[str]:
    if not np.isfinite(energy).all() or np.ptp(energy) == 0:
        return []
    found = Figure().subplots().contour(x, y, energy, levels=LEVELS)
    lines = [
        "M" + "L".join(f"{across(px):.1f},{up(py):.1f}" for px, py in polygon)
        for path in found.get_paths()
        for polygon in map(np.asarray, path.to_polygons(closed_only=False))
    ]
    return [f'<path class="contour" d="{line}"/>' for line in lines]


def _ticks(x, y, across, up) -> list[str]:
    """Distances along both axes."""
    places = [(across(v), BOTTOM + 15, "middle", v) for v in _ticks_of(x)]
    places += [(LEFT - 5, up(v) + 4, "end", v) for v in _ticks_of(y)]
    marks = [
        f'<text x="{px:.1f}" y="{py:.1f}" text-anchor="{anchor}">{value:.3g}</text>'
        for px, py, anchor, value in places
    ]
    middle = (LEFT + RIGHT) / 2
    return [
        *marks,
        f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">'
        "distance from the start towards the end</text>",
    ]


def _ticks_of(values: np.ndarray) -> np.ndarray:
    """Round numbers that an axis covers, about four."""
    low, high = values[0], values[-1]
    raw = (high - low) / 4
    power = 10.0 ** np.floor(np.log10(raw))
    step = next(unit for unit in (1, 2, 5, 10) if unit * power >= raw) * power
    # 0 + takes the sign from a zero that came from below.
    return 0 + np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step


def _named(name: str, x: float, y: float, shape: str) -> str:
    """A mark with its name, on the side where there is room."""
    marks = {
        "circle": f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="5"/>',
        "square": f'<rect class="point" x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" '
        'height="10"/>',
        "star": f'<path class="point" transform="translate({x:.1f},{y:.1f})" '
        'd="M0,-8L2,-2.5L8,-2.5L3.2,1L5,7L0,3.3L-5,7L-3.2,1L-8,-2.5L-2,-2.5Z"/>',
    }
    before = x > (LEFT + RIGHT) / 2
    anchor, dx = ("end", -6) if before else ("start", 6)
    dy = 20 if shape == "square" else -10
    return (
        f'{marks[shape]}<text class="name" x="{x + dx:.1f}" y="{y + dy:.1f}" '
        f'text-anchor="{anchor}">{name}</text>'
    )
