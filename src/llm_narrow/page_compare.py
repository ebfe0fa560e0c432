"""Several runs side by side: which may be compared, in what, and what the comparison says.

Runs of one method and size that differ in their seed form a group. Of several learning rates the
one with the lowest loss on the calibration part speaks for a group, held-out text has no say; of
several budgets of tokens the largest does. The table holds every run.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean, median
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .errors import BadInput
from .page_runs import Run, whole_curve
from .report import at, percent, recovery_tokens
from .rows import Estimate, Row

Metric = Literal["loss", "bits_per_byte"]
WORDS = {"loss": "loss, nats per token", "bits_per_byte": "bits per byte"}
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Entry:
    """One run of a comparison; `curve` is (2, n): tokens, and the loss after them."""

    run: Run
    method: str
    size: str
    seed: int | None
    lr: float | None
    tokens: int | None
    row: Row
    curve: Floats
    curve_of: str  # "validation" or "training" loss; empty without a curve
    flops: float | None  # of training on one token
    vocabulary: str | None  # what tells it from others, where it is known
    chosen: bool = True

    @property
    def told(self) -> bool:
        """Whether the manifest says what is compared."""
        return isinstance(at(self.run.manifest, "compare"), Mapping)


@dataclass(frozen=True)
class Group:
    """The runs of one method and size that differ in nothing but their seeds."""

    method: str
    size: str
    entries: tuple[Entry, ...]
    metric: Metric

    @property
    def parameters(self) -> float:
        """The median over the seeds."""
        return median(e.row.parameters for e in self.entries)

    @property
    def estimate(self) -> Estimate:
        """The mean and range over seeds; of a single run its value and interval."""
        found = [value(e.row, self.metric) for e in self.entries]
        if len(found) == 1:
            return found[0]
        means = [e.value for e in found]
        return Estimate(fmean(means), min(means), max(means))

    @property
    def curves(self) -> list[Floats]:
        """The curves of the runs that have one, each (2, n)."""
        return [e.curve for e in self.entries if e.curve.shape[1]]

    @property
    def flops(self) -> float | None:
        """Of training on one token, the mean over runs; None if a run does not know it."""
        known = [e.flops for e in self.entries if e.flops is not None]
        return fmean(known) if len(known) == len(self.entries) else None

    @cached_property
    def band(self) -> Floats:
        """(4, n): tokens, and mean, least and greatest loss over seeds, as far as all reach."""
        curves = self.curves
        if not curves:
            return np.empty((4, 0))
        first, last = max(c[0, 0] for c in curves), min(c[0, -1] for c in curves)
        grid = np.unique(np.concatenate([c[0] for c in curves]))
        grid = grid[(grid >= first) & (grid <= last)]
        values = np.array([np.interp(grid, *c) for c in curves])
        return np.array([grid, values.mean(0), values.min(0), values.max(0)])

    def tokens_to(self, target: float) -> float:
        """The tokens at which the mean over seeds first is at or below the target; inf if never."""
        tokens, mean, _, _ = self.band
        below = np.flatnonzero(mean <= target)
        return float(tokens[below[0]]) if len(below) else math.inf


@dataclass(frozen=True)
class Advantage:
    """How many tokens `method` needs for what `other` has at its best, at one size."""

    size: str
    method: str
    other: str
    loss: float
    tokens: float
    other_tokens: float

    @property
    def ratio(self) -> float:
        """How many times fewer tokens; inf if the method needs none, 0 if it never gets there."""
        if math.isinf(self.tokens):
            return 0.0
        return self.other_tokens / self.tokens if self.tokens else math.inf


@dataclass(frozen=True)
class Comparison:
    """Runs that may be compared, and the measure in which they are."""

    entries: tuple[Entry, ...]
    metric: Metric
    curves: bool  # whether losses while training may be compared
    warnings: tuple[str, ...]

    @cached_property
    def groups(self) -> list[Group]:
        """By method (the best first) and size (the largest first)."""
        held: dict[tuple[str, str], list[Entry]] = {}
        for e in self.entries:
            if e.chosen:
                held.setdefault((e.method, e.size), []).append(e)
        groups = [Group(*key, tuple(found), self.metric) for key, found in held.items()]
        best = {m: min(g.estimate.value for g in groups if g.method == m) for m, _ in held}
        return sorted(groups, key=lambda g: (best[g.method], g.method, -g.parameters))

    @property
    def methods(self) -> list[str]:
        """The one with the lowest loss of any size first."""
        return list(dict.fromkeys(g.method for g in self.groups))

    @property
    def sizes(self) -> list[str]:
        """The largest first."""
        ordered = sorted(self.groups, key=lambda g: -g.parameters)
        return list(dict.fromkeys(g.size for g in ordered))

    @property
    def domains(self) -> list[str]:
        """The names of the domains measured on."""
        return list(dict.fromkeys(e.row.domain for e in self.entries))

    @property
    def whole(self) -> Row | None:
        """The model before anything was removed, if every run that says so means the same."""
        firsts = [e.run.rows[0] for e in self.entries if len(e.run.rows) > 1]
        firsts = [row for row in firsts if row.label == "before" and row.domain in self.domains]
        return firsts[0] if len({row.sha256 for row in firsts}) == 1 else None

    def estimate(self, row: Row) -> Estimate:
        """The measure compared, of a row."""
        return value(row, self.metric)

    @cached_property
    def champion(self) -> str | None:
        """The method with the lowest loss at the most sizes that several methods were run at."""
        wins: dict[str, int] = {}
        for size in self.sizes:
            rivals = [g for g in self.groups if g.size == size]
            if len(rivals) > 1:
                best = min(rivals, key=lambda g: g.estimate.value).method
                wins[best] = wins.get(best, 0) + 1
        return max(wins, key=lambda m: wins[m]) if wins else None

    @cached_property
    def advantages(self) -> list[Advantage]:
        """Of the champion over each other method, per size, where both have curves."""
        if not self.curves or self.champion is None:
            return []
        found = []
        for size in self.sizes:
            at_size = {g.method: g for g in self.groups if g.size == size and g.band.shape[1]}
            own = at_size.pop(self.champion, None)
            for method, other in at_size.items() if own else ():
                assert own is not None
                tokens, mean, _, _ = other.band
                best = int(mean.argmin())
                found.append(
                    Advantage(size, own.method, method, float(mean[best]),
                              own.tokens_to(float(mean[best])), float(tokens[best]))
                )  # fmt: skip
        return found


def compare(runs: Sequence[Run]) -> Comparison:
    """The comparison of at least one run with rows.

    Raises BadInput, with every reason at once, where runs of different domains or vocabularies
    lack the bits per byte in which alone they could be compared.
    """
    entries = [entry(run) for run in runs if run.rows]
    texts = {text(e) for e in entries}
    several = len({e.row.domain for e in entries}) > 1
    if several:
        entries = [replace(e, method=f"{e.method} ({_name(e.row.domain)})") for e in entries]
    differ = [
        f"domains differ: {_listed(e.row.domain for e in entries)}" if several else "",
        "vocabularies differ" if _vocabularies_differ(entries) else "",
        "the held-out texts differ" if len(texts) > 1 and not several else "",
    ]
    differ = [d for d in differ if d]
    bare = [e for e in entries if not has(e.row, "bits_per_byte")]
    if differ and bare:
        raise BadInput(
            f"{'; '.join(differ)}, and {_listed(e.run.label for e in bare)} lack bits per byte, in "
            "which alone such runs could be compared. Measure them again, or leave them out."
        )
    warnings = []
    if differ:
        warnings.append(
            f"{'; '.join(differ).capitalize()}: compared in bits per byte"
            + (", which tell little from one domain to another." if several else ".")
        )
    if {"validation", "training"} <= {e.curve_of for e in entries}:
        warnings.append("Runs without validation losses have no curve beside those with them.")
        none = np.empty((2, 0))
        entries = [e if e.curve_of == "validation" else replace(e, curve=none) for e in entries]
    metric: Metric = "bits_per_byte" if differ else "loss"
    return Comparison(tuple(_choose(entries)), metric, not differ, tuple(warnings))


def entry(run: Run) -> Entry:
    """What a run is in a comparison: by its manifest's `compare`, else by its folder's name."""
    told = at(run.manifest, "compare")
    told = told if isinstance(told, Mapping) else {}
    held_out = [row for row in run.rows if row.part == "held_out"] or list(run.rows)
    row = held_out[-1]
    tokens, losses, curve_of = whole_curve(run)
    budget = _whole(told.get("tokens"))
    if budget is None:
        budget = round(float(tokens[-1])) if len(tokens) else recovery_tokens(run.manifest)
    flops = _number(told.get("flops_per_token"))
    if flops is None and row.flops is not None:
        flops = 3 * row.flops
    return Entry(
        run,
        method=str(told.get("method") or run.label),
        size=str(told.get("size") or _share(held_out)),
        seed=_whole(told.get("seed")),
        lr=_number(told.get("lr")),
        tokens=budget,
        row=row,
        curve=np.array([tokens, losses]),
        curve_of=curve_of,
        flops=flops,
        vocabulary=_vocabulary(run),
    )


def text(e: Entry) -> tuple[str, str, str]:
    """What tells the text that a run was measured on from another."""
    return e.row.domain, e.row.part, str(at(e.run.manifest, "domain", "sha256", e.row.part))


def has(row: Row, metric: Metric) -> bool:
    """Whether the row holds the measure: a file may have null for it."""
    return getattr(row, metric) is not None


def value(row: Row, metric: Metric) -> Estimate:
    """The measure of a row."""
    found: Estimate = getattr(row, metric)
    return found


def targets(comparison: Comparison) -> list[float]:
    """Up to three losses worth asking the tokens to: what a quarter, half and most groups reach."""
    reached = [float(g.band[1].min()) for g in comparison.groups if g.band.shape[1]]
    if len(reached) < 2:
        return []
    step = 0.05 if max(reached) - min(reached) > 0.3 else 0.01
    cuts = np.quantile(reached, [0.25, 0.5, 0.75])
    return [float(t) for t in dict.fromkeys(np.ceil(cuts / step).round() * step)]


def _choose(entries: Sequence[Entry]) -> list[Entry]:
    """The same entries, those that do not speak for their group marked."""
    held: dict[tuple[str, str], list[Entry]] = {}
    for e in entries:
        held.setdefault((e.method, e.size), []).append(e)
    chosen: set[int] = set()
    for group in held.values():
        most = max(e.tokens or 0 for e in group)
        group = [e for e in group if (e.tokens or 0) == most]
        by_rate: dict[float | None, list[Entry]] = {}
        for e in group:
            by_rate.setdefault(e.lr, []).append(e)
        if len(by_rate) > 1 and all(e.curve.shape[1] for e in group):
            group = min(by_rate.values(), key=lambda same: fmean(e.curve[1].min() for e in same))
        chosen.update(id(e) for e in group)
    return [replace(e, chosen=id(e) in chosen) for e in entries]


def _vocabularies_differ(entries: Sequence[Entry]) -> bool:
    """By what the runs say, else by how many bytes of the same text a token has."""
    if len({e.vocabulary for e in entries if e.vocabulary}) > 1:
        return True
    by_text: dict[Any, list[float]] = {}
    for e in entries:
        if has(e.row, "bits_per_byte") and e.row.bits_per_byte.value > 0:
            key = (*text(e), e.row.documents)
            by_text.setdefault(key, []).append(e.row.loss.value / e.row.bits_per_byte.value)
    return any(max(found) > 1.0005 * min(found) for found in by_text.values())


def _vocabulary(run: Run) -> str | None:
    for path in (("vocabulary",), ("model", "vocabulary")):
        if (told := at(run.manifest, *path)) is not None:
            return str(told)
    if all(has(row, "bits_per_byte") for row in run.rows):
        return None  # bytes per token tell; no need to read files of megabytes
    try:
        return hashlib.sha256((run.path / "model" / "tokenizer.json").read_bytes()).hexdigest()
    except OSError:
        return None


def _share(rows: Sequence[Row]) -> str:
    """The size as a share of the first row's, where there is another to compare it with."""
    if len(rows) > 1 and rows[0].parameters:
        return percent(rows[-1].parameters / rows[0].parameters)
    return ""


def _name(domain: str) -> str:
    return domain.rstrip("/").rpartition("/")[2] or domain


def _listed(names: Iterable[str]) -> str:
    found = list(dict.fromkeys(names))
    more = f" and {len(found) - 6} more" if len(found) > 6 else ""
    return ", ".join(found[:6]) + more


def _whole(found: object) -> int | None:
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def _number(found: object) -> float | None:
    fits = isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)
    return float(found) if fits else None  # type: ignore[arg-type]
