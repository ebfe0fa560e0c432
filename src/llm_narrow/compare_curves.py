"""The loss of a run while it is trained, and when it comes to a given one.

A curve is of models that have their size already: what the lasso trains is still the whole model,
so its curve begins after it. Between two validations the loss is taken to fall straight in the
logarithm of the tokens, from the beginning to the first straight in the tokens, and never within
the first step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import page_runs
from .page_runs import Run
from .report import at

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """Of one run: tokens and loss, both (n,), and what its FLOPs follow from."""

    tokens: Floats
    loss: Floats
    step: float  # tokens of an optimizer step
    lasso: float  # tokens of the lasso, with which the curve begins
    calibration: int
    prices: tuple[float, float, float] | None  # before all; per token of the lasso, and after it

    def reached(self, target: float) -> float:
        """The tokens at which the loss first is at the target; inf if it never is."""
        below = np.flatnonzero(self.loss <= target)
        if not len(below):
            return math.inf
        n = int(below[0])
        if n == 0:
            return float(self.tokens[0])
        t0, t1 = float(self.tokens[n - 1]), float(self.tokens[n])
        l0, l1 = float(self.loss[n - 1]), float(self.loss[n])
        share = (l0 - target) / (l0 - l1)
        if n > 1 and t0 > 0:
            return float(t0 * (t1 / t0) ** share)
        return max(t0 + share * (t1 - t0), t0 + self.step)

    def flops(self, tokens: float) -> float | None:
        """Of all that the run did up to so many tokens."""
        if self.prices is None:
            return None
        before, drawn, after = self.prices
        return before + min(tokens, self.lasso) * drawn + max(0.0, tokens - self.lasso) * after


def curve_of(run: Run) -> Curve | None:
    """That of a run; None if it has none."""
    told = at(run.manifest, "compare")
    lasso = 0.0
    if (drawn := run.curves.get("lasso")) is not None:
        lasso = float(drawn["tokens"].max())
    after = run.curves.get("recover")
    if after is None:
        return None
    tokens, loss = page_runs.curve_points(after, "validation")
    if not len(tokens):
        return None
    flops = [at(told, "flops", name) for name in ("score", "refit", "lasso", "recover")]
    prices = None
    if all(isinstance(f, int | float) for f in flops):
        prices = float(flops[0] + flops[1]), float(flops[2]), float(flops[3])
    calibration = at(told, "calibration_tokens")
    return Curve(
        tokens + lasso, loss, float(after["tokens"].max() / max(1.0, after["step"].max())), lasso,
        calibration if isinstance(calibration, int) else 0, prices,
    )  # fmt: skip


def mean_of(curves: Sequence[Curve]) -> Curve | None:
    """The mean over seeds, as far as all of them reach; None of none."""
    if not curves:
        return None
    first, last = max(c.tokens[0] for c in curves), min(c.tokens[-1] for c in curves)
    grid = np.unique(np.concatenate([c.tokens for c in curves]))
    grid = grid[(grid >= first) & (grid <= last)]
    loss = np.mean([np.interp(grid, c.tokens, c.loss) for c in curves], axis=0)
    one = curves[0]
    return Curve(grid, loss, one.step, one.lasso, one.calibration, one.prices)


def bits_of(validation: Any) -> float | None:
    """Bits per byte of one nat per token of the validation blocks."""
    targets, size = at(validation, "targets"), at(validation, "bytes")
    if not (isinstance(targets, int) and isinstance(size, int) and size):
        return None
    return targets / size / math.log(2)


def times_fewer(own: Curve, theirs: Curve) -> float:
    """How many times fewer tokens to the other's best loss; inf for none at all, 0 for never."""
    best = int(theirs.loss.argmin())
    tokens = own.reached(float(theirs.loss[best]))
    if math.isinf(tokens):
        return 0.0
    return float(theirs.tokens[best]) / tokens if tokens else math.inf


def finite(value: float) -> float | None:
    """The value; None for inf and NaN, which JSON has not."""
    return value if math.isfinite(value) else None
