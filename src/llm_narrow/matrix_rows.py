"""What scores come to: bits per byte, accuracy, what was lost, and selectivity, as rows.

Selectivity is the increase of loss off the domain ÷ that on it, both in nats per byte, a model
against the first one. Where the loss on the domain has not risen it is not defined.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .matrix_scores import Score
from .matrix_sets import Group, Item
from .measure import DRAWS, RESAMPLES, bootstrap
from .rows import Estimate
from .task_rows import mcnemar, share

ON, OFF = "domain", "off the domain"  # the held-out part; the mean over groups that are not its own


@dataclass(frozen=True)
class LossRow:
    """One model on one set of texts. `increase` is in nats per byte, above the first model.

    Estimates are over items (texts, problems, documents), the increase paired by item.
    """

    set: str
    group: Group
    own: bool  # whether it is of the domain
    model: str
    sha256: str
    items: int
    tokens: int
    bytes: int
    bits_per_byte: Estimate
    increase: Estimate | None
    scores: str

    def to_dict(self) -> dict[str, Any]:
        """Flat and JSON-able."""
        return _flat(vars(self))


@dataclass(frozen=True)
class ChoiceRow:
    """One model on one set of questions.

    `acc` is the share where the likeliest choice is right, `acc_norm` that where the likeliest per
    character is; `chance` that of guessing. Differences are to the first model, paired by
    question. `won` are the questions where only this model is right by `acc`, `lost` those where
    only the first is, p is that of McNemar's exact test.
    """

    set: str
    model: str
    sha256: str
    items: int
    chance: float
    acc: Estimate
    acc_norm: Estimate | None
    scores: str
    acc_difference: Estimate | None = None
    acc_norm_difference: Estimate | None = None
    won: int | None = None
    lost: int | None = None
    p: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Flat and JSON-able."""
        return _flat(vars(self))


@dataclass(frozen=True)
class Selectivity:
    """How much more a model has lost on `off` than on `on`, in nats per byte.

    `off` is a set, a group (the mean over its sets) or OFF (the mean over all groups). `value` is
    None where the loss `on` has not risen; a bound is None where there is none: where so many
    resamples show no rise that the ratio may be any.
    """

    model: str
    on: str
    off: str
    on_increase: Estimate
    off_increase: Estimate
    value: float | None
    low: float | None
    high: float | None

    def to_dict(self) -> dict[str, Any]:
        """Flat and JSON-able; `selectivity` is the value."""
        flat = _flat({k: v for k, v in vars(self).items() if k not in ("value", "low", "high")})
        return {
            **flat, "selectivity": self.value, "selectivity_low": self.low,
            "selectivity_high": self.high,
        }  # fmt: skip


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Estimate):
            flat |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
        else:
            flat[name] = value
    return flat


def loss_row(
    name: str, group: Group, own: bool, model: str, sha256: str,
    found: Sequence[Score], first: Sequence[Score] | None, file: str,
) -> LossRow:  # fmt: skip
    """What the scores of a set of texts come to; `first` are those of the first model."""
    sums = _sums(found)
    return LossRow(
        name, group, own, model, sha256, len(found),
        tokens=_tokens(found), bytes=int(sums[:, 1].sum()),
        bits_per_byte=bootstrap(sums, lambda s: s[..., 0] / s[..., 1] / math.log(2)),
        increase=None if first is None else _estimate(*_increase(name, group, first, found)),
        scores=file,
    )  # fmt: skip


def choice_row(
    name: str, items: Sequence[Item], normed: bool, model: str, sha256: str,
    found: Sequence[Score], first: Sequence[Score] | None, file: str,
) -> ChoiceRow:  # fmt: skip
    """What the scores of a set of questions come to; `first` are those of the first model."""
    acc, norm = right(items, found), right(items, found, normed=True)
    row: dict[str, Any] = {}
    if first is not None:
        before = right(items, first)
        row["acc_difference"] = _difference(before, acc)
        if normed:
            row["acc_norm_difference"] = _difference(right(items, first, normed=True), norm)
        both = list(zip(before, acc, strict=True))
        won, lost = both.count((0.0, 1.0)), both.count((1.0, 0.0))
        row |= {"won": won, "lost": lost, "p": mcnemar(won, lost)}
    return ChoiceRow(
        name, model, sha256, len(items),
        chance=math.fsum(1 / len(item.pairs) for item in items) / len(items),
        acc=share(acc), acc_norm=share(norm) if normed else None, scores=file, **row,
    )  # fmt: skip


