"""Figures of single units: their scores, which were kept, their norms, and how sure the choice is.

There may be a million units, so everything here is binned before it is drawn.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from .errors import BadInput
from .figure_style import COLOUR, HEAT, Drawn, Floats, finished, legend, sheet, short
from .page_runs import Run, layer_of
from .report import at, percent, plain, thousands

COLUMNS = 128  # of a heat map
KEEP_FILES = ("model/keep.safetensors", "keep.safetensors")
HALVES = ("first half: ", "second half: ")
NORMS = ("before: ", "after: ")
KEPT = Normalize(0, 1.4)  # so that what was kept is not nearly black
FEW = 400  # up to so many points are drawn one by one


def scores_and_kept(run: Run) -> Drawn | None:
    """Heat maps, a line per layer, its units from the best-scored: their scores, and who stayed."""
    held = run.tensors("scores.safetensors")
    scores = {k: v.astype(float) for k, v in held.items() if not k.startswith(HALVES)}
    keep = run.tensors(*KEEP_FILES)
    for name in scores.keys() & keep.keys():
        if scores[name].shape != keep[name].shape:
            raise BadInput(
                f"{name} has {scores[name].size} scores and {keep[name].size} units that were "
                "kept or not. The files of the run are of different models."
            )
    shown = [name for name in (scores or keep) if (scores or keep)[name].ndim == 1]
    kinds = list(dict.fromkeys(run.kind(name) for name in shown))
    if not kinds:
        return None
    columns = bool(scores) + bool(keep)
    by_kind = {kind: _layers([n for n in shown if run.kind(n) == kind]) for kind in kinds}
    lines = [max(12, min(48, len(names))) for names in by_kind.values()]
    figure, found = sheet(
        0.6 * len(kinds) + 0.062 * sum(lines) + 0.25,
        nrows=len(kinds), ncols=columns, squeeze=False, height_ratios=lines,
    )  # fmt: skip
    told = []
    for panels, (kind, names) in zip(found, by_kind.items(), strict=True):
        order = {n: np.argsort(-scores[n], kind="stable") for n in names if n in scores}
        at_column = 0
        if scores:
            binned = _binned({n: scores[n][order[n]] for n in names if n in scores}, names)
            image = _map(panels[0], binned, _norm(binned), len(names))
            panels[0].set_title(f"score of {kind}")
            bar = figure.colorbar(image, ax=panels[0], pad=0.03, aspect=14, fraction=0.09)
            bar.outline.set_visible(False)
            bar.ax.tick_params(which="both", size=0, labelsize=8)
            bar.ax.yaxis.set_major_formatter(FuncFormatter(short))
            bar.ax.yaxis.set_minor_formatter(NullFormatter())
            at_column = 1
        if keep:
            stayed = {n: keep[n].astype(float) for n in names if n in keep}
            stayed = {n: v[order[n]] if n in order else v for n, v in stayed.items()}
            _map(panels[at_column], _binned(stayed, names), KEPT, len(names))
            panels[at_column].set_title(f"{kind} kept")
            if at_column:
                panels[1].set_yticklabels([])
            share = np.concatenate([*stayed.values(), np.empty(0)])
            told.append(f"{thousands(share.sum())} of {thousands(share.size)} {kind} were kept")
        panels[0].set_ylabel("layer")
    for axes in found[-1]:
        axes.set_xlabel("best-scored → worst" if scores else "units in their order")
    return finished(
        figure,
        "scores-and-kept",
        title="Scores, and what was kept",
        caption=f"Each line is a layer, its units sorted by score and binned to at most {COLUMNS} "
        "columns. Left, the mean score of a bin (logarithmic where all are above 0, the outermost "
        "hundredths cut); right, the share of it that stayed: strong colour was kept, faint "
        "was removed."
        if scores
        else "Each line is a layer; strong colour was kept, faint was removed. "
        "The run holds no scores.",
        alt=f"Heat maps of {' and '.join(kinds)} by layer. {'; '.join(told)}.",
    )


def norms(run: Run) -> Drawn | None:
    """Histograms of the norms of the units before and after the lasso, a panel per kind."""
    held = run.tensors("norms.safetensors")
    groups = [k.removeprefix(NORMS[0]) for k in held if k.startswith(NORMS[0])]
    groups = [name for name in groups if NORMS[1] + name in held]
    kinds = list(dict.fromkeys(run.kind(name) for name in groups))
    if not kinds:
        return None
    figure, found = sheet(0.75 + 1.75 * len(kinds), nrows=len(kinds), squeeze=False)
    told: list[str] = []
    handles: list[Any] = []
    for axes, kind in zip(found[:, 0], kinds, strict=True):
        before, after = (
            np.concatenate([held[way + n].astype(float).ravel() for n in groups
                            if run.kind(n) == kind])
            for way in NORMS
        )  # fmt: skip
        above = np.concatenate([before[before > 0], after[after > 0]])
        if not above.size:
            raise BadInput(f"all norms of {kind} are zero.")
        low, high = np.log10(above.min()), np.log10(above.max())
        logarithmic = high - low > 1.2
        edges = (
            np.logspace(low - 0.02, high + 0.02, 61)
            if logarithmic
            else np.linspace(above.min(), above.max() * 1.001 + 1e-12, 61)
        )
        zero = int((after == 0).sum())
        handles = [
            axes.hist(before[before > 0], edges, color=COLOUR["muted"], alpha=0.38)[2][0],
            axes.hist(
                after[after > 0], edges, histtype="step", color=COLOUR["accent"], linewidth=1.5
            )[2][0],
        ]
        if logarithmic:
            axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(short))
        axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(short))
        axes.set_title(
            f"{kind}: {thousands(zero)} of {thousands(after.size)} exactly zero after "
            f"({percent(zero / after.size)})"
        )
        axes.set_ylabel("units")
        told.append(
            f"{kind}: median {short(np.median(before))} before, {short(np.median(after))} after, "
            f"{thousands(zero)} of {thousands(after.size)} exactly zero"
        )
    found[-1, 0].set_xlabel("norm of everything that a unit owns")
    legend(figure, handles, ["before the lasso", "after it"])
    return finished(
        figure,
        "norms",
        title="Norms before and after the lasso",
        caption="Units whose norm is exactly zero after the lasso are counted in the titles and "
        "not drawn; removing them changes nothing.",
        alt=f"Histograms of unit norms. {'; '.join(told)}.",
    )


def stability(run: Run) -> Drawn | None:
    """The scores by one half of the calibration text against those by the other."""
    held = run.tensors("scores.safetensors")
    names = [k for k in held if not k.startswith(HALVES) and all(h + k in held for h in HALVES)]
    kinds = list(dict.fromkeys(run.kind(name) for name in names))[:3]
    if not kinds:
        return None
    figure, found = sheet(2.9 if len(kinds) > 1 else 3.6, ncols=len(kinds), squeeze=False)
    told = []
    for axes, kind in zip(found[0], kinds, strict=True):
        chosen = [n for n in names if run.kind(n) == kind]
        first, second = (
            np.concatenate([held[half + n].astype(float).ravel() for n in chosen])
            for half in HALVES
        )
        if first.shape != second.shape:
            raise BadInput(f"the halves have {first.size} and {second.size} scores of {kind}.")
        fits = np.isfinite(first) & np.isfinite(second)
        first, second = first[fits], second[fits]
        if len(first) < 2:
            raise BadInput(f"fewer than two finite scores of {kind}.")
        _against(axes, first, second)
        agreed = at(run.manifest, "stability", kind)
        rank = rank_correlation(first, second)
        lines = [f"rank correlation {plain(rank)}"]
        if isinstance(agreed, int | float) and not isinstance(agreed, bool):
            lines.insert(0, f"{percent(agreed)} kept by both")
        axes.set_title("\n".join([kind, *lines]), linespacing=1.35)
        axes.set_xlabel("by the first half")
        told.append(f"{kind}: {', '.join(lines)}")
    found[0][0].set_ylabel("by the second half")
    return finished(
        figure,
        "stability",
        title="Would other text have chosen the same?",
        caption="Each unit's score by one half of the calibration text against that by the other; "
        "the stronger the colour, the more units. On the line both agree.",
        alt=f"Scores by two halves of the text. {'; '.join(told)}.",
    )


def rank_correlation(first: Floats, second: Floats) -> float:
    """Spearman's: the correlation of the ranks, ties by their mean rank. NaN if all are equal."""
    a, b = _ranks(first), _ranks(second)
    spread = a.std() * b.std()
    return float(((a - a.mean()) * (b - b.mean())).mean() / spread) if spread else float("nan")


