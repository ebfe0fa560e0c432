"""Spending a budget over all kinds of removal at the best price.

What is removed next is always what costs least, in nats per token, for what it saves of what is
still too much. Prices interact: the 8 cheapest KV groups of a model cost little, the 8 after them
much more than their prices said. So the spending goes in rounds. In each, a large removal is
measured again in the model as it then is before it is bought, but only once it comes to the top
(lazy greedy: most never do), and of each layer at most one large removal is bought. Between rounds
the loss is measured, which later estimates start from, and a few neurons are tried, by which the
curves are scaled.

The steps are in order and each contains those before it, so one run gives every size on the way.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .budget import LARGE, Amounts, PricedKind, Removal
from .decision import Decision
from .depth import counted
from .prices import Prices
from .purchases import (
    NEVER,
    PIECES,
    Check,
    Floors,
    Limits,
    Option,
    Outside,
    OutsideCurve,
    Spent,
    Step,
    Tried,
    risen,
    within,
)
from .units import Group


class Spending:
    """One run: what is left so far, the steps to it, and what everything is thought to cost."""

    def __init__(
        self,
        prices: Prices,
        kinds: Sequence[PricedKind],
        floors: Floors,
        outside: Sequence[Outside],
        multiple: int,
        limits: Limits,
    ) -> None:
        """A run down to `limits`; for the other arguments see `spend.spend`."""
        self.prices, self.kinds, self.floors, self.multiple = prices, kinds, floors, multiple
        self.outside = [OutsideCurve(o, prices.bytes_per_token) for o in outside]
        self.limits = limits
        self.groups = prices.groups
        self.decision = Decision.whole(prices.layers)
        self.kept = self.decision.kept
        self.left = prices.whole
        self.steps: list[Step] = []
        self.checks: list[Check] = []
        self.round = 0
        self.factor = 1.0  # of the curves of neurons
        self._need = {r: max(1e-9, getattr(self.left, r) - most) for r, most in limits.items()}
        # Of each large removal: its price, the round that it is of, and what had by then been
        # spent on parts of it.
        self._known = {
            p.removal: (p.increase, 0, 0.0) for p in prices.large if p.removal.kind in kinds
        }
        self._spent: dict[tuple[int, str], float] = {}
        self._touched: set[int] = set()  # layers with a large removal in this round
        curves = prices.curves if "neurons" in kinds else ()
        self._curves = {c.group: c.by_units(prices.scores[c.group]).tolist() for c in curves}
        self._layer = {c.group: c.layer for c in curves}
        self._order = {g: prices.scores[g].argsort(stable=True).tolist() for g in self._curves}
        self._cached: dict[int, list[Option]] = {}

    def run(self, rounds: int, trials: Callable[[Decision], Tried] | None) -> None:
        """Buy until the limits are kept, or nothing is left to buy."""
        tried = trials(self.decision) if trials else None
        since = self._lacking()
        while self._lacking() > 0:
            best, blocked = self._best(tried is not None)
            done = since - self._lacking()
            if tried and trials and done > 0:
                early = blocked < (self._price(best) if best else NEVER) and done >= 0.25 / rounds
                if done >= 1 / rounds or early or best is None:
                    tried, since = trials(self.decision), self._lacking()
                    self._next_round(tried)
                    continue
            if best is None:
                return
            if tried and self._stale(best):
                (rise,) = tried.rises([best.removal])  # type: ignore[list-item]
                self._note(best.removal, self.prices.rate * rise.divergence)  # type: ignore[arg-type]
                continue
            self._buy(best)

    def until(self, target: Limits, trials: Callable[[Decision], Tried] | None) -> Spent:
        """The first steps that keep the limits, less those that turn out not to be needed."""
        left, number = self.prices.whole, 0
        while number < len(self.steps) and not within(left, target):
            left -= self.steps[number].saves
            number += 1
        steps = list(self.steps[:number])
        closed: set[str] = set()  # what is bought in order can only be given back in order
        for step in reversed(self.steps[:number]):
            name = step.outside or (step.removal.group if step.removal else "")
            if name and name in closed:
                continue
            if not _covered(step, steps, self.groups) and within(left + step.saves, target):
                left += step.saves
                steps.remove(step)
            elif step.removal is None or step.removal.kind == "neurons":
                closed.add(name)
        decision = Decision.whole(self.prices.layers)
        for step in steps:
            if step.removal is not None:
                decision = decision.without(self.prices.layers, step.removal)
        rounds = steps[-1].round if steps else 0
        start = self.checks[rounds - 1].measured if rounds else self.prices.loss
        dropped = [s for s in self.steps[:number] if s not in steps and s.round < rounds]
        tried = trials(decision) if trials else None
        return Spent(
            decision=decision,
            outside={
                o.name: (sum(s.saves.parameters for s in steps if s.outside == o.name),
                         sum(s.increase for s in steps if s.outside == o.name))
                for o in self.outside
            },
            left=left,
            before=self.prices.loss,
            listed=self.prices.loss + risen(steps),
            expected=start + risen(s for s in steps if s.round == rounds) - risen(dropped),
            measured=tried.loss() if tried else None,
            steps=tuple(steps),
            checks=tuple(self.checks[:rounds]),
            divergence=tried.divergence() if tried else None,
        )  # fmt: skip

    def _lacking(self) -> float:
        """How much of what was too much still is, the most over the resources, 0 to 1."""
        shares = [(getattr(self.left, r) - m) / self._need[r] for r, m in self.limits.items()]
        return float(max(shares, default=0.0))

    def _worth(self, saves: Amounts) -> float:
        """How much of what is too much the saving takes away; no more than there is."""
        worth = 0.0
        for r, most in self.limits.items():
            worth += min(getattr(saves, r), max(0.0, getattr(self.left, r) - most)) / self._need[r]
        return worth

    def _price(self, option: Option) -> float:
        worth = self._worth(option.saves)
        return option.increase / worth if worth > 0 else NEVER

    def _best(self, tries: bool) -> tuple[Option | None, float]:
        """The cheapest option, and the price of the cheapest that has to wait for a round."""
        best, cheapest, blocked = None, NEVER, NEVER
        for layer in range(len(self.prices.layers)):
            if layer not in self._cached:
                self._cached[layer] = self._options(layer)
            for option in self._cached[layer]:
                found = self._price(option)
                large = option.removal is not None and option.removal.kind in LARGE
                if large and not self._allowed(option.removal):  # type: ignore[arg-type]
                    continue
                if large and tries and layer in self._touched:
                    blocked = min(blocked, found)
                elif found < cheapest:
                    best, cheapest = option, found
        need = self._lacking() * self._need.get("parameters", 0.0)
        for curve in self.outside:
            piece = curve.next(need)
            if piece is not None and (found := self._price(piece)) < cheapest:
                best, cheapest = piece, found
        return best, blocked

    def _options(self, number: int) -> list[Option]:
        """What can be bought in a layer; floors over several layers are looked at later."""
        if not self.decision.layers[number]:
            return []
        layer, found = self.prices.layers[number], []
        for large, (increase, _, before) in self._known.items():
            if large.layer != number or not self._there(large):
                continue
            if not large.units:  # parts of it may have been bought since its price was found
                increase = max(0.0, increase - self._inside(large) + before)
            found.append(Option(large, None, self._saved(large), increase))
        for g in layer.groups:
            if g.name in self._curves and (removal := self._neurons(g.name)):
                first = g.size - self.kept[g.name]
                cost = self._curves[g.name]
                rise = (cost[first + len(removal.units)] - cost[first]) * self.factor
                found.append(Option(removal, None, self._saved(removal), rise))
        return found

    def _neurons(self, name: str, share: float = 1 / PIECES) -> Removal | None:
        """The next neurons of a group that go; whole multiples stay."""
        g, kept, step = self.groups[name], self.kept[name], self.multiple
        floor = max(step, self.floors.units.get("neurons", 1))
        size = kept % step + max(1, round(g.size * share / step)) * step
        size = min(size if kept % step == 0 else kept % step, kept - -(-floor // step) * step)
        if size <= 0:
            return None
        first = g.size - kept
        return Removal("neurons", self._layer[name], name,
                       tuple(sorted(self._order[name][first : first + size])))  # fmt: skip

    def _there(self, removal: Removal) -> bool:
        """Whether it can still be removed, as far as its own layer says."""
        layer = self.prices.layers[removal.layer]
        if removal.units:
            g = self.groups[removal.group]
            floor = max(1, g.least, self.floors.units.get(g.kind, 1))
            kept = self.decision.keep[g.name][list(removal.units)].all()
            return bool(kept) and self.kept[g.name] > floor
        if removal.kind == "layers":
            return True
        return any(self.kept[g.name] for g in self._half(layer.number, removal.kind))

    def _allowed(self, removal: Removal) -> bool:
        """Whether the floors over all layers leave room for it."""
        alive = [n for n, stays in enumerate(self.decision.layers.tolist()) if stays]

        def full(kind: str) -> int:
            return sum(any(self.kept[g.name] for g in self._half(n, kind)) for n in alive)

        if removal.kind == "layers" and len(alive) <= self.floors.layers:
            return False
        for kind, floor in (("attention", self.floors.attention), ("mlp", self.floors.mlp)):
            whole = any(self.kept[g.name] for g in self._half(removal.layer, kind))
            if removal.kind in (kind, "layers") and floor and whole and full(kind) <= floor:
                return False
        return True

    def _half(self, number: int, kind: str) -> tuple[Any, ...]:
        layer = self.prices.layers[number]
        return counted(layer.attention if kind == "attention" else layer.mlp)

    def _inside(self, removal: Removal) -> float:
        """What was spent so far on parts of a half or a layer."""
        halves = (removal.kind,) if removal.kind != "layers" else ("attention", "mlp")
        return sum((self._spent.get((removal.layer, half), 0.0) for half in halves), 0.0)

    def _saved(self, removal: Removal) -> Amounts:
        books = self.prices.ledger
        before = books.of(removal.layer, self.kept)
        if removal.kind == "layers":
            return before
        after = dict(self.kept)
        if removal.units:
            after[removal.group] -= len(removal.units)
        else:
            after |= {g.name: 0 for g in self._half(removal.layer, removal.kind)}
        return before - books.of(removal.layer, after)

    def _stale(self, option: Option) -> bool:
        """Whether it is a large removal whose price is of an earlier round."""
        if option.removal is None or option.removal not in self._known:
            return False
        return self._known[option.removal][1] < self.round

    def _note(self, removal: Removal, increase: float) -> None:
        self._known[removal] = increase, self.round, self._inside(removal)
        self._cached.pop(removal.layer, None)

    def _buy(self, option: Option) -> None:
        self.left -= option.saves
        if option.outside is not None:
            option.outside.bought = option.amount
            self.steps.append(
                Step(None, option.outside.name, option.saves, option.increase, self.round)
            )
            return
        removal = option.removal
        assert removal is not None
        self.decision = self.decision.without(self.prices.layers, removal)
        kept = self.kept
        self.kept = self.decision.kept
        self._cached.pop(removal.layer, None)
        if removal.kind in LARGE:
            self._touched.add(removal.layer)
        kind = self.groups[removal.group].kind if removal.group else ""
        half = removal.kind if not kind else "attention" if kind == "heads" else "mlp"
        self._spent[removal.layer, half] = (
            self._spent.get((removal.layer, half), 0.0) + option.increase
        )
        if removal.kind != "neurons":
            self.steps.append(Step(removal, "", option.saves, option.increase, self.round))
            return
        # In pieces of one multiple, so that a target is met to within one of them.
        first = self.groups[removal.group].size - kept[removal.group]
        order, cost = self._order[removal.group], self._curves[removal.group]
        for at in range(0, len(removal.units), self.multiple):
            end = min(at + self.multiple, len(removal.units))
            units = tuple(sorted(order[first + at : first + end]))
            rise = (cost[first + end] - cost[first + at]) * self.factor
            part = option.saves * ((end - at) / len(removal.units))
            piece = Removal("neurons", removal.layer, removal.group, units)
            self.steps.append(Step(piece, "", part, rise, self.round))

    def _next_round(self, tried: Tried) -> None:
        """Measure where the spending is, and by how much the curves are off."""
        start = self.checks[-1].measured if self.checks else self.prices.loss
        expected = start + risen(s for s in self.steps if s.round == self.round)
        self.checks.append(Check(self.left, expected, tried.loss()))
        self.round += 1
        self._touched.clear()
        names = [n for n in self._curves if self.decision.layers[self._layer[n]]]
        pieces = {n: r for n in names if (r := self._neurons(n, 0.05)) is not None}
        if pieces:
            names = list(pieces)
            places = torch.linspace(0, len(names) - 1, min(3, len(names))).round().long()
            probes = [names[i] for i in dict.fromkeys(places.tolist())]
            rises = tried.rises([pieces[n] for n in probes])
            costs = [self.prices.rate * rise.divergence for rise in rises]
            listed = 0.0
            for name in probes:
                first = self.groups[name].size - self.kept[name]
                cost = self._curves[name]
                listed += cost[first + len(pieces[name].units)] - cost[first]
            if listed > 0:
                self.factor = min(10.0, max(0.5, sum(costs) / listed))
        self._cached.clear()


def _covered(step: Step, steps: Sequence[Step], groups: Mapping[str, Group]) -> bool:
    """Whether another of the steps took the half or the layer that this one took a part of."""
    removal = step.removal
    if removal is None or removal.kind == "layers":
        return False
    over = {"layers"}
    if removal.group:
        over.add("attention" if groups[removal.group].kind == "heads" else "mlp")
    others = (s.removal for s in steps if s.removal is not None)
    return any(o.layer == removal.layer and o.kind in over for o in others)
