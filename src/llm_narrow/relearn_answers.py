"""What a relearning audit answers, computed from its rows alone.

The question is how many tokens a narrowed model needs for what it lost, against a model of the
same shape that begins with fresh weights: 1.0 is really gone, 0 was never lost. A loss that is not
reached within the budget gives a bound of that ratio, or nothing where neither reaches it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Literal

import numpy as np

from .compare_curves import Curve, finite, mean_of
from .errors import BadInput
from .rows import Estimate

Kind = Literal["whole", "run", "scratch"]
Goal = Literal["whole", "scratch", "given"]


@dataclass(frozen=True)
class Subject:
    """What is trained: the whole model, a run, or fresh weights of a run's shape (`like`)."""

    name: str
    kind: Kind
    method: str  # how it was made: whole, oneshot, lasso, random, scratch, …
    model: str
    sha256: str | None  # of the weights that it begins with; None for fresh ones
    shape: str  # a hash of the names and shapes of its parameters
    parameters: int
    flops: float  # of a forward pass over one token
    like: tuple[str, ...] = ()  # of fresh weights: the runs that have this shape


@dataclass(frozen=True)
class Point:
    """After so many tokens, on held-out text: the mean and the range over seeds; of one seed its
    own value and interval over documents."""

    tokens: int
    loss: Estimate
    bits_per_byte: Estimate
    accuracy: Estimate


@dataclass(frozen=True)
class Line:
    """A subject with its learning rate, what was tried for it, and its curve."""

    subject: Subject
    lr: float
    tried: tuple[Mapping[str, Any], ...]
    seeds: tuple[int, ...]
    curve: tuple[Point, ...]