def _ranks(values: Floats) -> Floats:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    means: Floats = (ends - (counts - 1) / 2)[place.ravel()]
    return means


def _against(axes: Axes, first: Floats, second: Floats) -> None:
    low, high = float(min(first.min(), second.min())), float(max(first.max(), second.max()))
    logarithmic = low > 0 and high > 20 * low
    if logarithmic:
        low, high = float(np.log10(low)), float(np.log10(high))
        first, second = np.log10(first), np.log10(second)
    margin = 0.04 * (high - low) or 0.5
    ends = (low - margin, high + margin)
    if len(first) <= FEW:
        axes.plot(first, second, "o", color=COLOUR["accent"], ms=4, alpha=0.6, mew=0)
    else:
        counts, _, _ = np.histogram2d(first, second, bins=96, range=[ends, ends])
        image = np.ma.masked_equal(counts.T, 0)
        axes.imshow(
            image, origin="lower", extent=(*ends, *ends), aspect="auto", cmap=HEAT,
            norm=LogNorm(1, max(2, image.max())), interpolation="nearest", zorder=1,
        )  # fmt: skip
    axes.plot(ends, ends, color=COLOUR["muted"], lw=0.8, ls=(0, (3, 3)))
    axes.set_xlim(ends)
    axes.set_ylim(ends)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(3, integer=logarithmic and high - low > 1.5))
        axis.set_major_formatter(
            FuncFormatter(lambda v, _: short(10**v) if logarithmic else short(v))
        )


