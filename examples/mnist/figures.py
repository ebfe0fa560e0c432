"""The figures, drawn from what results.json holds."""

from collections.abc import Callable, Mapping
from typing import Any

from compared import PAPER
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator
from presets import METHODS

from llm_narrow.figure_style import (
    COLOUR,
    MARKERS,
    SERIES,
    Drawn,
    finished,
    legend,
    sheet,
    short,
    styled,
)

Found = Mapping[str, Any]
LOOK = {method: (SERIES[n], MARKERS[n]) for n, method in enumerate(METHODS)}
TITLES = {
    "paper": "the paper's way: means, stopped by test digits",
    "fair": "the fair way: medians, stopped by validation digits",
}


def draw(experiment: str, found: Found) -> list[Drawn]:
    """The figures of one experiment."""
    with styled():
        return [figure(found) for figure in FIGURES.get(experiment, ())]


def needed(found: Found) -> Drawn:
    """Examples until the goal against hidden units, an axis for each way (figure 4, left)."""
    ways = found["lines"]
    figure, axes = sheet(0.6 + 2.7 * len(ways), nrows=len(ways), sharex=True, squeeze=False)
    told = []
    for place, (name, lines) in enumerate(ways.items()):
        ax = axes[place][0]
        for method, points in lines.items():
            colour, marker = LOOK[method]
            line = PAPER[method]
            ax.plot(list(line), list(line.values()), color=colour, lw=1, ls=":", alpha=0.6)
            shown = [p for p in points if p["value"] is not None]
            x = [p["neurons"] for p in shown]
            ax.plot(x, [max(1.0, p["value"]) for p in shown], color=colour, marker=marker)
            for p in points:
                interval(ax, p, colour)
            told += [f"{name}, {method}, {p['neurons']:.0f} units: "
                     f"{'not reached' if p['value'] is None else short(p['value'])}"
                     for p in points]  # fmt: skip
        ax.set_title(TITLES.get(name, name))
        ax.set_ylabel("examples to the goal")
        ax.set_xscale("log")
        ax.set_yscale("log")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(FuncFormatter(short))
            axis.set_minor_locator(NullLocator())
        ax.set_xticks([30, 100, 300, 1000, 2400])
        ax.set_yticks([500, 1000, 3000, 10_000, 30_000, 100_000])
    axes[-1][0].set_xlabel("hidden units")
    handles = [Line2D([], [], color=c, marker=m) for c, m in LOOK.values()]
    handles.append(Line2D([], [], color=COLOUR["muted"], lw=1, ls=":"))
    legend(figure, handles, [*METHODS, "the paper's"])
    return finished(
        figure, "mnist-examples", title="Examples needed by networks of every size",
        caption="Bars are 95 % intervals over runs. A bar with an arrow has no upper end: too many "
        "runs failed; without a point the median run did. Dotted lines are the paper's numbers.",
        alt=f"Examples until the goal: {'; '.join(told)}.",
    )  # fmt: skip


def interval(ax: Any, point: Found, colour: str) -> None:
    """The interval of a point, with an arrow where it has no end below the cap."""
    low = point["low"] if point["low"] is not None else point["cap"]
    high = point["high"] if point["high"] is not None else point["cap"]
    x = [point["neurons"]] * 2
    ax.plot(x, [max(1.0, low), max(1.0, high)], color=colour, lw=1, alpha=0.7)
    if point["high"] is None:
        ax.plot(x[:1], [high], color=colour, marker="^", ms=5, mfc="none")


def falling(found: Found) -> Drawn:
    """Accuracy and units of lasso runs against examples (figure 4, right)."""
    figure, axes = sheet(3.6, nrows=2, sharex=True)
    lasso = found["outcomes"]["lasso"]
    runs: dict[tuple[int, Any], list[Found]] = {}
    for row in lasso["curves"]:
        runs.setdefault((row["config"], row["target"]), []).append(row)
    for (config, target), rows in runs.items():
        rows = sorted(rows, key=lambda row: row["examples"])
        look: dict[str, Any] = {"color": SERIES[config % 8], "lw": 1.4 if target is None else 0.9,
                                "ls": "--" if target is None else "-"}  # fmt: skip
        x = [row["examples"] for row in rows]
        axes[0].plot(x, [row["accuracy"] for row in rows], **look)
        axes[1].plot(x, [max(1, row["neurons"]) for row in rows], **look)
    axes[0].set_title("accuracy on even digits")
    axes[1].set_title("hidden units")
    axes[1].set_yscale("log")
    axes[1].yaxis.set_major_formatter(FuncFormatter(short))
    axes[1].yaxis.set_minor_locator(NullLocator())
    axes[1].xaxis.set_major_formatter(FuncFormatter(short))
    axes[1].set_xlabel("examples")
    used = sorted({config for config, _ in runs})
    handles = [Line2D([], [], color=SERIES[c % 8]) for c in used]
    named = [f"lr {lasso['configs'][c]['lr']:g}, strength {lasso['configs'][c]['strength']:g}"
             for c in used]  # fmt: skip
    legend(figure, handles, named)
    ends = [row["accuracy"] for row in lasso["curves"]]
    return finished(
        figure, f"mnist-lasso-{found['way']}", title="Units go, accuracy falls and comes back",
        caption="One seed. Dashed while the penalty is on, whole from where a run has the number "
        "of units that it is to end with.",
        alt=f"Accuracies of lasso runs between {min(ends, default=0):.3f} and "
        f"{max(ends, default=0):.3f}.",
    )  # fmt: skip


FIGURES: dict[str, tuple[Callable[[Found], Drawn], ...]] = {
    "paper": (falling,),
    "fair": (falling,),
    "compared": (needed,),
}
