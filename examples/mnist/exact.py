"""The statistics of few runs, some of which failed: medians, means, and exact rank tests."""

import math
import random
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Reached = Sequence[float | None]  # examples of each run; None where it failed


def median(values: Reached) -> dict[str, Any]:
    """The median with failed runs as later than all others, and its interval by order statistics.

    As Kaplan and Meier's where all runs that failed were followed as long. A bound is None where it
    is a failed run. `coverage` is the exact one, of at least 95 % where there are 6 runs or more.
    """
    n = len(values)
    if not n:
        return {"value": None, "low": None, "high": None, "coverage": 0.0, "reached": 0, "of": 0,
                "values": []}  # fmt: skip
    ordered = sorted(math.inf if v is None else v for v in values)
    tails = [sum(math.comb(n, i) for i in range(k)) / 2**n for k in range(n // 2 + 1)]
    rank = max([k for k, tail in enumerate(tails) if k and tail <= 0.025], default=1)
    return {
        "value": finite(statistics.median(ordered)), "low": finite(ordered[rank - 1]),
        "high": finite(ordered[n - rank]), "coverage": 1 - 2 * tails[rank],
        "reached": sum(v is not None for v in values), "of": n, "values": list(values),
    }  # fmt: skip


def finite(value: float) -> float | None:
    """None for what is infinite."""
    return value if math.isfinite(value) else None


def mean(values: Reached, cap: float, *, draws: int = 2000, seed: int = 0) -> dict[str, Any]:
    """The mean with failed runs at the cap (the paper's), its 95 % bootstrap interval."""
    if not values:
        return {"value": None, "low": None, "high": None, "reached": 0, "of": 0, "values": []}
    capped = [cap if v is None else v for v in values]
    chance = random.Random(seed)
    means = sorted(statistics.fmean(chance.choices(capped, k=len(capped))) for _ in range(draws))
    return {
        "value": statistics.fmean(capped), "low": means[int(0.025 * draws)],
        "high": means[int(0.975 * draws) - 1],
        "reached": sum(v is not None for v in values), "of": len(values), "values": list(values),
    }  # fmt: skip


def rank_sum(a: Reached, b: Reached) -> float:
    """Two-sided p that `a` and `b` are as unlike by chance (Wilcoxon 1945).

    Over all ways to part the runs; equal ones share their mean rank, failed ones the last (Gehan
    1965).
    """
    if not a or not b:
        return 1.0
    both = [math.inf if v is None else v for v in (*a, *b)]
    ranks = [sum(x < v for x in both) + sum(x <= v for x in both) + 1 for v in both]  # doubled
    ways: list[Counter[int]] = [Counter({0: 1}), *(Counter() for _ in a)]
    for rank in ranks:
        for taken in range(len(a), 0, -1):
            for total, count in ways[taken - 1].items():
                ways[taken][total + rank] += count
    middle = len(a) * (len(both) + 1)
    here = abs(sum(ranks[: len(a)]) - middle)
    return sum(n for t, n in ways[-1].items() if abs(t - middle) >= here) / ways[-1].total()


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


def tested(test: str, p: float, **about: Any) -> Mapping[str, Any]:
    """A line of the tests of an experiment."""
    return {"test": test, **about, "p": p}
