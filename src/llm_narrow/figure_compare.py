"""The figures of a comparison. Each takes the comparison; None where it has no data for it."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from .figure_style import (
    COLOUR,
    MARKERS,
    SERIES,
    Drawn,
    finished,
    legend,
    named,
    sheet,
    short,
    size_axis,
    styled,
    thinned,
    tokens_axis,
)
from .page_compare import WORDS, Comparison, Group, targets
from .report import plain, ranged

PANELS = 5  # sizes drawn one above the other; more are told to be left out
VALIDATION = "Validation loss on calibration text."
OVER_SEEDS = "Lines are means over seeds, bands reach from the least to the greatest."


def draw(comparison: Comparison) -> list[Drawn]:
    """Every figure that the comparison has data for."""
    with styled():
        drawn = [figure(comparison) for figure in COMPARED.values()]
    return [d for d in drawn if d is not None]


def frontier(c: Comparison) -> Drawn | None:
    """Parameters against the loss on held-out text, a line per method."""
    figure, axes = sheet(3.6)
    handles: dict[str, Any] = {}
    looks = _looks(c)
    for method in c.methods:
        groups = sorted((g for g in c.groups if g.method == method), key=lambda g: g.parameters)
        colour, marker = looks[method]
        sizes = [g.parameters for g in groups]
        for g in groups:
            ends = [g.estimate.low, g.estimate.high]
            axes.plot([g.parameters] * 2, ends, color=colour, lw=1, alpha=0.7)
        handles[method] = axes.plot(
            sizes, [g.estimate.value for g in groups], marker=marker, color=colour, ms=6, lw=1.4
        )[0]
    sizes = [g.parameters for g in c.groups]
    if (whole := c.whole) is not None:
        level = c.estimate(whole).value
        sizes.append(whole.parameters)
        axes.axhline(level, color=COLOUR["muted"], lw=0.8, ls=(0, (3, 3)))
        handles["whole model"] = axes.plot(
            whole.parameters, level, "*", color=COLOUR["ink"], ms=10, ls="", clip_on=False
        )[0]
    size_axis(axes, np.array(sizes))
    axes.set_xlabel("parameters")
    axes.set_ylabel(WORDS[c.metric])
    _keyed(figure, c, handles)
    seeds = max(len(g.entries) for g in c.groups)
    told = [f"{_name(g)} {ranged(g.estimate)} at {short(g.parameters)}" for g in c.groups[:24]]
    return finished(
        figure,
        "frontier",
        title="Loss against size",
        caption=f"{WORDS[c.metric].capitalize()} on held-out text; lower is better. "
        + (
            "Points are means over seeds, lines through them reach from the least to the greatest."
            if seeds > 1
            else "Upright lines are 95 % intervals by bootstrap over documents."
        ),
        alt=f"{WORDS[c.metric]} against parameters: {'; '.join(told)}.",
    )


def loss_by_tokens(c: Comparison) -> Drawn | None:
    """Loss against tokens, a panel per size."""
    return _curves(
        c, "loss-by-tokens", lambda g: 1.0, "tokens trained on", "Loss against tokens",
        OVER_SEEDS,
    )  # fmt: skip


def loss_by_flops(c: Comparison) -> Drawn | None:
    """The same against the operations that training took."""
    return _curves(
        c, "loss-by-flops", lambda g: g.flops, "FLOP of training", "Loss against computation",
        "Per token as the run records it, else three times a forward pass, in which a teacher's "
        f"is not counted. {OVER_SEEDS}",
    )  # fmt: skip


def tokens_to_target(c: Comparison) -> Drawn | None:
    """The tokens that each method needs to a loss, by size; "never" where it does not get there."""
    wanted = targets(c) if c.curves else []
    groups = [g for g in c.groups if g.band.shape[1]]
    if not wanted or len({g.method for g in groups}) < 2:
        return None
    figure, found = sheet(0.8 + 1.75 * len(wanted), nrows=len(wanted), sharex=True, squeeze=False)
    looks, handles, told = _looks(c), {}, []
    finite = [g.tokens_to(t) for g in groups for t in wanted]
    above = [v for v in finite if 0 < v < math.inf] or [1.0]
    every = np.array([g.parameters for g in groups])
    beside = 0.024 * ((every.max() - every.min()) or every.max())  # what would cover each other
    least, most = min(above), max(float(g.band[0, -1]) for g in groups)
    never = most * (most / least) ** 0.22 * 1.6
    for axes, target in zip(found[:, 0], wanted, strict=True):
        axes.axhspan(never / 1.35, never * 1.35, color=COLOUR["wash"], lw=0)
        for place, method in enumerate(c.methods):
            own = sorted((g for g in groups if g.method == method), key=lambda g: g.parameters)
            if not own:
                continue
            colour, marker = looks[method]
            needs = [g.tokens_to(target) for g in own]
            told += [
                f"{_name(g)} to {target:g}: {tokens_text(n)}"
                for g, n in zip(own, needs, strict=True)
            ]
            at = [never if math.isinf(n) else n for n in needs]
            aside = (place - (min(len(c.methods), len(SERIES)) - 1) / 2) * beside
            sizes = [g.parameters + aside for g in own]
            reached = [(s, n) for s, n in zip(sizes, needs, strict=True) if not math.isinf(n)]
            axes.plot([s for s, _ in reached], [n for _, n in reached], color=colour, lw=1.2)
            handles[method] = axes.plot(
                sizes, at, marker=marker, color=colour, ms=6, ls="", clip_on=False
            )[0]
        _tokens_upwards(axes, least, most, never)
        axes.set_title(f"to a loss of {target:g}")
    size_axis(found[-1, 0], every)
    found[-1, 0].set_xlabel("parameters")
    _keyed(figure, c, handles)
    return finished(
        figure,
        "tokens-to-target",
        title="Tokens to a given loss",
        caption="The first evaluation at which the mean over seeds is at or below the loss. "
        "“0” needed no training; “never” was not reached within the tokens of the run.",
        alt=f"Tokens needed. {'; '.join(told[:30])}.",
    )


def tokens_text(tokens: float) -> str:
    """`never`, `0` or `65.5 k`."""
    return "never" if math.isinf(tokens) else short(tokens)


def _curves(
    c: Comparison, name: str, scale: Callable[[Group], float | None], x: str, title: str,
    caption: str,
) -> Drawn | None:  # fmt: skip
    drawn = [
        (g, s) for g in c.groups
        if c.curves and (s := scale(g)) is not None and g.band.shape[1] > 1
    ]  # fmt: skip
    if not drawn:
        return None
    told = any(e.told for e in c.entries)
    validated = any(e.curve_of == "validation" for e in c.entries)
    caption = f"{VALIDATION if validated else 'Loss of the batches trained on.'} {caption}"
    sizes = [s for s in c.sizes if any(g.size == s for g, _ in drawn)] if told else [""]
    left_out = len(sizes) - PANELS
    sizes = sizes[:PANELS]
    height = 2.9 if len(sizes) == 1 else 0.7 + 1.8 * len(sizes)
    figure, found = sheet(height, nrows=len(sizes), sharex=True, squeeze=False)
    looks = _looks(c)
    handles: dict[str, Any] = {}
    cut = False
    shown = [(g, s) for g, s in drawn if not told or g.size in sizes]
    for axes, size in zip(found[:, 0], sizes, strict=True):
        for g, s in reversed(shown):  # the best last, so that it is on top
            if told and g.size != size:
                continue
            tokens, mean, low, high = g.band
            at = thinned(tokens, 100)
            colour, marker = looks[g.method]
            if len(g.curves) > 1:
                axes.fill_between(tokens[at] * s, low[at], high[at], color=colour, alpha=0.18, lw=0)
            every = max(1, len(at) // 6)
            line = axes.plot(tokens[at] * s, mean[at], color=colour, marker=marker, markevery=every)
            handles[g.method] = line[0]
        if size:
            axes.set_title(f"size {named(size)}")
        axes.yaxis.set_major_locator(MaxNLocator(4))
        cut |= _focus(axes, [g for g, _ in shown if not told or g.size == size])
    above = np.concatenate([g.band[0][g.band[0] > 0] * s for g, s in shown])
    if above.size:
        tokens_axis(found[-1, 0], float(above.min()), float(above.max()))
    found[-1, 0].set_xlabel(x)
    found[len(sizes) // 2, 0].set_ylabel("loss, nats per token")
    _keyed(figure, c, handles)
    ends = [f"{_name(g)} from {plain(g.band[1, 0])} to {plain(g.band[1, -1])}" for g, _ in shown]
    if cut:
        caption += " Curves that begin far above the others are cut at the top."
    if left_out > 0:
        caption += f" {left_out} more sizes are in the table only."
    return finished(
        figure, name, title=title, caption=caption, alt=f"{title}. {'; '.join(ends[:24])}."
    )


def _focus(axes: Axes, groups: list[Group]) -> bool:
    """End the axis a little above the worst final loss, if that cuts something. Says whether so.

    Fresh weights begin so high that all else would be one line at the bottom.
    """
    finals = [g.band[1, -1] for g in groups]
    least = min(float(g.band[2].min()) for g in groups)
    top = max(finals) + 0.6 * (max(finals) - least) + 0.02
    if max(float(g.band[3].max()) for g in groups) <= top + 0.5 * (top - least):
        return False
    axes.set_ylim(least - 0.06 * (top - least), top)
    return True


def _looks(c: Comparison) -> dict[str, tuple[str, str]]:
    """Colour and marker of each method; past the eighth all look alike."""
    looks = list(zip(SERIES, MARKERS, strict=True))
    looks += [(COLOUR["muted"], ".")] * max(0, len(c.methods) - len(looks))
    return dict(zip(c.methods, looks, strict=False))


def _keyed(figure: Any, c: Comparison, handles: dict[str, Any]) -> None:
    """A legend in the order of the methods, those that look alike under one name."""
    order = [m for m in [*c.methods, "whole model"] if m in handles]
    rest = [m for m in order if m in c.methods[len(SERIES) :]]
    first = [m for m in order if m not in rest]
    labels = [named(m) for m in first]
    if rest:
        first.append(rest[0])
        labels.append(f"{len(rest)} more")
    legend(figure, [handles[m] for m in first], labels)


def _tokens_upwards(axes: Axes, least: float, most: float, never: float) -> None:
    axes.set_yscale("symlog", linthresh=least, linscale=0.5)
    decades = 10.0 ** np.arange(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    steps = (1,) if most > 300 * least else (1, 3) if most > 12 * least else (1, 2, 5)
    marks = [d * s for d in decades for s in steps if least * 0.99 < d * s < most * 1.01]
    axes.set_yticks([0, *marks, never], ["0", *(short(m) for m in marks), "never"], minor=False)
    axes.set_yticks([], minor=True)
    axes.set_ylim(-least * 0.35, never * 1.35)
    axes.set_ylabel("tokens")


def _name(g: Group) -> str:
    return f"{g.method} {g.size}".strip()


COMPARED: dict[str, Callable[[Comparison], Drawn | None]] = {
    "frontier": frontier,
    "tokens-to-target": tokens_to_target,
    "loss-by-tokens": loss_by_tokens,
    "loss-by-flops": loss_by_flops,
}