def _layers(names: list[str]) -> list[str]:
    """The groups in the order of their layers."""
    order = {name: layer_of(name, number) for number, name in enumerate(names)}
    return sorted(names, key=lambda name: order[name])


def _binned(values: Mapping[str, NDArray[Any]], names: list[str]) -> Floats:
    """(layers, columns): means of neighbouring units, NaN beyond the end of a layer."""
    widest = max((v.size for v in values.values()), default=1)
    columns = min(COLUMNS, widest)
    edges = np.linspace(0, widest, columns + 1).round().astype(int)
    picture = np.full((len(names), columns), np.nan)
    for line, name in enumerate(names):
        row = values.get(name, np.empty(0))
        for column in range(columns):
            part = row[edges[column] : edges[column + 1]]
            if part.size:
                picture[line, column] = part.mean()
    return picture


def _norm(picture: Floats) -> Normalize:
    """From the lowest to the highest hundredth, on a logarithmic scale where all are above 0."""
    finite = picture[np.isfinite(picture)]
    if not finite.size:
        raise BadInput("no score is a finite number.")
    low, high = np.quantile(finite, [0.01, 0.99])
    if low > 0 and high > low:
        return LogNorm(low, high, clip=True)
    return Normalize(low, high if high > low else low + 1, clip=True)


def _map(axes: Axes, picture: Floats, norm: Normalize, layers: int) -> Any:
    axes.grid(visible=False)
    axes.spines[["bottom"]].set_visible(False)
    axes.set_xticks([])
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    return axes.imshow(
        np.ma.masked_invalid(picture), cmap=HEAT, norm=norm, aspect="auto",
        interpolation="nearest", extent=(0, picture.shape[1], layers - 0.5, -0.5),
    )  # fmt: skip
