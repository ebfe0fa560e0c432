"""The figures of one run. Each is a function of the run; None where the run has no data for it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .errors import BadInput
from .figure_style import (
    COLOUR,
    SERIES,
    Drawn,
    Floats,
    crossed,
    finished,
    legend,
    named,
    sheet,
    short,
    styled,
    thinned,
)
from .figure_units import norms, scores_and_kept, stability
from .page_runs import Run, curve_points, layer_of
from .report import percent, plain, ranged, signed, size, thousands, times
from .rows import Estimate, Row, Spread

STAGE_NAMES = {"lasso": "group lasso", "train": "training", "recover": "recovery"}


def draw(run: Run) -> tuple[list[Drawn], list[str]]:
    """Every figure that the run has data for, and what could not be drawn and why."""
    drawn, warnings = [], []
    with styled():
        for name, figure in FIGURES.items():
            try:
                found = figure(run)
            except BadInput as error:
                warnings.append(f"Figure {name} is left out: {error}")
                continue
            if found is not None:
                drawn.append(found)
    return drawn, warnings


def loss_by_part(run: Run) -> Drawn | None:
    """The loss on each part of each domain, before and after, with its intervals."""
    parts: dict[tuple[str, str], list[Row]] = {}
    for row in run.rows:
        parts.setdefault((row.domain, row.part), []).append(row)
    if not parts:
        return None
    labels = list(dict.fromkeys(row.label for row in run.rows))[:8]
    colours = dict(zip(labels, [COLOUR["muted"], *SERIES], strict=False))
    figure, axes = sheet(0.95 + 0.55 * len(parts))
    handles: dict[str, Any] = {}
    for place, rows in enumerate(parts.values()):
        shown = [row for row in rows if row.label in colours]
        ends = [row.loss.value for row in shown]
        axes.plot([min(ends), max(ends)], [place, place], color=COLOUR["rule"], lw=3, zorder=1)
        for row in shown:
            e = row.loss
            axes.plot([e.low, e.high], [place, place], color=colours[row.label], lw=1.2)
            handles[row.label] = axes.plot(
                e.value, place, "o", color=colours[row.label], ms=7, zorder=3
            )[0]
        if len(shown) > 1 and (change := shown[-1].loss_difference) is not None:
            axes.annotate(
                crossed(signed(change.value)), (max(e.loss.high for e in shown), place), (8, 0),
                textcoords="offset points", va="center", fontsize=9,
            )  # fmt: skip
    names = [named(f"{_short_name(d)}, {p.replace('_', '-')}") for d, p in parts]
    axes.set_yticks(range(len(parts)), names)
    axes.set_ylim(len(parts) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.16)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("loss, nats per token")
    legend(figure, list(handles.values()), [named(label) for label in handles])
    told = [
        f"{name}: {', '.join(f'{row.label} {ranged(row.loss)}' for row in rows)}"
        for name, rows in zip(names, parts.values(), strict=True)
    ]
    return finished(
        figure,
        "loss-by-domain",
        title="Loss on each domain",
        caption="Points are means over tokens, lines 95 % intervals by bootstrap over documents. "
        "The difference is paired, document by document, so it is surer than the intervals look.",
        alt=f"Loss in nats per token. {'; '.join(told)}.",
    )


def speed_and_size(run: Run) -> Drawn | None:
    """What is left of the size, and how many times as fast the smaller model is."""
    if len(run.rows) < 2:
        return None
    before, after = pair(run.rows)
    left = [
        (name, b, a, text)
        for name, b, a, text in (
            ("parameters", before.parameters, after.parameters, short),
            ("  without embeddings", before.parameters_without_embeddings,
             after.parameters_without_embeddings, short),
            ("bytes of weights", before.bytes, after.bytes, size),
            ("FLOP per token", before.flops, after.flops, short),
        )
        if b and a is not None
    ]  # fmt: skip
    speeds = [
        (name, ratio)
        for name, ratio in (("prefill", after.prefill_ratio), ("decode", after.decode_ratio))
        if ratio is not None
    ]
    panels = 2 if speeds else 1
    heights = [len(left), len(speeds)][:panels]
    figure, found = sheet(
        0.65 * panels + 0.27 * sum(heights), nrows=panels, height_ratios=heights, squeeze=False
    )
    axes = found[0, 0]
    for place, (_, b, a, text) in enumerate(left):
        axes.barh(place, 1, 0.62, color=COLOUR["rule"])
        axes.barh(place, a / b, 0.62, color=COLOUR["accent"])
        axes.text(1.03, place, f"{percent(a / b)}  of {text(b)}", va="center", fontsize=9)
    _bars(axes, [name for name, *_ in left], "left of the whole model")
    axes.set_xlim(0, 1.55)
    axes.set_xticks([0, 0.5, 1], ["0", "50 %", "100 %"])
    if speeds:
        _speeds(found[1, 0], speeds)
    facts = [f"{name.strip()} {percent(a / b)}" for name, b, a, _ in left]
    facts += [f"{name} {times(ratio.value)}" for name, ratio in speeds]
    return finished(
        figure,
        "speed-and-size",
        title="Size and speed",
        caption="Grey is the whole model."
        + (
            " Speeds were timed side by side in turns; bars are medians, lines reach from the "
            "least to the greatest ratio."
            if speeds
            else " Speeds were not measured."
        ),
        alt=f"After against before: {'; '.join(facts)}.",
    )


def loss_curves(run: Run) -> Drawn | None:
    """Loss against tokens over all stages; below it the share of units that are exactly zero."""
    if not run.curves:
        return None
    zero = any(np.isfinite(c["zero"]).any() for c in run.curves.values())
    figure, found = sheet(
        3.9 if zero else 3.1,
        nrows=2 if zero else 1, sharex=True, squeeze=False,
        height_ratios=[3, 1.1][: 2 if zero else 1],
    )  # fmt: skip
    axes, begun, told, low, high = found[0, 0], 0.0, [], [], []
    handles: dict[str, Any] = {}
    for number, (stage, curve) in enumerate(run.curves.items()):
        colour = SERIES[number]
        tokens, losses = curve_points(curve, "loss")
        at = thinned(tokens)
        if len(tokens):
            axes.plot(tokens[at] + begun, losses[at], color=colour, lw=0.7, alpha=0.28)
            handles["training loss, smoothed"] = axes.plot(
                tokens[at] + begun, _smooth(losses)[at], color=colour, lw=1.2, alpha=0.75
            )[0]
            low.append(np.quantile(losses, 0.005))
            high.append(np.quantile(losses, 0.995))
        tokens, losses = curve_points(curve, "validation")
        if len(tokens):
            handles["validation loss"] = axes.plot(
                tokens + begun, losses, color=colour, marker="o", lw=1.8
            )[0]
            low.append(losses.min())
            high.append(losses.max())
            told.append(f"{STAGE_NAMES[stage]}: validation {_first_last(losses)}")
        if zero:
            tokens, share = curve_points(curve, "zero")
            found[1, 0].plot(tokens + begun, 100 * share, color=colour)
        if begun:
            for panel in found[:, 0]:
                panel.axvline(begun, color=COLOUR["muted"], lw=0.8, ls=(0, (3, 3)))
        axes.annotate(
            STAGE_NAMES[stage], (begun, 1), (4, 2), xycoords=("data", "axes fraction"),
            textcoords="offset points", fontsize=9, color=colour,
        )  # fmt: skip
        begun += float(curve["tokens"].max())
    if not low:
        return None
    margin = 0.06 * (max(high) - min(low)) or 0.1
    axes.set_ylim(min(low) - margin, max(high) + margin)
    axes.set_ylabel("loss, nats per token")
    last = found[-1, 0]
    if zero:
        last.set_ylabel("units at zero, %")
        last.set_ylim(bottom=0)
    last.set_xlabel("tokens trained on")
    last.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    last.xaxis.set_major_formatter(FuncFormatter(short))
    legend(figure, list(handles.values()), list(handles))
    return finished(
        figure,
        "loss-curves",
        title="Loss while it trained",
        caption="Training loss is of the batch of each step. Validation loss is measured on "
        "calibration text, never on held-out text.",
        alt=f"Loss against {thousands(begun)} tokens. {'; '.join(told) or 'No validation'}.",
    )


def widths(run: Run) -> Drawn | None:
    """The number of units of each layer before and after, a panel per kind."""
    kinds = list(dict.fromkeys(str(row["kind"]) for row in run.plan))
    if not kinds:
        return None
    figure, found = sheet(0.4 + 1.45 * len(kinds), nrows=len(kinds), squeeze=False)
    told = []
    for axes, kind in zip(found[:, 0], kinds, strict=True):
        rows = [row for row in run.plan if row["kind"] == kind]
        layers = [layer_of(str(row["group"]), number) for number, row in enumerate(rows)]
        before, after = [row["before"] for row in rows], [row["after"] for row in rows]
        axes.bar(layers, before, 0.78, color=COLOUR["rule"])
        axes.bar(layers, after, 0.78, color=COLOUR["accent"])
        axes.set_title(
            f"{kind}: {thousands(sum(after))} of {thousands(sum(before))} kept "
            f"({percent(sum(after) / sum(before)) if sum(before) else '-'})"
        )
        axes.grid(axis="x", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        most, usual = max(before), int(np.median(after))
        marks = [0, usual, most] if 0.2 * most < usual < 0.8 * most else [0, most]
        axes.set_yticks(marks, [thousands(v) for v in marks])
        axes.margins(x=0.02)
        told.append(
            f"{kind}: {min(after)} to {max(after)} of {max(before)} in each of {len(rows)} layers"
        )
    found[-1, 0].set_xlabel("layer")
    return finished(
        figure,
        "widths",
        title="Widths of the layers",
        caption="Units in each layer: grey before, blue after.",
        alt=f"Units kept. {'; '.join(told)}.",
    )


def pair(rows: Sequence[Row]) -> tuple[Row, Row]:
    """The first row and the last one of the same part of the same domain.

    Of the part whose speeds were measured, if there is one.
    """
    first = next((row for row in rows if row.prefill is not None), rows[0])
    return first, [r for r in rows if (r.domain, r.part) == (first.domain, first.part)][-1]


def _bars(axes: Axes, names: list[str], title: str) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_title(title)


def _speeds(axes: Axes, speeds: Sequence[tuple[str, Spread | Estimate]]) -> None:
    most = max(max(ratio.high, 1.0) for _, ratio in speeds)
    for place, (_, ratio) in enumerate(speeds):
        axes.barh(place, ratio.value, 0.62, color=COLOUR["accent"])
        axes.plot([ratio.low, ratio.high], [place, place], color=COLOUR["ink"], lw=1)
        axes.text(most * 1.03, place, crossed(times(ratio.value)), va="center", fontsize=9)
    axes.axvline(1, color=COLOUR["muted"], lw=0.8, ls=(0, (3, 3)))
    _bars(axes, [name for name, _ in speeds], "times as fast as the whole model")
    axes.set_xlim(0, most * 1.55)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))


def _smooth(values: Floats) -> Floats:
    """A running mean over a thirtieth of the values, shorter at both ends, (n,)."""
    half = max(1, len(values) // 60)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    first, last = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    means: Floats = (sums[last] - sums[first]) / (last - first)
    return means


def _first_last(values: Floats) -> str:
    return f"{plain(values[0])} to {plain(values[-1])}"


def _short_name(domain: str) -> str:
    return domain.rstrip("/").rpartition("/")[2] or domain


FIGURES: dict[str, Callable[[Run], Drawn | None]] = {
    "loss-by-domain": loss_by_part,
    "speed-and-size": speed_and_size,
    "loss-curves": loss_curves,
    "scores-and-kept": scores_and_kept,
    "widths": widths,
    "norms": norms,
    "stability": stability,
}
