"""The figures of each experiment, drawn from what results.json holds of it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from recovering import selected

from llm_narrow.figure_style import (
    COLOUR,
    HEAT,
    SERIES,
    Drawn,
    finished,
    legend,
    sheet,
    short,
    styled,
)

Found = Mapping[str, Any]
MARKS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98)  # sparsities that are named on an axis


def draw(experiment: str, found: Found) -> list[Drawn]:
    """The figures of one experiment; none for those that have none."""
    with styled():
        return [figure(found) for figure in FIGURES.get(experiment, ())]


def learning(found: Found) -> Drawn:
    """Loss of the composite against samples, a line for each seed, an axis for each arm."""
    arms = found["outcomes"]
    figure, axes = sheet(0.55 + 0.85 * len(arms), nrows=len(arms), sharex=True, squeeze=False)
    told = []
    for place, (name, arm) in enumerate(arms.items()):
        ax, curves = axes[place][0], arm["curves"]
        for line, learned in zip(curves["composite"], arm["learned"], strict=True):
            colour = SERIES[0] if learned else COLOUR["muted"]
            ax.plot(curves["samples"], line, color=colour, lw=0.8, alpha=0.7)
        count, of = sum(arm["learned"]), len(arm["learned"])
        ax.set_title(f"{name}: {count} of {of} seeds learned it")
        ax.set_ylim(-0.05, 1.15)
        ax.set_yticks([0, 0.5, 1])
        samples_axis(ax)
        told.append(f"{name}, {count} of {of}")
    axes[-1][0].set_xlabel("samples of a network, all codes together")
    beside(figure, "loss of the composite, bits")
    return finished(
        figure, "parity-curriculum", title="The composite is learned beside its atomics",
        caption="A line is one network; blue where the mean loss of the last steps is below 0.1 "
        "bits. 1 bit is chance.",
        alt=f"Seeds that learned the composite: {'; '.join(told)}.",
    )  # fmt: skip


def order(found: Found) -> Drawn:
    """All codes of one network of the broad arm."""
    arm = found["outcomes"]["broad"]
    curves, codes = arm["curves"], arm["settings"]["codes"]
    figure, ax = sheet(2.6)
    handles = []
    for code, line in zip(codes, curves["shown"], strict=True):
        atomic = len(code) == 1
        colour = SERIES[1 + code[0] % 7] if atomic else SERIES[0]
        handles += ax.plot(curves["samples"], line, color=colour, lw=1.2 if atomic else 2.2)
    samples_axis(ax)
    ax.set_xlabel("samples, all codes together")
    ax.set_ylabel("loss, bits")
    legend(figure, handles, [label(code) for code in codes])
    seed = curves["shown_seed"]
    return finished(
        figure, "parity-order", title="First the atomics, then the composite",
        caption=f"Seed {seed} of the broad arm, the first that learned the composite.",
        alt=f"Loss of each code of seed {seed}; the last to fall is {label(codes[-1])}.",
    )  # fmt: skip


def pruned(found: Found) -> Drawn:
    """Accuracy against sparsity, before and after recovery, an axis for each width."""
    parts = found["outcomes"]
    figure, axes = sheet(0.7 + 1.25 * len(parts), nrows=len(parts), sharex=True, squeeze=False)
    handles: dict[str, Any] = {}
    told = []
    for place, (width, part) in enumerate(parts.items()):
        ax = axes[place][0]
        lines = {
            "kept, as cut": ("paper", "kept", "before", SERIES[0], ":"),
            "kept, recovered": ("paper", "kept", "after", SERIES[0], "-"),
            "other, as cut": ("paper", "other", "before", SERIES[1], ":"),
            "other, recovered": ("paper", "other", "after", SERIES[1], "-"),
            "kept, random units": ("random", "kept", "after", COLOUR["muted"], "-"),
            "other, fresh network": ("fresh", "other", "after", SERIES[2], "--"),
        }
        for name, (way, on, field, colour, style) in lines.items():
            rows = selected(part["rows"], way=way, trained_on=on)
            handles[name] = curve(ax, rows, field, color=colour, ls=style)
        ax.set_title(f"width {width}: {part['hidden']} hidden units")
        limits = part["limits"]["paper"]["after"]["largest"]
        told.append(f"width {width}, limits of the seeds {', '.join(f'{v:g}' for v in limits)}")
    dress(figure, axes)
    legend(figure, list(handles.values()), list(handles))
    return finished(
        figure, "parity-pruning", title="Pruning for one composite, and what comes back",
        caption="Units of the lowest absolute price for the kept code go first.",
        alt=f"Largest sparsity with the kept code at 98 %: {'; '.join(told)}.",
    )  # fmt: skip


def widths(found: Found) -> Drawn:
    """The limit of each network by width, and the units left there."""
    parts = found["outcomes"]
    figure, axes = sheet(2.5, ncols=2)
    for place, part in enumerate(parts.values()):
        limits = part["limits"]["paper"]["after"]
        for ax, values in zip(axes, (limits["largest"], limits["left"]), strict=True):
            shown = [v for v in values if v is not None]
            ax.plot([place] * len(shown), shown, "o", color=SERIES[place % 8], ms=4, alpha=0.7)
    for ax, title in zip(axes, ("largest sparsity", "units left"), strict=True):
        ax.set_xticks(range(len(parts)), list(parts))
        ax.set_xlabel("width")
        ax.set_title(title)
        ax.margins(x=0.2)
    axes[1].set_ylim(bottom=0)
    return finished(
        figure, "parity-widths", title="How far networks of each width can be cut",
        caption="A point is a network: the largest sparsity tried at which the kept code comes "
        "back to 98 %, and the units left at it.",
        alt="Limits by width: " + "; ".join(
            f"{w}: {p['limits']['paper']['after']['largest']}" for w, p in parts.items()) + ".",
    )  # fmt: skip


def unit_prices(found: Found) -> Drawn:
    """Prices of all units of one network for every code, units in the order of the first."""
    outcome = found["outcomes"]
    prices = np.log10(np.maximum(np.array(outcome["prices"]), 1e-4))  # (codes, units)
    figure, ax = sheet(0.9 + 0.22 * len(prices))
    first = outcome["width"]
    by_layer = [np.arange(first), np.arange(first, prices.shape[1])]
    kept = len(prices) - 2
    columns = np.concatenate([units[np.argsort(-prices[kept, units])] for units in by_layer])
    ax.imshow(prices[:, columns], aspect="auto", cmap=HEAT, vmin=-3, vmax=1)
    ax.axvline(first - 0.5, color=COLOUR["paper"], lw=2)
    ax.set_yticks(range(len(prices)), [label(code) for code in outcome["codes"]])
    ax.set_xlabel("hidden units, first layer | second, by their price for the first composite")
    ax.grid(visible=False)
    return finished(
        figure, "parity-scores", title="Prices of every unit for every code",
        caption="The loss added by silencing the unit, absolute, from 0.001 nats (light) to 10.",
        alt=f"Prices of {prices.shape[1]} units of one network for {len(prices)} codes.",
    )  # fmt: skip


def arms(found: Found) -> Drawn:
    """Accuracy against sparsity after each kind of training on the kept code alone."""
    parts = found["outcomes"]
    figure, axes = sheet(0.7 + 1.2 * len(parts), nrows=len(parts), sharex=True, squeeze=False)
    handles: dict[str, Any] = {}
    for place, (arm, part) in enumerate(parts.items()):
        for on, colour in (("kept", SERIES[0]), ("other", SERIES[1])):
            for field, style, what in (("before", ":", "as cut"), ("after", "-", "recovered")):
                rows = selected(part["rows"], trained_on=on)
                handles[f"{on}, {what}"] = curve(axes[place][0], rows, field,
                                                 color=colour, ls=style)  # fmt: skip
        axes[place][0].set_title(TITLES.get(arm, arm))
    dress(figure, axes)
    legend(figure, list(handles.values()), list(handles))
    return finished(
        figure, "parity-lasso", title="Narrow training with and without the group lasso",
        caption="Networks cut by the price for the kept code, after training on it alone.",
        alt="Accuracies by sparsity for " + ", ".join(parts) + ".",
    )  # fmt: skip


TITLES = {
    "before": "before narrow training",
    "gradient": "group lasso as a gradient (the paper's)",
    "proximal": "group lasso by proximal steps",
    "none": "no penalty, as many steps",
}


def curve(ax: Any, rows: Sequence[Mapping[str, Any]], field: str, **look: Any) -> Any:
    """Means over seeds against -log10(1 - sparsity), with the range of the seeds."""
    sparsities = sorted({row["sparsity"] for row in rows})
    places = [-math.log10(1 - s) for s in sparsities]
    values = [[row[field] for row in rows if row["sparsity"] == s] for s in sparsities]
    ax.fill_between(places, [min(v) for v in values], [max(v) for v in values],
                    color=look["color"], alpha=0.08, lw=0)  # fmt: skip
    return ax.plot(places, [sum(v) / len(v) for v in values], **look)[0]


def dress(figure: Any, axes: Any) -> None:
    """Sparsities below, accuracies beside."""
    beside(figure, "accuracy, mean of seeds")
    for row in axes:
        row[0].set_ylim(0.4, 1.04)
        row[0].set_yticks([0.5, 0.75, 1])
        row[0].xaxis.set_major_locator(FixedLocator([-math.log10(1 - s) for s in MARKS]))
        row[0].xaxis.set_minor_locator(NullLocator())
        row[0].xaxis.set_major_formatter(FuncFormatter(lambda u, _: f"{1 - 10**-u:.2g}"))
    axes[-1][0].set_xlabel("sparsity")


def beside(figure: Any, what: str) -> None:
    """One name for the vertical axes of all rows."""
    figure.supylabel(what, fontsize=9.5, color=COLOUR["muted"])


def samples_axis(ax: Any) -> None:
    """Samples, by decades."""
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(short))
    ax.xaxis.set_minor_locator(NullLocator())


def label(code: Sequence[int]) -> str:
    """`{0,1,2}`"""
    return "{" + ",".join(map(str, code)) + "}"


FIGURES: dict[str, tuple[Callable[[Found], Drawn], ...]] = {
    "curriculum": (learning, order),
    "pruning": (pruned, widths),
    "scores": (unit_prices,),
    "lasso": (arms,),
}
