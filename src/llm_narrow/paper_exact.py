"""The statistics that judgements need beside those that results bring along."""

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

# Quantiles of Student's t that hold 95 %, by degrees of freedom from 1; beyond, the last one.
STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def mean(values: Sequence[float]) -> dict[str, Any]:
    """The mean and its 95 % interval by Student's t; without one below two values."""
    n = len(values)
    if n < 2:
        return {"value": values[0] if n else None, "low": None, "high": None, "of": n}
    middle = fmean(values)
    half = STUDENT[min(n - 1, len(STUDENT)) - 1] * stdev(values) / math.sqrt(n)
    return {"value": middle, "low": middle - half, "high": middle + half, "of": n}


def sign_test(above: int, below: int) -> float:
    """Two-sided p that so many of all fall on one side by chance; ties are left out."""
    of = above + below
    if not of:
        return 1.0
    tail = sum(math.comb(of, i) for i in range(min(above, below) + 1))
    return float(min(1.0, 2 * tail / 2**of))


def rank_sum(a: Sequence[float], b: Sequence[float]) -> tuple[float, bool]:
    """Two-sided exact p of Wilcoxon's rank sum, and whether `a` has the higher ranks.

    Equal values share their mean rank; infinite ones are last.
    """
    both = [*a, *b]
    doubled = [sum(x < v for x in both) + sum(x <= v for x in both) + 1 for v in both]
    ways: list[Counter[int]] = [Counter({0: 1}), *(Counter() for _ in a)]
    for rank in doubled:
        for taken in range(len(a), 0, -1):
            for total, count in ways[taken - 1].items():
                ways[taken][total + rank] += count
    middle, here = len(a) * (len(both) + 1), sum(doubled[: len(a)])
    rare = sum(n for t, n in ways[-1].items() if abs(t - middle) >= abs(here - middle))
    return rare / ways[-1].total(), here > middle
