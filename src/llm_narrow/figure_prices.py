"""The price list as a figure: what each kind could save at what price, and prices by layer."""

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from .budget import PricedKind
from .figure_style import MARKERS, SERIES, Drawn, Floats, finished, legend, sheet, short, styled
from .report import plain

if TYPE_CHECKING:
    from .prices import Prices

LEAST = 1e-5  # nats per million parameters: cheaper ones, and gains, are drawn here


def figure(prices: "Prices") -> Drawn:
    """Prices at the margin against parameters saved, cheapest first; and removals by layer."""
    with styled():
        return _figure(prices)


def _figure(prices: "Prices") -> Drawn:
    sheet_, (top, below) = sheet(5.2, nrows=2, height_ratios=[3, 2.2])
    colours: dict[PricedKind, str] = dict(zip(prices.kinds, SERIES, strict=False))
    handles: dict[str, Any] = {}
    told = []
    for kind, colour in colours.items():
        saved, rates = _neurons(prices) if kind == "neurons" else _large(prices, kind)
        order = np.argsort(rates, kind="stable")
        ends = np.cumsum(saved[order])
        (line,) = top.step(
            np.concatenate([[0.0], ends]),
            np.maximum(np.concatenate([rates[order][:1], rates[order]]), LEAST),
            where="pre", color=colour,
        )  # fmt: skip
        handles[kind] = line
        told.append(f"{kind} from {plain(rates.min())} to {plain(rates.max())}")
    _logarithmic(top)
    top.set_ylabel("nats per million parameters")
    top.set_xlabel("parameters saved by one kind alone, cheapest first")
    top.xaxis.set_major_formatter(FuncFormatter(short))
    for (kind, colour), marker in zip(colours.items(), MARKERS, strict=False):
        own = [p for p in prices.large if p.removal.kind == kind]
        if own:
            below.plot(
                [p.removal.layer for p in own], [max(p.increase, LEAST) for p in own],
                marker, color=colour, alpha=0.75,
            )  # fmt: skip
    _logarithmic(below)
    below.set_ylabel("nats per token")
    below.set_xlabel("layer")
    below.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    legend(sheet_, list(handles.values()), list(handles))
    return finished(
        sheet_,
        "prices",
        title="What it costs to remove something",
        caption="Above, each kind alone: the price of the next removal once so many parameters "
        "have been saved, if prices stayed what they are; they rise as more goes. Below, single "
        "removals by layer. Gains are drawn at the bottom.",
        alt=f"Prices in nats per token for a million parameters: {'; '.join(told)}.",
    )


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(short))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _large(prices: "Prices", kind: PricedKind) -> tuple[Floats, Floats]:
    own = [p for p in prices.large if p.removal.kind == kind]
    saved = np.array([p.saves.parameters for p in own], dtype=np.float64)
    return saved, np.array([p.per("parameters", 1e6) for p in own], dtype=np.float64)


def _neurons(prices: "Prices") -> tuple[Floats, Floats]:
    """Fiftieths of each group as what is bought at one price."""
    groups, saved, rates = prices.groups, [], []
    for c in prices.curves:
        cost = c.by_units(prices.scores[c.group]).numpy()
        n = groups[c.group].size
        kept = {g.name: g.size for g in prices.layers[c.layer].groups}
        whole = prices.ledger.of(c.layer, kept).parameters
        one = whole - prices.ledger.of(c.layer, {**kept, c.group: n - 1}).parameters
        ends = np.unique(np.linspace(0, n, 51).round().astype(np.int64))
        saved.append(one * np.diff(ends))
        rates.append(np.diff(cost[ends]) / (one * np.diff(ends)) * 1e6)
    return np.concatenate(saved).astype(np.float64), np.concatenate(rates)
