"""The law `L(x) = floor + scale x^-exponent`, fitted to losses.

What is made small is Huber's loss of `log y - log L(x)`. For a given exponent the law
is linear in floor and scale, so these follow from the exponent by a few reweighted
linear least squares (variable projection: Golub and Pereyra, 1973), for as many
exponents, or data sets, at once as one likes. The exponent is looked for on a grid that
zooms in, which has no starting point to depend on; `scipy.optimize.least_squares`
finishes with exact derivatives.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import numpy as np
from scipy import optimize

ROUNDS = 12  # of reweighting, at most
SETTLED = 1e-8  # relative change of a law's losses that ends the rounds
ZOOM_POINTS, ZOOM_LEVELS = 17, 5  # each level is an eighth of the one before
FLAT, STEEP = 1e-3, 15.0  # exponents looked at, times the logarithm of a range of x
HUBER = 2.0  # robust standard deviations beyond which a residual counts less
GROSS = 0.5  # residuals that are made small in y rather than in log y
LEAST_SPREAD = 1e-7  # of residuals, for curves without noise
TERMS = 3  # floor, scale, exponent


class Points(NamedTuple):
    """Losses of one method.

    Attributes:
      x: `[points]`, positive.
      y: `[points]`, positive; several at an x are of different seeds.
    """

    x: np.ndarray
    y: np.ndarray


class Law(NamedTuple):
    """`floor + scale (x / center)^-exponent`.

    Attributes:
      floor: c, the loss that no x gets below; 0 or more.
      scale: what is above it at `center`.
      exponent: b.
      center: geometric mean of the points' x, which keeps numbers moderate.
    """

    floor: float
    scale: float
    exponent: float
    center: float

    @property
    def coefficient(self) -> float:
        """a of `c + a x^-b`."""
        return float(self.scale * self.center**self.exponent)

    def __call__(self, x: np.ndarray | float) -> np.ndarray:
        """The loss at x."""
        u = np.log(np.asarray(x, float) / self.center)
        return self.floor + self.scale * np.exp(-self.exponent * u)


class Projection(NamedTuple):
    """The best laws of given exponents.

    Attributes:
      floor: `[...]`.
      scale: `[...]`.
      loss: `[...]`, the sum of Huber's losses.
    """

    floor: np.ndarray
    scale: np.ndarray
    loss: np.ndarray


class Fit(NamedTuple):
    """A fitted law.

    Attributes:
      law: it.
      residuals: `[points]`, `log y - log L(x)`.
      delta: residuals beyond which Huber's loss is linear.
      loss: the sum of Huber's losses.
    """

    law: Law
    residuals: np.ndarray
    delta: float
    loss: float


def huber(residuals: np.ndarray, delta: float) -> np.ndarray:
    """`r^2 / 2`, beyond delta linear."""
    size = np.abs(residuals)
    return np.where(size <= delta, size**2 / 2, delta * (size - delta / 2))


def influence(residuals: np.ndarray, delta: float) -> np.ndarray:
    """The derivative of `huber`."""
    return np.clip(residuals, -delta, delta)


def exponent_range(x: np.ndarray) -> tuple[float, float]:
    """The exponents that points can tell apart.

    Below the first the law is a straight line in log x, above the second all but the
    smallest x are at the floor.
    """
    u = np.unique(np.log(x))
    return FLAT / (u[-1] - u[0]), STEEP / (u[1] - u[0])


def project(
    u: np.ndarray,
    y: np.ndarray,
    exponent: np.ndarray,
    delta: float,
    floor: np.ndarray | float | None = None,
) -> Projection:
    """The best floor and scale for each exponent.

    Args:
      u: `[points]`, logarithms of x from their mean.
      y: `[..., points]`, losses.
      exponent: `[...]`.
      delta: of `huber`.
      floor: `[...]`, where it is given, too.
    """
    e = np.exp(-exponent[..., None] * u)
    target = y
    fitted = np.broadcast_to(y, e.shape)  # the first round has relative residuals
    weight = 1 / fitted**2
    log_y = np.log(y)
    c = a = residuals = np.zeros(())
    for _ in range(ROUNDS):
        if floor is None:
            c, a = _non_negative(weight, e, target)
        else:
            c = np.broadcast_to(np.asarray(floor, float), e.shape[:-1])
            a = np.sum(weight * e * (target - c[..., None]), -1)
            a = a / np.sum(weight * e**2, -1)
            a = np.maximum(a, 1e-12 * np.min(y, -1))
        before, fitted = fitted, c[..., None] + a[..., None] * e
        residuals = log_y - np.log(fitted)
        if np.all(np.abs(fitted - before) <= SETTLED * fitted):
            break
        size = np.maximum(np.abs(residuals), 1e-300)
        near = size < GROSS  # elsewhere log y is no straight line on the way to L
        weight = np.minimum(1.0, delta / size) / np.where(near, fitted, y) ** 2
        target = np.where(near, fitted * (1 + residuals), y)
    return Projection(c, a, huber(residuals, delta).sum(-1))


def best_exponent(
    u: np.ndarray,
    y: np.ndarray,
    span: tuple[float, float],
    delta: float,
    floor: np.ndarray | float | None = None,
) -> np.ndarray:
    """`[...]`, the exponent of the best law of each data set.

    Args:
      u: as for `project`.
      y: `[..., points]`.
      span: of `exponent_range`.
      delta: of `huber`.
      floor: `[...]`, where it is given.
    """
    given = None if floor is None else np.asarray(floor, float)[..., None]
    return zoom(
        lambda exponents: project(u, y[..., None, :], exponents, delta, given).loss,
        span,
        np.broadcast_shapes(y.shape[:-1], () if floor is None else np.shape(floor)),
    )


def zoom(loss_of, span: tuple[float, float], shape: tuple[int, ...]) -> np.ndarray:
    """The positive arguments of least loss, on grids that get finer.

    Args:
      loss_of: `[*shape, grid]` arguments -> their losses.
      span: least and largest argument.
      shape: of the result.
    """
    low, high = np.full(shape, np.log(span[0])), np.full(shape, np.log(span[1]))
    steps = np.linspace(0, 1, ZOOM_POINTS)
    best = low
    for _ in range(ZOOM_LEVELS):
        grid = low[..., None] + (high - low)[..., None] * steps
        at = np.argmin(loss_of(np.exp(grid)), -1)[..., None]
        take = lambda i, grid=grid: np.take_along_axis(grid, i, -1)[..., 0]
        best = take(at)
        low = take(np.maximum(at - 1, 0))
        high = take(np.minimum(at + 1, ZOOM_POINTS - 1))
    return np.exp(best)


def fit_law(points: Points) -> Fit:
    """The law that fits best.

    Args:
      points: at three or more different x.
    """
    center = float(np.exp(np.mean(np.log(points.x))))
    u, y = np.log(points.x / center), points.y
    span = exponent_range(points.x)
    spare = max(len(y) - TERMS, 1)
    delta = np.inf
    for _ in range(3):  # the spread of the residuals decides what an outlier is
        exponent = best_exponent(u, y, span, delta)
        found = project(u, y, exponent, delta)
        residuals = np.log(y) - np.log(
            found.floor + found.scale * np.exp(-exponent * u)
        )
        delta = HUBER * spread(residuals, spare)
    start = np.array([found.floor, found.scale, exponent])
    law = Law(*_polished(u, y, start, delta), center)
    residuals = np.log(y) - np.log(law(points.x))
    return Fit(law, residuals, delta, float(huber(residuals, delta).sum()))


def spread(residuals: np.ndarray, spare: int) -> float:
    """Standard deviation of residuals, from their median size.

    Args:
      residuals: `[points]`.
      spare: their number less that of the fitted terms.
    """
    middle = 1.4826 * np.median(np.abs(residuals))
    return max(float(middle) * (len(residuals) / spare) ** 0.5, LEAST_SPREAD)


def _polished(
    u: np.ndarray, y: np.ndarray, start: np.ndarray, delta: float
) -> tuple[float, float, float]:
    """Floor, scale and exponent at the bottom of Huber's loss, next to a start."""
    log_y = np.log(y)

    def residuals(terms: np.ndarray) -> np.ndarray:
        floor, scale, exponent = terms
        return np.log(floor + scale * np.exp(-exponent * u)) - log_y

    def jacobian(terms: np.ndarray) -> np.ndarray:
        floor, scale, exponent = terms
        e = np.exp(-exponent * u)
        return np.stack([np.ones_like(e), e, -scale * u * e], -1) / (
            floor + scale * e
        ).reshape(-1, 1)

    tiny = 1e-12 * float(np.min(y))
    found = optimize.least_squares(
        residuals,
        np.maximum(start, [tiny, tiny, 1e-9]),
        cast(Any, jacobian),  # its stub knows of names alone
        bounds=([0.0, 0.0, 0.0], np.inf),
        loss="huber",
        f_scale=delta,
        x_scale=np.maximum(start, [0.01 * float(np.min(y)), tiny, 1e-9]),
        xtol=1e-12,
        ftol=1e-14,
        gtol=1e-14,
    )
    begun = huber(residuals(start), delta).sum()
    best = found.x if found.cost < begun else start
    return float(best[0]), float(best[1]), float(best[2])


def _non_negative(
    weight: np.ndarray, e: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted least squares of `target` by `c + a e`, neither c nor a below 0."""
    w, we = weight.sum(-1), (weight * e).sum(-1)
    wee = (weight * e**2).sum(-1)
    wt, wet = (weight * target).sum(-1), (weight * e * target).sum(-1)
    determinant = np.maximum(w * wee - we**2, 1e-14 * w * wee)
    c = (wee * wt - we * wet) / determinant
    a = (w * wet - we * wt) / determinant
    # Outside, the best is at one of the edges.
    a = np.where(c < 0, wet / wee, a)
    c = np.maximum(c, 0.0)
    c = np.where(a < 0, wt / w, c)
    return c, np.maximum(a, 1e-12 * target.min(-1))