def right(items: Sequence[Item], found: Sequence[Score], *, normed: bool = False) -> list[float]:
    """Of each question 1 where the likeliest choice is the right one, else 0.

    `normed` divides by the characters of the choice. The first of equally likely ones counts.
    """
    chosen = []
    for item, score in zip(items, found, strict=True):
        nats = [
            one.nats / (length if normed else 1)
            for one, length in zip(score.likelihoods, item.lengths, strict=True)
        ]
        chosen.append(float(nats.index(min(nats)) == item.right))
    return chosen


def _difference(before: Sequence[float], after: Sequence[float]) -> Estimate:
    pairs = zip(before, after, strict=True)
    sums = torch.tensor([[b - a, 1.0] for a, b in pairs], dtype=torch.float64)
    return bootstrap(sums, lambda s: s[..., 0] / s[..., 1])


def selectivities(
    model: str,
    sets: dict[str, Group],
    own: Sequence[str],
    first: dict[str, Sequence[Score]],
    found: dict[str, Sequence[Score]],
) -> list[Selectivity]:
    """The selectivity of a model on each of the domain's `own` sets against all other sets.

    Every set that is off the domain, then every group of them, then all: the mean of the groups.
    """
    resampled = {n: _increase(n, sets[n], first[n], found[n]) for n in sets}
    groups: dict[str, list[str]] = {}
    for name, group in sets.items():
        if name not in own:
            groups.setdefault(group, []).append(name)
    off = {name: resampled[name] for names in groups.values() for name in names}
    means = {f"all {group}": _mean([off[n] for n in names]) for group, names in groups.items()}
    if means:
        off |= {**means, OFF: _mean(list(means.values()))}
    return [
        _ratio(model, on, name, resampled[on], away) for on in own for name, away in off.items()
    ]


Resampled = tuple[float, Tensor]  # a value, and what each resample makes of it, (RESAMPLES,)


def _increase(name: str, group: Group, first: Sequence[Score], found: Sequence[Score]) -> Resampled:
    """Nats per byte above the first model, of the items that both have."""
    had = {score.item: score for score in first}
    both = [(had[score.item], score) for score in found if score.item in had]
    sums = torch.cat([_sums([a for a, _ in both]), _sums([b for _, b in both])], 1)

    def risen(s: Tensor) -> Tensor:
        return s[..., 2] / s[..., 3] - s[..., 0] / s[..., 1]

    # The languages have the same problems, so a resample draws the same ones of each.
    return float(risen(sums.sum(0))), risen(_drawn(sums, group if group == "languages" else name))


def _drawn(sums: Tensor, key: str) -> Tensor:
    """The summed items of each resample, (RESAMPLES, k); the same key draws the same items."""
    n = len(sums)
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7])
    generator = torch.Generator().manual_seed(seed)
    found, most = [], max(1, DRAWS // n)
    for start in range(0, RESAMPLES, most):
        drawn = torch.randint(n, (min(most, RESAMPLES - start), n), generator=generator)
        weights = torch.zeros(drawn.shape, dtype=torch.float64)
        weights.scatter_add_(1, drawn, torch.ones_like(weights))
        found.append(weights @ sums)
    return torch.cat(found)


def _mean(several: Sequence[Resampled]) -> Resampled:
    value = math.fsum(v for v, _ in several) / len(several)
    return value, torch.stack([drawn for _, drawn in several]).mean(0)


def _estimate(value: float, drawn: Tensor) -> Estimate:
    levels = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = drawn.quantile(levels).tolist()
    return Estimate(value, low, high)


def _ratio(model: str, on: str, off: str, below: Resampled, above: Resampled) -> Selectivity:
    """Resamples without a rise on the domain stand for any ratio."""
    value = above[0] / below[0] if below[0] > 0 else None
    low = high = None
    if value is not None:
        rises = below[1] > 0
        ratio = above[1] / below[1].where(rises, 1.0)
        # Where the loss rose off the domain alone the ratio is beyond all bounds, not any.
        low = _bound(ratio.where(rises, torch.where(above[1] > 0, math.inf, -math.inf)), 0.025)
        high = _bound(ratio.where(rises, math.inf), 0.975)
    return Selectivity(model, on, off, _estimate(*below), _estimate(*above), value, low, high)


def _bound(drawn: Tensor, level: float) -> float | None:
    """The quantile, by rank since infinities cannot be weighed; None where it is infinite."""
    rank = min(len(drawn) - 1, max(0, round(level * (len(drawn) - 1))))
    value = float(drawn.sort().values[rank])
    return value if math.isfinite(value) else None


def _sums(found: Sequence[Score]) -> Tensor:
    """Nats and bytes of each item, (items, 2)."""
    rows = [[score.likelihoods[0].nats, float(score.bytes)] for score in found]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 2)


def _tokens(found: Sequence[Score]) -> int:
    return sum(one.tokens for score in found for one in score.likelihoods)
