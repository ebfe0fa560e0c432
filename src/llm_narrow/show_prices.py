"""The price list as tables."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from .budget import LARGE
from .report import percent, thousands

if TYPE_CHECKING:
    from .beside import Option
    from .prices import Price, Prices
    from .pricing import Priced
    from .purchases import Spent

CHEAPEST = 12  # single removals that are shown
NAMES = {"vocabulary": "tokens", "query_heads": "query heads", "channels": "channels"}
STEPS = (0.1, 0.3, 0.5)  # shares of all neurons whose price is shown


def shown(result: "Priced") -> RenderableType:
    """A line per kind, the cheapest single removals, neurons by share, and what sizes buy."""
    p = result.prices
    parts: list[RenderableType] = [
        f"{result.name} on {result.domain}: loss {p.loss:.4f} nats per token on "
        f"{thousands(p.targets)} tokens; every large unit was really removed and measured there.",
    ]
    if p.large:
        parts += [_kinds(p), _cheapest(p)]
    if p.curves:
        parts.append(_neurons(p))
    for kind in LARGE:
        if (found := p.correlation(kind)) is not None:
            parts.append(f"Rank correlation of the scores of {kind} with these prices: {found:.2f}")
    if result.beside:
        parts.append(_beside(result.beside))
    parts += [f"{kind}: {why}" for kind, why in result.refused.items()]
    if result.sizes:
        parts.append(_sizes(result.sizes, p))
    return Group(*parts)


def _kinds(p: "Prices") -> Table:
    table = _table(
        "Prices of each kind, in nats per token for a million parameters",
        "kind", "number", "parameters", "cheapest", "median", "dearest", "nats", "KV bytes",
    )  # fmt: skip
    for kind in dict.fromkeys(price.removal.kind for price in p.large):
        own = sorted(
            (price for price in p.large if price.removal.kind == kind),
            key=lambda price: price.per("parameters"),
        )
        rates = [price.per("parameters", 1e6) for price in own]
        one = own[len(own) // 2]
        table.add_row(
            kind, thousands(len(own)), thousands(one.saves.parameters),
            *(f"{rate:.4f}" for rate in (rates[0], rates[len(rates) // 2], rates[-1])),
            f"{own[len(own) // 2].increase:+.4f}", thousands(one.saves.kv_bytes),
        )  # fmt: skip
    return table


def _cheapest(p: "Prices") -> Table:
    table = _table(
        f"The {CHEAPEST} cheapest single removals for each parameter saved",
        "what", "nats", "parameters", "per million", "per MFLOP", "per KV kB",
    )  # fmt: skip
    for price in sorted(p.large, key=lambda price: price.per("parameters"))[:CHEAPEST]:
        table.add_row(
            price.removal.name, f"{price.increase:+.4f}",
            thousands(price.saves.parameters), f"{price.per('parameters', 1e6):.4f}",
            _rate(price, "flops", 1e6), _rate(price, "kv_bytes", 1e3),
        )  # fmt: skip
    return table


def _rate(price: "Price", resource: str, unit: float) -> str:
    found = price.per(resource, unit)
    return "-" if found == float("inf") else f"{found:.4f}"


def _neurons(p: "Prices") -> Table:
    """The next neurons of each layer once a share went: the price at the margin."""
    table = _table(
        f"Neurons, in nats per token for a million parameters, once a share has gone "
        f"(rise as the {p.power:.2f}th power of the score that went)",
        "layer", "tried", *(f"at {percent(x)}" for x in STEPS), "nats of all",
    )  # fmt: skip
    groups = p.groups
    for c in p.curves:
        cost = c.by_units(p.scores[c.group])
        n = groups[c.group].size
        kept = {g.name: g.size for g in p.layers[c.layer].groups}
        whole = p.ledger.of(c.layer, kept).parameters
        one = whole - p.ledger.of(c.layer, {**kept, c.group: n - 1}).parameters
        rates = []
        for x in STEPS:
            first = round(x * n)
            ahead = min(n, first + max(1, n // 50))
            rates.append(float(cost[ahead] - cost[first]) / (one * (ahead - first)) * 1e6)
        told = " ".join(f"{m}:{d:+.3f}" for m, d in c.tried)
        table.add_row(str(c.layer), told, *(f"{r:.4f}" for r in rates), f"{float(cost[-1]):+.4f}")
    return table


def _beside(options: "Sequence[Option]") -> Table:
    table = _table(
        "Beside units, each alone: settings of `prune`, really carried out",
        "what stays", "nats", "parameters", "per million", "per MFLOP", "per KV kB",
    )  # fmt: skip
    for o in options:
        asked = f", {o.setting.split()[-1]} uses" if o.kind == "vocabulary" else ""
        rates = [
            f"{o.increase / saved * unit:.4f}" if saved > 0 else "-"
            for saved, unit in zip(o.saves.each(), (1e6, 1e6, 1e3), strict=True)
        ]
        table.add_row(
            f"{thousands(o.left)} {NAMES[o.kind]}{asked}", f"{o.increase:+.4f}",
            thousands(o.saves.parameters), *rates,
        )  # fmt: skip
    return table


def _sizes(sizes: "Sequence[tuple[str, Spent]]", p: "Prices") -> Table:
    table = _table(
        "What sizes would buy by this list alone, without measuring again",
        "size", "parameters", "expected nats more", "layers", "bought",
    )  # fmt: skip
    for name, spent in sizes:
        bought = spent.facts()["bought"]
        told = ", ".join(
            f"{thousands(b['number'])} {kind} ({percent(b['parameters'] / p.whole.parameters)})"
            for kind, b in bought.items()
        )
        table.add_row(
            name, thousands(spent.left.parameters), f"{spent.expected - spent.before:+.4f}",
            f"{int(spent.decision.layers.sum())} of {len(p.layers)}", told,
        )  # fmt: skip
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        words = number == 0 or column in ("tried", "bought")
        table.add_column(column, justify="left" if words else "right", overflow="fold")
    return table
