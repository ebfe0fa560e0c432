"""What a comparison answers, computed from the run folders alone.

What is not reached within the tokens of a run is None, and shown as never.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np

from . import page_compare, page_runs, work
from .compare_curves import Curve, bits_of, curve_of, finite, mean_of, times_fewer
from .compare_shapes import METHODS
from .errors import BadInput, problems
from .page_compare import Comparison, Entry, Metric
from .report import at
from .rows import Estimate

LOSSES = 3  # that tokens and sizes are asked for, unless they are given


@dataclass(frozen=True)
class Point:
    """The mean, least and greatest loss over seeds after so many tokens and FLOPs."""

    tokens: float
    flops: float | None
    mean: float
    low: float
    high: float
    bits_per_byte: float | None  # of the mean


@dataclass(frozen=True)
class Line:
    """A method at a size. Estimates are means over seeds with the least and the greatest; those
    of one seed its own, with the interval over documents. `flops` are of a whole run."""

    method: str
    size: str
    seeds: tuple[int, ...]
    lr: float | None
    parameters: int
    without_embeddings: int
    tokens: int
    calibration_tokens: int
    flops: float | None
    loss: Estimate
    bits_per_byte: Estimate | None
    validation: Estimate | None  # the lowest of each curve
    curve: tuple[Point, ...]


@dataclass(frozen=True)
class Tokens:
    """Tokens and FLOPs of training until the validation loss is at the target; None is never.

    Of the mean over seeds; `low` and `high` are of the quickest and the slowest seed.
    """

    target: float
    method: str
    size: str
    parameters: int
    tokens: float | None
    flops: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Size:
    """Parameters that a method needs for a held-out loss after all its tokens; None is never.

    Between two sizes straight in the logarithm of the parameters. `at_most` says that the
    smallest size of all has that loss already.
    """

    target: float
    method: str
    parameters: float | None
    at_most: bool


@dataclass(frozen=True)
class Advantage:
    """How many times fewer tokens a narrowed model needs for the best loss of another one.

    `how` is "never", "untrained" (it has that loss before any training: no ratio is large enough)
    or "trained". `ratio` is of the mean over seeds, `low` and `high` of single seeds, where 0 is
    never and None untrained. `ratio_with_calibration` counts the tokens that were scored and
    refitted on as well, `flops_ratio` operations, those of scores, refit and teacher included.
    """

    size: str
    method: str
    other: str
    loss: float
    how: Literal["never", "untrained", "trained"]
    tokens: float | None
    other_tokens: float
    ratio: float | None
    low: float | None
    high: float | None
    ratio_with_calibration: float | None
    flops_ratio: float | None


@dataclass(frozen=True)
class Answers:
    """All that a comparison answers. `metric` is the one that runs are comparable in."""

    metric: Metric
    lines: tuple[Line, ...]
    tokens: tuple[Tokens, ...]
    sizes: tuple[Size, ...]
    advantages: tuple[Advantage, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return asdict(self)


def answers(
    folders: Sequence[Path], *, targets: Sequence[float] | None = None, strict: bool = False
) -> Answers:
    """What the runs in the folders answer.

    A run that is missing or half-written is named in the warnings, and refused with `strict`.
    Raises BadInput for that, where no run is left, and where runs of different domains or
    vocabularies lack the bits per byte in which alone they could be compared.
    """
    found, wrong = [], []
    for path, label in zip(folders, page_runs.labels(folders), strict=True):
        try:
            if not path.exists() and (left := work.unfinished(path)).exists():
                raise BadInput(f"{path} is not finished: there is only {left.name}.")
            run = page_runs.read(path, label)
            if not run.rows:
                raise BadInput(f"{path} has no rows.jsonl: nothing of it was measured.")
            found.append(run)
        except BadInput as error:
            wrong.append(str(error))
    if wrong and (strict or not found):
        raise problems("the comparison", wrong) if len(wrong) > 1 else BadInput(wrong[0])
    if not found:
        raise BadInput("There is no run to compare. Name at least one run folder.")
    comparison = page_compare.compare(found)
    warnings = [f"Skipped: {text}" for text in wrong]
    warnings += [*(w for run in found for w in run.warnings), *comparison.warnings]
    entries = [e for e in comparison.entries if e.chosen]
    apart = _why_no_curves(comparison, entries)
    if apart:
        warnings.append(apart)
    curves = {id(e): None if apart else curve_of(e.run) for e in entries}
    lines, of_line = [], {}
    for key in _ordered(entries):
        own = [e for e in entries if (e.method, e.size) == key]
        held = [c for e in own if (c := curves[id(e)]) is not None]
        mean = mean_of(held) if len(held) == len(own) else None
        by_seed = {e.seed: c for e, c in zip(own, held, strict=True)} if mean else {}
        of_line[key] = mean, by_seed
        lines.append(_line(key, own, mean, held if mean else [], comparison.metric))
    return Answers(
        comparison.metric,
        tuple(lines),
        tuple(_tokens(lines, of_line, targets)),
        tuple(_sizes(lines, targets)),
        tuple(_advantages(lines, of_line)),
        tuple(warnings),
    )


Held = Mapping[tuple[str, str], tuple[Curve | None, Mapping[int | None, Curve]]]


def _ordered(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    """Method and size, the largest size first, methods as `compare` has them."""
    known = list(METHODS)
    keys = {(e.method, e.size): e.row.parameters for e in entries}
    return sorted(
        keys,
        key=lambda k: (-keys[k], k[1], known.index(k[0]) if k[0] in known else 99, k[0]),
    )


def _why_no_curves(comparison: Comparison, entries: Sequence[Entry]) -> str | None:
    """What forbids to compare losses on the way; None if nothing does."""
    if not comparison.curves:
        return "Losses on the way are nats per token, and are left out where these do not compare."
    blocks = {str(at(e.run.manifest, "compare", "validation", "sha256")) for e in entries}
    if len(blocks) > 1:
        return "Runs were validated on different blocks: their losses on the way are left out."
    return None


def _line(
    key: tuple[str, str], own: Sequence[Entry], mean: Curve | None, curves: Sequence[Curve],
    metric: Metric,
) -> Line:  # fmt: skip
    first = own[0]
    measured = [e.row for e in own]
    bare = any(row.bits_per_byte is None for row in measured)
    validation = at(first.run.manifest, "compare", "validation")
    per_target = bits_of(validation)
    points = []
    for n, tokens in enumerate(mean.tokens if mean else ()):
        assert mean is not None
        values = [float(np.interp(tokens, c.tokens, c.loss)) for c in curves]
        loss = float(mean.loss[n])
        points.append(
            Point(
                float(tokens), mean.flops(float(tokens)), loss, min(values), max(values),
                None if per_target is None else loss * per_target,
            )
        )  # fmt: skip
    lowest = [float(c.loss.min()) for c in curves]
    rates = {e.lr for e in own}
    budget = max(e.tokens or 0 for e in own)
    return Line(
        key[0], key[1],
        seeds=tuple(e.seed for e in own if e.seed is not None),
        lr=first.lr if len(rates) == 1 else None,
        parameters=first.row.parameters,
        without_embeddings=first.row.parameters_without_embeddings,
        tokens=budget,
        calibration_tokens=mean.calibration if mean else 0,
        flops=mean.flops(budget) if mean else None,
        loss=_over([row.loss for row in measured]),
        bits_per_byte=None if bare else _over([row.bits_per_byte for row in measured]),
        validation=Estimate(fmean(lowest), min(lowest), max(lowest)) if lowest else None,
        curve=tuple(points),
    )  # fmt: skip


def _over(found: Sequence[Estimate]) -> Estimate:
    """The mean over seeds and its range; of one seed what it is."""
    if len(found) == 1:
        return found[0]
    values = [e.value for e in found]
    return Estimate(fmean(values), min(values), max(values))


def _tokens(lines: Sequence[Line], held: Held, targets: Sequence[float] | None) -> list[Tokens]:
    trained = [line for line in lines if line.validation is not None]
    wanted = targets or _worth([line.validation.value for line in trained if line.validation])
    found = []
    for target in wanted:
        for line in trained:
            mean, by_seed = held[line.method, line.size]
            assert mean is not None
            tokens = mean.reached(target)
            each = [c.reached(target) for c in by_seed.values()]
            found.append(
                Tokens(
                    target, line.method, line.size, line.parameters, finite(tokens),
                    mean.flops(tokens) if math.isfinite(tokens) else None,
                    finite(min(each)), finite(max(each)),
                )
            )  # fmt: skip
    return found


def _sizes(lines: Sequence[Line], targets: Sequence[float] | None) -> list[Size]:
    found = []
    for target in targets or _worth([line.loss.value for line in lines]):
        for method in dict.fromkeys(line.method for line in lines):
            own = sorted((x for x in lines if x.method == method), key=lambda x: x.parameters)
            found.append(_size(target, method, own))
    return found


def _size(target: float, method: str, own: Sequence[Line]) -> Size:
    """`own` are the lines of the method, the smallest first."""
    for n, line in enumerate(own):
        if line.loss.value > target:
            continue
        if n == 0:
            return Size(target, method, float(line.parameters), True)
        p0, p1 = own[n - 1].parameters, line.parameters
        l0, l1 = own[n - 1].loss.value, line.loss.value
        share = (l0 - target) / (l0 - l1)
        return Size(target, method, p0 * (p1 / p0) ** share, False)
    return Size(target, method, None, False)


def _advantages(lines: Sequence[Line], held: Held) -> list[Advantage]:
    """Of methods that begin with what is left of the whole model, over fresh and random ones."""
    found = []
    for line in lines:
        own, own_seeds = held[line.method, line.size]
        if METHODS.get(line.method, True) or own is None:
            continue
        for other in lines:
            theirs, their_seeds = held[other.method, other.size]
            rival = METHODS.get(other.method, False) or other.method == "random"
            if other.size != line.size or other is line or not rival or theirs is None:
                continue
            each = [
                times_fewer(own_seeds[seed], their_seeds[seed])
                for seed in own_seeds
                if seed in their_seeds
            ]
            found.append(_advantage(line, other, own, theirs, each))
    return found


def _advantage(
    line: Line, other: Line, own: Curve, theirs: Curve, each: Sequence[float]
) -> Advantage:
    best = int(theirs.loss.argmin())
    loss, spent = float(theirs.loss[best]), float(theirs.tokens[best])
    tokens = own.reached(loss)
    never = math.isinf(tokens)
    seen, flops, their_flops = tokens + own.calibration, own.flops(tokens), theirs.flops(spent)
    return Advantage(
        line.size, line.method, other.method, loss,
        how="never" if never else "trained" if tokens else "untrained",
        tokens=finite(tokens),
        other_tokens=spent,
        ratio=0.0 if never else spent / tokens if tokens else None,
        low=finite(min(each)) if each else None,
        high=finite(max(each)) if each else None,
        ratio_with_calibration=(
            0.0 if never else (spent + theirs.calibration) / seen if seen else None
        ),
        flops_ratio=0.0 if never else their_flops / flops if flops and their_flops else None,
    )  # fmt: skip


def _worth(reached: Sequence[float]) -> list[float]:
    """A few round losses between the lowest and the highest that were reached."""
    if len(reached) < 2:
        return []
    step = 0.05 if max(reached) - min(reached) > 0.3 else 0.01
    cuts = np.quantile(reached, np.linspace(0.25, 0.75, LOSSES))
    return [round(float(t), 2) for t in dict.fromkeys((np.ceil(cuts / step) * step).round(2))]
