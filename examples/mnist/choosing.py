"""Which configuration of a method is chosen for a size, and which can no longer be.

The paper's rule: the fewest examples on the mean, failed runs at the cap, among configurations of
which half the runs succeed; on the runs that are told. Ours: the lowest median, failed runs as
later than all others, then the lowest mean; on runs of their own.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Literal

from race import Lost, Row

Rule = Literal["mean", "median"]
Key = tuple[float, float]  # lower is better


def key(values: Sequence[float], rule: Rule, cap: float) -> Key:
    """What configurations are compared by. `values` are examples of runs, infinite if failed."""
    capped = statistics.fmean([min(v, cap) for v in values])
    if rule == "mean":
        enough = 2 * sum(math.isfinite(v) for v in values) >= len(values)
        return (0.0 if enough else 1.0, capped)
    return (statistics.median(values), capped)


def chosen(rows: Sequence[Row], configs: int, target: int, rule: Rule, cap: float) -> int:
    """The configuration for a size, the first among equals."""
    return min(range(configs), key=lambda c: (*key(reached(rows, c, target), rule, cap), c))


def reached(rows: Sequence[Row], config: int, target: int) -> list[float]:
    """Examples of the runs of a configuration at a size; infinite where one failed or was left."""
    return [math.inf if row["examples"] is None else row["examples"]
            for row in of(rows, config, target)]  # fmt: skip


def of(rows: Sequence[Row], config: int, target: int) -> list[Row]:
    """The rows of a configuration at a size, by seed."""
    mine = [row for row in rows if row["config"] == config and row["target"] == target]
    return sorted(mine, key=lambda row: row["seed"])


def losing(
    configs: int, sizes: Sequence[int], rule: Rule, cap: float, *, ends: bool
) -> Lost | None:
    """Which configurations are out of each size's race: their best case is worse than another's
    worst case. None where there is nothing to choose. With `ends` the last one left is out too: who
    is chosen is known, and its runs are not the ones that are told."""
    if configs < 2:
        return None

    def lost(
        rows: Sequence[Row], running: Sequence[tuple[int, int, int]], at_least: int
    ) -> set[tuple[int, int]]:
        found: set[tuple[int, int]] = set()
        for target in sizes:
            best, worst = [], []
            for config in range(configs):
                open_ = sum((c, t) == (config, target) for c, _, t in running)
                done = reached(rows, config, target)
                best.append(key([*done, *[float(at_least)] * open_], rule, cap))
                worst.append(key([*done, *[math.inf] * open_], rule, cap))
            limit = min(worst)
            out = {c for c in range(configs) if best[c] > limit}
            found |= {(c, target) for c in range(configs)
                      if c in out or (ends and len(out) == configs - 1)}  # fmt: skip
        return found

    return lost
