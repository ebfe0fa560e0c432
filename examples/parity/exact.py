"""The statistics of few seeds: exact tests and intervals, with nothing drawn but the bootstrap."""

import itertools
import math
import random
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


def fisher(a: int, of_a: int, b: int, of_b: int) -> float:
    """Two-sided p that `a` of `of_a` and `b` of `of_b` are as unlike by chance (Fisher 1922).

    The chance of all tables with the same margins that are at most as likely as this one.
    """
    both, total = a + b, of_a + of_b

    def ways(x: int) -> int:
        return math.comb(of_a, x) * math.comb(of_b, both - x)

    possible = range(max(0, both - of_b), min(of_a, both) + 1)
    here = ways(a)
    return sum(w for x in possible if (w := ways(x)) <= here) / math.comb(total, both)


def share(k: int, n: int) -> dict[str, Any]:
    """k of n, and the 95 % interval of the share (Wilson 1927)."""
    z = 1.959963984540054
    if not n:
        return {"count": k, "of": n, "share": None, "low": 0.0, "high": 1.0}
    p, square = k / n, z * z
    middle = (p + square / (2 * n)) / (1 + square / n)
    half = z * math.sqrt(p * (1 - p) / n + square / (4 * n * n)) / (1 + square / n)
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return {"count": k, "of": n, "share": p, "low": low, "high": high}


def sign_test(above: int, of: int) -> float:
    """Two-sided p that `above` of `of` coins (ties left out) fall on one side by chance."""
    if not of:
        return 1.0
    rare = min(above, of - above)
    return min(1.0, 2 * sum(math.comb(of, i) for i in range(rare + 1)) / 2**of)


def trend(rows: Sequence[Sequence[float]]) -> float:
    """One-sided p that values rise along the rows (Page 1963), over all orders within each row.

    Ranks of equal values are their mean.
    """
    chance: Counter[int] = Counter({0: 1})
    here = 0
    for row in rows:
        ranks = doubled_ranks(row)
        here += sum(i * r for i, r in enumerate(ranks, 1))
        of_row = Counter(
            sum(i * r for i, r in enumerate(order, 1)) for order in itertools.permutations(ranks)
        )
        summed: Counter[int] = Counter()
        for (x, n), (y, m) in itertools.product(chance.items(), of_row.items()):
            summed[x + y] += n * m
        chance = summed
    return sum(n for x, n in chance.items() if x >= here) / chance.total()


def doubled_ranks(row: Sequence[float]) -> list[int]:
    """Twice the rank of each value from 1, equal ones sharing their mean, so whole numbers."""
    return [sum(x < v for x in row) + sum(x <= v for x in row) + 1 for v in row]


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, between -1 and 1; 0 where one does not vary."""
    ranks = [doubled_ranks(a), doubled_ranks(b)]
    if any(len(set(r)) == 1 for r in ranks):
        return 0.0
    return statistics.correlation(*ranks)


def mean(values: Sequence[float], *, draws: int = 2000, seed: int = 0) -> dict[str, Any]:
    """The mean, its 95 % bootstrap interval over the values, and the values."""
    if not values:
        return {"value": None, "low": None, "high": None, "values": []}
    chance = random.Random(seed)
    means = sorted(statistics.fmean(chance.choices(values, k=len(values))) for _ in range(draws))
    low, high = means[int(0.025 * draws)], means[int(0.975 * draws) - 1]
    return {"value": statistics.fmean(values), "low": low, "high": high, "values": list(values)}


def middle(values: Sequence[float]) -> dict[str, float | None]:
    """Median, smallest and largest; None of nothing."""
    if not values:
        return {"median": None, "least": None, "most": None}
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def tested(test: str, p: float, **about: Any) -> Mapping[str, Any]:
    """A line of the tests of an experiment."""
    return {"test": test, **about, "p": p}
