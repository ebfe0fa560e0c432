"""Which units stay: scores and a wanted sparsity or size in, the decision and its price out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .errors import TargetOutOfReach
from .units import Group, Keep, Kind, Params, Scores, count, keep_all

Allocation = Literal["uniform", "global"]


@dataclass(frozen=True)
class PlanRow:
    """What one group keeps, in units."""

    group: str
    kind: Kind
    before: int
    after: int


@dataclass(frozen=True)
class Plan:
    """The decision, and parameters and bytes before and after it.

    `layers`, (layers,) bool, says which layers stay where some may go; of the others no unit does.
    """

    groups: tuple[Group, ...]
    keep: Keep
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    layers: Tensor | None = None

    @property
    def layers_gone(self) -> list[int]:
        """The numbers of the layers that go."""
        return [] if self.layers is None else (~self.layers).nonzero().flatten().tolist()

    @property
    def only_units(self) -> bool:
        """Whether no layer goes, and no group loses all of its units."""
        return not self.layers_gone and all(
            bool(k.any()) or not len(k) for k in self.keep.values()
        )

    @property
    def rows(self) -> tuple[PlanRow, ...]:
        """One row per group."""
        return tuple(
            PlanRow(g.name, g.kind, g.size, int(self.keep[g.name].sum())) for g in self.groups
        )

    def sparsity(self, kinds: Sequence[Kind]) -> dict[Kind, float]:
        """The share, 0 to 1, of the units of each of the kinds that goes."""
        found: dict[Kind, float] = {}
        for kind in kinds:
            rows = [row for row in self.rows if row.kind == kind]
            found[kind] = 1 - sum(row.after for row in rows) / sum(row.before for row in rows)
        return found


def by_sparsity(
    model: Any,
    groups: Sequence[Group],
    scores: Scores,
    *,
    sparsity: Mapping[Kind, float],
    allocation: Allocation = "uniform",
    multiple: int = 8,
) -> Plan:
    """Remove the given share, 0 to 1, of the units of each kind; kinds not named stay whole."""
    keep = keep_all(groups) | select(
        scores, groups, sparsity=sparsity, allocation=allocation, multiple=multiple
    )
    return priced(model, groups, keep)


def by_parameters(
    model: Any,
    groups: Sequence[Group],
    scores: Scores,
    *,
    target: int,
    kinds: Sequence[Kind],
    allocation: Allocation = "uniform",
    multiple: int = 8,
) -> Plan:
    """Leave as many units as fit into `target` parameters, the same share of each kind.

    The result is the largest that does not exceed the target: one step more, a unit with
    `global` allocation and multiple 1, `multiple` units per layer with `uniform`, would.
    Raises TargetOutOfReach with the smallest size that the kinds allow.
    """
    params = dict(model.named_parameters())

    def at(share: float) -> Keep:
        wanted = dict.fromkeys(kinds, share)
        return keep_all(groups) | select(
            scores, groups, sparsity=wanted, allocation=allocation, multiple=multiple
        )

    whole = count(params, groups, keep_all(groups))
    if target > whole:
        raise TargetOutOfReach(
            f"target_params {target:,} is above the {whole:,} parameters that the model has. "
            "Ask for fewer, or leave the model as it is."
        )
    smallest = count(params, groups, at(1.0))
    if target < smallest:
        raise TargetOutOfReach(
            f"target_params {target:,} is below {smallest:,}, the least that removing "
            f"{' and '.join(kinds)} can reach ({smallest / whole:.1%} of {whole:,}). "
            "Ask for more parameters, or allow more kinds."
        )
    # Every width changes at a multiple of 1 / (number of units) at the finest.
    steps = sum(g.size for g in groups if g.kind in kinds)
    low, high = 0, steps  # count(at(high / steps)) <= target holds throughout
    while low < high:
        middle = (low + high) // 2
        if count(params, groups, at(middle / steps)) <= target:
            high = middle
        else:
            low = middle + 1
    return priced(model, groups, at(high / steps))


def priced(model: Any, groups: Sequence[Group], keep: Keep) -> Plan:
    """The plan that a decision makes for a model."""
    params: Params = dict(model.named_parameters())
    before, after = count(params, groups, keep_all(groups)), count(params, groups, keep)
    entry = next(iter(params.values())).element_size()
    return Plan(tuple(groups), keep, before, after, before * entry, after * entry)


def of_zeros(
    model: Any, groups: Sequence[Group], alive: Keep, allocation: Allocation, multiple: int = 8
) -> Plan:
    """Remove units of zeros only. `alive` says which are not, for groups of the kinds that may go.

    `uniform` leaves as many units in every group of a kind as its fullest needs, rounded up to
    `multiple` for neurons, so that the layout stays even: some zeros stay. `global` leaves none.
    """
    keep = keep_all(groups)
    for kind in dict.fromkeys(g.kind for g in groups):
        row = [g for g in groups if g.kind == kind and g.name in alive]
        step = multiple if kind == "neurons" else 1
        fullest = max((int(alive[g.name].sum()) for g in row), default=0)
        for g in row:
            width = int(alive[g.name].sum())
            if allocation == "uniform":
                width = min(g.size, -(-fullest // step) * step)
            first = alive[g.name].int().argsort(descending=True, stable=True)[:width]
            keep[g.name] = torch.zeros(g.size, dtype=torch.bool).index_fill_(0, first, True)
    return priced(model, groups, keep)


def select(
    scores: Scores,
    groups: Sequence[Group],
    *,
    sparsity: Mapping[Kind, float],
    allocation: Allocation = "uniform",
    multiple: int = 1,
) -> Keep:
    """Keep the best-scored units, exact in number; at least one multiple stays in every group, and
    its `least`.

    `uniform` takes the same share of every group, `global` compares the scores of all groups of
    a kind. Widths of neurons are rounded to `multiple`; heads are counted one by one. Groups of a
    kind that `sparsity` does not name, or names with 0, are left out of the answer.
    """
    keep: Keep = {}
    for kind, share in sparsity.items():
        if not 0 <= share <= 1:
            raise TargetOutOfReach(
                f"sparsity of {kind} must be at least 0 and below 1, got {share}"
            )
        row = [g for g in groups if g.kind == kind]
        if not row or share == 0:
            continue
        step = multiple if kind == "neurons" else 1
        split = _uniform if allocation == "uniform" else _global
        for g, width in zip(row, split(row, scores, share, step), strict=True):
            best = scores[g.name].argsort(descending=True, stable=True)[:width]
            keep[g.name] = torch.zeros(g.size, dtype=torch.bool).index_fill_(0, best, True)
    return keep


def _uniform(row: Sequence[Group], scores: Scores, share: float, step: int) -> list[int]:
    return [max(_rounded((1 - share) * g.size, step, g.size), _floor(g, step)) for g in row]


def _floor(group: Group, step: int) -> int:
    """The fewest units that may stay in a group."""
    return min(group.size, max(step, group.least))


def _rounded(width: float, step: int, size: int) -> int:
    """The nearest multiple of `step` from one step up to the whole group."""
    return min(size, max(step, int(width / step + 0.5) * step))


def _global(row: Sequence[Group], scores: Scores, share: float, step: int) -> list[int]:
    """Widths by a threshold over all groups, then rounded so that the total stays right."""
    total = sum(g.size for g in row)
    left = _rounded((1 - share) * total, step, total)
    ranked = torch.cat([scores[g.name] for g in row]).argsort(descending=True, stable=True)
    chosen = torch.zeros(total, dtype=torch.bool).index_fill_(0, ranked[:left], True)
    exact = [int(part.sum()) for part in chosen.split([g.size for g in row])]
    widths = [
        min(g.size, max(_floor(g, step), n // step * step))
        for g, n in zip(row, exact, strict=True)
    ]
    # What rounding down took goes to the groups it took most from; floors are paid by the widest.
    while left - sum(widths) >= step:
        open_ = [i for i, g in enumerate(row) if widths[i] + step <= g.size]
        if not open_:
            break
        widths[max(open_, key=lambda i: exact[i] - widths[i])] += step
    while sum(widths) - left >= step:
        open_ = [i for i, g in enumerate(row) if widths[i] > max(step, g.least)]
        if not open_:
            break
        widths[min(open_, key=lambda i: exact[i] - widths[i])] -= step
    return widths