@dataclass(frozen=True)
class Answer:
    """Tokens that a subject needs to the target, divided by those that fresh weights need.

    None of tokens is never within the budget. `ratio` is of the means over seeds and None where it
    is not known; then `at_least` and `at_most` bound it as far as the budget tells. `low` and
    `high` are the least and the greatest over seeds, None where a seed leaves that end open.
    """

    subject: str
    scratch: str
    goal: Goal
    asked: bool  # whether this is the target that was asked for
    target: float
    tokens: float | None
    scratch_tokens: float | None
    budget: int
    ratio: float | None
    at_least: float | None
    at_most: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Answers:
    """All that an audit answers; `goal` and `margin` (nats per token) say how it was asked."""

    goal: Goal
    margin: float
    lines: tuple[Line, ...]
    answers: tuple[Answer, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return asdict(self)

    def of(self, subject: str) -> Answer | None:
        """The answer that was asked for, of a subject."""
        return next((a for a in self.answers if a.subject == subject and a.asked), None)


def goal_of(target: str | float | None) -> tuple[Goal, float | None]:
    """What `--target` says: whole (also of None), scratch, or a loss. Raises BadInput."""
    if target is None or target == "whole":
        return "whole", None
    if target == "scratch":
        return "scratch", None
    try:
        value = float(target)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise BadInput(
            "--target must be a loss above 0 in nats per token, whole (the whole model's before "
            f"any training, plus --margin) or scratch (the best of fresh weights), got {target!r}."
        )
    return "given", value


def line_of(
    subject: Subject, rows: Sequence[Mapping[str, Any]], lr: float,
    tried: Sequence[Mapping[str, Any]],
) -> Line:  # fmt: skip
    """The line of a subject from its rows, as rows.jsonl has them."""
    own = [row for row in rows if row["subject"] == subject.name]
    seeds = sorted({int(row["seed"]) for row in own})
    curve = []
    for tokens in sorted({int(row["trained"]) for row in own}):
        here = [row for row in own if row["trained"] == tokens]
        if len(here) == len(seeds):
            over = {name: _over(here, name) for name in ("loss", "bits_per_byte", "accuracy")}
            curve.append(Point(tokens, **over))
    return Line(subject, lr, tuple(tried), tuple(seeds), tuple(curve))


def answers(
    lines: Sequence[Line], rows: Sequence[Mapping[str, Any]], *,
    target: str | float | None = None, margin: float = 0.1,
) -> Answers:  # fmt: skip
    """The ratio of every subject but fresh weights, for the target asked for and the others.

    A run is compared with fresh weights of its own shape, the whole model with the first.
    """
    goal, given = goal_of(target)
    whole = next(line for line in lines if line.subject.kind == "whole")
    curves = {line.subject.name: _curves(line, rows) for line in lines}
    found = []
    for line in lines:
        name = line.subject.name
        if line.subject.kind == "scratch":
            continue
        rival = next(
            other.subject for other in lines
            if other.subject.kind == "scratch"
            and (line is whole or name in other.subject.like)
        )  # fmt: skip
        theirs = curves[rival.name]
        goals: dict[Goal, float] = {
            "whole": whole.curve[0].loss.value + margin,
            "scratch": float(_mean(theirs).loss.min()),
        }
        if given is not None:
            goals = {"given": given, **goals}
        for one, loss in goals.items():
            found.append(_answer(name, rival.name, one, one == goal, loss, curves[name], theirs))
    return Answers(goal, margin, tuple(lines), tuple(found))


def ratio_of(
    tokens: float, scratch: float, budget: float
) -> tuple[float | None, float | None, float | None]:
    """The ratio of two numbers of tokens, and its bounds; inf is never within the budget.

    >>> ratio_of(50, 100, 400), ratio_of(100, math.inf, 400), ratio_of(math.inf, 100, 400)
    ((0.5, 0.5, 0.5), (None, None, 0.25), (None, 4.0, None))
    """
    if tokens == 0 and scratch > 0:  # nothing was lost, whatever fresh weights need
        return 0.0, 0.0, 0.0
    if math.isinf(tokens):
        least = budget / scratch if 0 < scratch < math.inf else None
        return None, least, None
    if math.isinf(scratch):
        return None, None, tokens / budget
    if scratch == 0:  # fresh weights are at the target before any training: it asks nothing
        return None, None, None
    ratio = tokens / scratch
    return ratio, ratio, ratio


def _answer(
    name: str, rival: str, goal: Goal, asked: bool, target: float,
    own: Mapping[int, Curve], theirs: Mapping[int, Curve],
) -> Answer:  # fmt: skip
    mean, their_mean = _mean(own), _mean(theirs)
    tokens, scratch = mean.reached(target), their_mean.reached(target)
    budget = float(mean.tokens[-1])
    ratio, at_least, at_most = ratio_of(tokens, scratch, budget)
    each = [
        ratio_of(own[seed].reached(target), theirs[seed].reached(target), budget)
        for seed in own.keys() & theirs.keys()
    ]
    lows = [low for _, low, _ in each if low is not None]
    highs = [high for _, _, high in each if high is not None]
    return Answer(
        name, rival, goal, asked, target, finite(tokens), finite(scratch), int(budget),
        ratio, at_least, at_most,
        low=min(lows) if lows and len(lows) == len(each) else None,
        high=max(highs) if highs and len(highs) == len(each) else None,
    )  # fmt: skip


def _curves(line: Line, rows: Sequence[Mapping[str, Any]]) -> dict[int, Curve]:
    """The held-out loss of each seed. A step is the first number of tokens that was looked at."""
    found = {}
    for seed in line.seeds:
        own = [r for r in rows if r["subject"] == line.subject.name and r["seed"] == seed]
        own.sort(key=lambda r: int(r["trained"]))
        tokens = np.array([r["trained"] for r in own], np.float64)
        loss = np.array([r["loss"] for r in own], np.float64)
        step = float(tokens[1]) if len(tokens) > 1 else 1.0
        found[seed] = Curve(tokens, loss, step, 0.0, 0, None)
    return found


def _mean(curves: Mapping[int, Curve]) -> Curve:
    mean = mean_of(list(curves.values()))
    assert mean is not None  # every subject has a seed
    return mean


def _over(rows: Sequence[Mapping[str, Any]], name: str) -> Estimate:
    values = [float(row[name]) for row in rows]
    if len(rows) == 1:
        return Estimate(values[0], float(rows[0][f"{name}_low"]), float(rows[0][f"{name}_high"]))
    return Estimate(fmean(values), min(values), max(values))
