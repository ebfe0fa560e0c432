"""What it costs to remove neurons: curves over the share of the score that goes with them.

There are too many neurons to try each. They go in the order of their scores, and what it costs is
measured after a few shares of them went, in each layer.
With s the share of the layer's summed score that has gone, the rise of the loss is taken to be
c s^b between two trials: the power law through both. Before the first trial and after the last, b
is one number for the whole model.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SHARES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7)  # of a layer's neurons, tried in some layers
# Those tried in each. Beyond the last a curve is drawn towards the price of the whole half, which
# few layers come near: with nothing tried beyond 0.5, half of the layers stopped at just that.
PROBES = (0.2, 0.35, 0.5, 0.7)
KNOTS = (*SHARES, 0.6, 0.8, 0.9)  # where a curve bends
Points = Sequence[tuple[float, float]]  # share of the summed score, rise of the loss


@dataclass(frozen=True)
class Curve:
    """The rise of the loss, in nats per token, against the share of the summed score that went.

    Straight between its knots and beyond the last, rising and convex: what is removed next never
    costs less than what was removed before.
    """

    group: str
    layer: int
    knots: tuple[tuple[float, float], ...]
    tried: tuple[tuple[int, float], ...]  # neurons removed, what it really cost

    def at(self, shares: Tensor) -> Tensor:
        """The rise at each share, float64."""
        x, y = (torch.tensor(v, dtype=torch.float64) for v in zip(*self.knots, strict=True))
        slopes = y.diff() / x.diff()
        place = (torch.searchsorted(x, shares.double(), right=True) - 1).clamp(0, len(slopes) - 1)
        return y[place] + slopes[place] * (shares.double() - x[place])

    def by_units(self, scores: Tensor) -> Tensor:
        """The rise once the m lowest-scored neurons went, for m from 0 to all, (size + 1,)."""
        return self.at(gone(scores))


def gone(scores: Tensor) -> Tensor:
    """The share of the summed score that goes with the m lowest, (size + 1,) float64."""
    ordered = scores.double().clamp(min=0).sort().values
    total = float(ordered.sum())
    if total <= 0:
        return torch.linspace(0, 1, len(scores) + 1, dtype=torch.float64)
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), ordered.cumsum(0)]) / total
    sums[-1] = 1.0
    return sums


def exponent(layers: Sequence[Points]) -> float:
    """The b of c s^b that fits all layers best, each with its own c; at least 1, so convex.

    Least squares of logarithms over the points that cost something; 2 where they do not tell.
    """
    top = bottom = 0.0
    for points in layers:
        logs = [(math.log(s), math.log(d)) for s, d in points if s > 0 and d > 0]
        if len(logs) < 2:
            continue
        mean = [sum(v) / len(logs) for v in zip(*logs, strict=True)]
        top += sum((x - mean[0]) * (y - mean[1]) for x, y in logs)
        bottom += sum((x - mean[0]) ** 2 for x, _ in logs)
    return max(1.0, top / bottom) if bottom > 0 else 2.0


def curve(
    group: str,
    layer: int,
    scores: Tensor,
    tried: Mapping[int, float],
    *,
    power: float,
    whole: float | None = None,
) -> Curve:
    """The curve of a group from the numbers of neurons that were tried and what each cost.

    `whole` is what it costs to remove all of them, where that was tried. What cost nothing when it
    was tried tells nothing of what is near it, and is left out.
    """
    shares = gone(scores)
    known = [(float(shares[n]), d) for n, d in sorted(tried.items())]
    if whole is not None:
        known.append((1.0, whole))
    known = [(s, d) for s, d in known if s > 0 and d > 0]
    numbers = sorted({*tried, *(round(x * len(scores)) for x in KNOTS), len(scores)})
    points = [(float(shares[n]), _between(float(shares[n]), known, power)) for n in numbers]
    return Curve(group, layer, convex(points), tuple(sorted(tried.items())))


def _between(share: float, known: Points, power: float) -> float:
    """The power law through the two trials around the share, or through the one next to it."""
    below = [(s, d) for s, d in known if s <= share]
    above = [(s, d) for s, d in known if s > share]
    if not known or share <= 0:
        return 0.0
    if not below or not above:
        s, d = below[-1] if below else above[0]
        return float(d * (share / s) ** power)
    (s, d), (t, e) = below[-1], above[0]
    return float(d * (share / s) ** (math.log(e / d) / math.log(t / s)))


def convex(points: Points) -> tuple[tuple[float, float], ...]:
    """The knots of a rising convex line from (0, 0) near the points, ascending in both.

    Neighbouring slopes that fall are made one, their mean weighted by width, until none falls
    (pool adjacent violators).
    """
    pieces: list[tuple[float, float]] = []  # width, slope
    last, height = 0.0, 0.0
    for x, y in points:
        if x <= last:
            continue
        pieces.append((x - last, (y - height) / (x - last)))
        last, height = x, y
        while len(pieces) > 1 and pieces[-2][1] >= pieces[-1][1]:
            (w1, s1), (w2, s2) = pieces[-2:]
            pieces[-2:] = [(w1 + w2, (w1 * s1 + w2 * s2) / (w1 + w2))]
    knots = [(0.0, 0.0)]
    for width, slope in pieces or [(1.0, 0.0)]:
        x, y = knots[-1]
        knots.append((x + width, y + width * max(slope, 0.0)))
    return tuple(knots)
