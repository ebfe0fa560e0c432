"""The same budget where every layer keeps the same widths: what a stock config can hold.

There are few such models: a number of layers, a number of heads, a share of the neurons. All that
keep the limits are told apart by the price list, the widest of each number of layers and heads, and
the best few are really measured.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

from .budget import Amounts, Removal
from .decision import Decision
from .errors import TargetOutOfReach
from .prices import Prices, lowest, saved
from .purchases import Floors, Limits, Spent, Step, Tried, risen, within
from .spend import chosen_kinds, limits_of
from .units import Group, Kind

TRIES = 3  # models that are measured
StepsTo = Callable[[int], list[Step]]  # a width


def spend_even(
    prices: Prices,
    target: Limits,
    *,
    kinds: Sequence[str] | None = None,
    floors: Floors | None = None,
    multiple: int = 8,
    tries: int = TRIES,
    trials: Callable[[Decision], Tried] | None = None,
) -> Spent:
    """The best of the even models that keep the target's limits (see `spend.spend`).

    Layers go in the order of their prices; of each layer the cheapest heads and the lowest-scored
    neurons. Kinds that no stock config holds in another number stay whole, and so do experts and
    halves of layers. Raises TargetOutOfReach.
    """
    limits, floors = limits_of(target, prices), floors or Floors()
    allowed = chosen_kinds(prices, kinds)
    found: list[Spent] = []
    least = prices.whole
    for widths, steps_to in _models(prices, allowed, floors, multiple):

        def left(width: int, steps_to: StepsTo = steps_to) -> Amounts:
            return sum((prices.whole, *(step.saves * -1 for step in steps_to(width))), Amounts())

        least = min(least, left(widths[-1]), key=lambda amounts: amounts.parameters)
        # What is left falls with the width, so the widest that fits is found by halving.
        first = bisect_left(widths, True, key=lambda width: within(left(width), limits))
        if first == len(widths):
            continue
        steps = steps_to(widths[first])
        decision = Decision.whole(prices.layers)
        for step in steps:
            assert step.removal is not None
            decision = decision.without(prices.layers, step.removal)
        listed = prices.loss + risen(steps)
        found.append(
            Spent(decision, {}, left(widths[first]), prices.loss, listed, listed, None,
                  tuple(steps), ())
        )  # fmt: skip
    if not found:
        raise TargetOutOfReach(
            f"No model of even widths keeps {_told(target)}: the smallest has "
            f"{least.parameters:,.0f} parameters. Ask for more, lower the floors, allow more "
            "kinds, or let widths be uneven."
        )
    found.sort(key=lambda spent: spent.listed)
    if trials is None:
        return found[0]
    measured = []
    for spent in found[:tries]:  # one at a time: each holds a model
        tried = trials(spent.decision)
        measured.append(replace(spent, measured=tried.loss(), divergence=tried.divergence()))
    return min(measured, key=lambda spent: spent.divergence or 0.0)


def _models(
    prices: Prices, kinds: Sequence[str], floors: Floors, multiple: int
) -> Iterator[tuple[list[int], StepsTo]]:
    """For each number of layers and of heads the widths, the widest first, and the steps to one."""
    groups = list(prices.groups.values())
    heads = _changeable(groups, "heads") if "heads" in kinds else []
    neurons = _changeable(groups, "neurons") if "neurons" in kinds else []
    layers = sorted(
        (p for p in prices.large if p.removal.kind == "layers" and "layers" in kinds),
        key=lambda p: p.increase,
    )[: max(0, len(prices.layers) - floors.layers)]
    per_layer = min((g.size for g in heads), default=1)
    fewest = max(1, floors.units.get("heads", 1))
    widest = max((g.size for g in neurons), default=0)
    low = max(multiple, floors.units.get("neurons", 1))
    widths = [widest, *range(widest - widest % multiple, low - 1, -multiple)]
    cost = {c.group: c.by_units(prices.scores[c.group]).tolist() for c in prices.curves}
    order = {
        g.name: sorted(
            (p.increase, p.removal.units) for p in prices.large if p.removal.group == g.name
        )
        for g in heads
    }
    own = {g.name: layer.number for layer in prices.layers for g in layer.groups}
    whole = Decision.whole(prices.layers)
    cheap: dict[tuple[str, int], Step] = {}

    def less(g: Group, gone: int) -> Step:
        """The removal of so many units of a group."""
        if (g.name, gone) not in cheap:
            if g.kind == "heads":
                picked = order[g.name][:gone]
                units = tuple(sorted(u for _, own_ in picked for u in own_))
                rise = sum(d for d, _ in picked)
            else:
                units, rise = lowest(prices.scores[g.name], gone), cost[g.name][gone]
            removal = Removal(g.kind, own[g.name], g.name, units)
            saves = saved(prices.ledger, whole, removal)
            cheap[g.name, gone] = Step(removal, "", saves, rise, 0)
        return cheap[g.name, gone]

    numbers = range(per_layer, min(fewest, per_layer) - 1, -1)

    def steps_to(width: int, fewer: int, stay: int) -> list[Step]:
        dead = {p.removal.layer for p in layers[:fewer]}
        steps = [Step(p.removal, "", p.saves, p.increase, 0) for p in layers[:fewer]]
        for g in heads:
            if own[g.name] not in dead and stay < g.size:
                steps.append(less(g, g.size - stay))
        for g in neurons:
            kept = max(1, round(width / widest * g.size / multiple)) * multiple
            if own[g.name] not in dead and width < widest and kept < g.size:
                steps.append(less(g, g.size - kept))
        return steps

    for fewer, stay in product(range(len(layers) + 1), numbers):
        yield list(dict.fromkeys(widths)), partial(steps_to, fewer=fewer, stay=stay)


def _changeable(groups: Sequence[Group], kind: Kind) -> list[Group]:
    """The groups of a kind, where a stock config holds them in any number, the same everywhere."""
    own = [g for g in groups if g.kind == kind]
    alike = kind == "neurons" or len({g.size for g in own}) == 1
    return own if alike and all(g.config is not None for g in own) else []


def _told(target: Limits) -> str:
    return ", ".join(f"{name} {most:,.0f}" for name, most in target.items())
