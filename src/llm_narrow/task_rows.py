"""What verdicts on programming problems come to: pass@k, intervals, differences, as rows.

pass@k is the chance that at least one of k samples passes, estimated without bias from n ≥ k
samples of which c passed: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, equation 1).
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch

from .errors import BadInput
from .measure import bootstrap
from .models import Loaded
from .passing import TOO_LONG, Asking, Verdict
from .rows import Estimate
from .tasks import Prompt

Z = 1.959964  # of a 95 % interval


@dataclass(frozen=True)
class Difference:
    """pass@k less that of the first model by k, problems paired, with its bootstrap interval.

    Of greedy answers also the problems that only this one (`won`) and only the first (`lost`)
    solves, and the p-value of McNemar's exact test that both are equally likely.
    """

    pass_at: dict[int, Estimate]
    won: int | None = None
    lost: int | None = None
    p: float | None = None


@dataclass(frozen=True)
class TaskRow:
    """How one model does on one set of problems, asked in one way. Estimates are over problems.

    `parsed` is the share of completions that are Python at all, `whole` of those that ended by
    themselves, `kinds` what came of how many. `too_long` are the problems whose prompts fill the
    context of the model, which count as failed. `answers` is the file with all verdicts.
    """

    task: str
    model: str
    sha256: str
    prompt: Prompt
    temperature: float
    samples: int
    problems: int
    pass_at: dict[int, Estimate]
    parsed: Estimate
    whole: Estimate
    kinds: dict[str, int]
    too_long: tuple[str, ...]
    tokens: int
    tokens_per_second: float | None
    answers: str
    difference: Difference | None = None

    def to_dict(self) -> dict[str, Any]:
        """Flat and JSON-able: an estimate `whole` becomes `whole`, `whole_low` and `whole_high`."""
        named = {f"pass_at_{k}": e for k, e in self.pass_at.items()}
        named |= {"parsed": self.parsed, "whole": self.whole}
        other = {k: v for k, v in asdict(self).items() if k not in (*named, "pass_at")}
        if self.difference is not None:
            differences = self.difference.pass_at
            named |= {f"pass_at_{k}_difference": e for k, e in differences.items()}
            other |= {name: getattr(self.difference, name) for name in ("won", "lost", "p")}
        del other["difference"]
        flat: dict[str, float] = {}
        for name, e in named.items():
            flat |= {name: e.value, f"{name}_low": e.low, f"{name}_high": e.high}
        return {**other, **flat}


def row(
    task: str,
    loaded: Loaded,
    how: Asking,
    verdicts: Sequence[Verdict],
    ks: Sequence[int],
    file: str,
    compared: Difference | None = None,
) -> TaskRow:
    """What the verdicts on a set of problems come to."""
    kept = [v.completion for v in verdicts]
    seconds = math.fsum(c.seconds for c in kept)
    tokens = sum(c.tokens for c in kept)
    return TaskRow(
        task=task, model=loaded.name, sha256=loaded.sha256, prompt=how.prompt,
        temperature=how.temperature, samples=how.samples,
        problems=len({v.problem for v in verdicts}),
        pass_at={k: share(passing_at(verdicts, k)) for k in ks},
        parsed=share(_each(verdicts, lambda v: _mean(one.parses for one in v))),
        whole=share(_each(verdicts, lambda v: _mean(one.completion.whole for one in v))),
        kinds=dict(Counter(v.kind for v in verdicts).most_common()),
        too_long=tuple(dict.fromkeys(v.problem for v in verdicts if v.kind == TOO_LONG)),
        tokens=tokens, tokens_per_second=tokens / seconds if seconds else None,
        answers=file, difference=compared,
    )  # fmt: skip


def difference(
    first: Sequence[Verdict], second: Sequence[Verdict], ks: Sequence[int] = (1,)
) -> Difference:
    """What the second gained over the first on the same problems, asked and drawn alike."""
    pass_at = {}
    for k in ks:
        pairs = zip(passing_at(first, k), passing_at(second, k), strict=True)
        sums = torch.tensor([[b - a, 1.0] for a, b in pairs], dtype=torch.float64)
        pass_at[k] = bootstrap(sums, lambda s: s[..., 0] / s[..., 1])
    if any(v.sample for v in first):
        return Difference(pass_at)
    both = [(a.passed, b.passed) for a, b in zip(first, second, strict=True)]
    won, lost = both.count((False, True)), both.count((True, False))
    return Difference(pass_at, won, lost, mcnemar(won, lost))


def mcnemar(won: int, lost: int) -> float:
    """The two-sided p-value of McNemar's exact test: a fair coin among those that differ."""
    tail = sum(math.comb(won + lost, i) for i in range(min(won, lost) + 1))
    p: float = 2 * tail / 2 ** (won + lost)
    return min(1.0, p)


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The unbiased estimate of pass@k from so many samples, of which so many passed."""
    if not 0 <= passed <= samples or not 1 <= k <= samples:
        raise BadInput(
            f"pass@{k} of {passed} passed among {samples} samples: k must be from 1 to the number "
            "of samples. Draw more samples, or give a smaller k."
        )
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


def passing_at(verdicts: Sequence[Verdict], k: int) -> list[float]:
    """pass@k of each problem."""
    return _each(verdicts, lambda v: pass_at_k(len(v), sum(one.passed for one in v), k))


def share(values: Sequence[float]) -> Estimate:
    """The mean over problems with its 95 % interval.

    Where each value is 0 or 1 it is that of Wilson (1927), which stays honest where none or all
    passed; else that of the bootstrap over problems.
    """
    n, mean = len(values), _mean(values)
    if set(values) <= {0.0, 1.0}:
        centre = (mean + Z * Z / (2 * n)) / (1 + Z * Z / n)
        half = Z / (1 + Z * Z / n) * math.sqrt(mean * (1 - mean) / n + Z * Z / (4 * n * n))
        return Estimate(
            mean, centre - half if mean > 0 else 0.0, centre + half if mean < 1 else 1.0
        )
    sums = torch.tensor([[value, 1.0] for value in values], dtype=torch.float64)
    return bootstrap(sums, lambda s: s[..., 0] / s[..., 1])


def _each(verdicts: Sequence[Verdict], value: Callable[[Sequence[Verdict]], float]) -> list[float]:
    """A value of the verdicts on each problem, in the order of the problems."""
    by_problem: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        by_problem.setdefault(verdict.problem, []).append(verdict)
    return [value(group) for group in by_problem.values()]


def _mean(values: Iterable[float]) -> float:
    return fmean(map(float, values))
