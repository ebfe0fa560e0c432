"""What a budget buys: targets and floors in, decisions with what they are expected to cost out."""

from collections.abc import Callable, Mapping, Sequence

from .budget import RESOURCES, PricedKind
from .decision import Decision
from .errors import TargetOutOfReach, UnknownName
from .prices import Prices
from .purchases import NEVER, Floors, Limits, Outside, Spent, Tried
from .spending import Spending

__all__ = ["Floors", "Limits", "Outside", "Spent", "spend"]


def spend(
    prices: Prices,
    targets: Limits | Sequence[Limits],
    *,
    kinds: Sequence[str] | None = None,
    floors: Floors | None = None,
    outside: Sequence[Outside] = (),
    multiple: int = 8,
    rounds: int = 8,
    trials: Callable[[Decision], Tried] | None = None,
) -> list[Spent]:
    """What to remove for each of the targets, all from one run down to the hardest.

    A target says how much may be left of some resources: `parameters`, `bytes`, `flops` (of one
    token) or `kv_bytes` (of one token). Widths of neurons are multiples of `multiple`. Without
    `trials` (a model's `Trials` for a decision) nothing is measured, so prices are those of the
    list throughout; it takes seconds, and is too hopeful where much goes.

    Raises TargetOutOfReach with the least that can be left, and what holds it up.
    """
    wanted = [targets] if isinstance(targets, Mapping) else list(targets)
    limits = [limits_of(t, prices) for t in wanted]
    hardest = {r: min(t.get(r, NEVER) for t in limits) for r in RESOURCES}
    hardest = {r: most for r, most in hardest.items() if most < NEVER}
    floors = floors or Floors()
    chosen = chosen_kinds(prices, kinds)
    least = Spending(prices, chosen, floors, outside, multiple, dict.fromkeys(hardest, 0.0))
    least.run(1, None)
    for target in limits:
        _check(prices, target, least, floors, chosen)
    run = Spending(prices, chosen, floors, outside, multiple, hardest)
    run.run(rounds, trials)
    return [run.until(target, trials) for target in limits]


def chosen_kinds(prices: Prices, kinds: Sequence[str] | None) -> tuple[PricedKind, ...]:
    """Those of the kinds that have a price, all unless given. Raises UnknownName."""
    for kind in kinds or ():
        if kind not in prices.kinds:
            raise UnknownName("kind", kind, prices.kinds, "Only what has a price can be bought.")
    return tuple(kind for kind in prices.kinds if kinds is None or kind in kinds)


def limits_of(target: Limits, prices: Prices) -> dict[str, float]:
    """A target by resource, bytes as parameters. Raises UnknownName."""
    found: dict[str, float] = {}
    for name, most in target.items():
        resource = "parameters" if name == "bytes" else name
        if resource not in RESOURCES:
            raise UnknownName("target", name, [*RESOURCES, "bytes"])
        most = most / prices.ledger.bytes_per_parameter if name == "bytes" else most
        found[resource] = min(most, found.get(resource, NEVER))
    return found


def _check(
    prices: Prices,
    target: Limits,
    least: "Spending",
    floors: Floors,
    kinds: Sequence[PricedKind],
) -> None:
    whole = prices.whole
    for resource, most in target.items():
        has, low = getattr(whole, resource), getattr(least.left, resource)
        what = resource.replace("_", "-")
        if most > has:
            raise TargetOutOfReach(
                f"{what} {most:,.0f} is above the {has:,.0f} that the model has. Ask for fewer, or "
                "leave the model as it is."
            )
        if low <= most:
            continue
        apart = getattr(prices.ledger.outside, resource)
        for o in least.outside:
            apart -= getattr(o.saves(o.end), resource)
        alive = int(least.decision.layers.sum())
        held = [f"{apart:,.0f} lie outside of the layers (embeddings, head, last norm)"]
        inside = f"{low - apart:,.0f} are in the {alive} layers that are left"
        limits = [f"{n} {k}" for k, n in floors.units.items() if n > 1]
        limits += [f"{getattr(floors, k)} halves of {k}" for k in ("attention", "mlp")
                   if getattr(floors, k)]  # fmt: skip
        if "layers" in kinds:
            limits = [f"{floors.layers} layers", *limits]
        told = f", where the floor is {', '.join(limits)}" if limits else ""
        raise TargetOutOfReach(
            f"{what} {most:,.0f} is below {low:,.0f}, the least that removing "
            f"{', '.join([*kinds, *(o.name for o in least.outside)])} can reach ({low / has:.1%} "
            f"of {has:,.0f}): {held[0]}, {inside}{told}. Ask for more, lower the floor or allow "
            "more kinds."
        )
