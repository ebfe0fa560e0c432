"""The figure of a relearning audit: loss and accuracy on held-out text against tokens."""

from typing import Any

from matplotlib.ticker import FuncFormatter, MaxNLocator

from .figure_style import (
    COLOUR,
    MARKERS,
    SERIES,
    Drawn,
    finished,
    legend,
    named,
    sheet,
    styled,
    tokens_axis,
)
from .relearn_answers import Answers
from .relearn_text import answer_text
from .report import plain

NAMES = {"loss": "loss, nats per token", "accuracy": "top-1 accuracy"}


def draw(a: Answers, domain: str) -> Drawn:
    """Loss above, accuracy below; the loss asked for is dashed."""
    with styled():
        return _drawn(a, domain)


def _drawn(a: Answers, domain: str) -> Drawn:
    figure, axes = sheet(5.2, nrows=2, sharex=True)
    handles: dict[str, Any] = {}
    for number, line in enumerate(a.lines):
        fresh = line.subject.kind == "scratch"
        colour = COLOUR["muted"] if fresh else SERIES[number % len(SERIES)]
        for one, name in zip(axes, NAMES, strict=True):
            mean, low, high = (
                [getattr(getattr(p, name), end) for p in line.curve]
                for end in ("value", "low", "high")
            )
            tokens = [p.tokens for p in line.curve]
            if len(line.seeds) > 1:
                one.fill_between(tokens, low, high, color=colour, alpha=0.18, lw=0)
            handles[line.subject.name] = one.plot(
                tokens, mean, color=colour, marker=MARKERS[number % len(MARKERS)],
                ls="--" if fresh else "-",
            )[0]  # fmt: skip
    asked = sorted({x.target for x in a.answers if x.asked})
    for target in asked:
        axes[0].axhline(target, color=COLOUR["ink"], lw=0.8, ls=(0, (3, 3)))
    for one, label in zip(axes, NAMES.values(), strict=True):
        one.set_ylabel(label)
        one.yaxis.set_major_locator(MaxNLocator(5))
    axes[1].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    steps = [p.tokens for line in a.lines for p in line.curve if p.tokens]
    tokens_axis(axes[1], float(min(steps)), float(max(steps)))
    axes[1].set_xlim(left=-0.25 * min(steps))
    axes[1].set_xlabel("tokens trained on")
    legend(figure, list(handles.values()), [named(name) for name in handles])
    seeds = max(len(line.seeds) for line in a.lines)
    told = [f"{x.subject} {answer_text(x)}" for x in a.answers if x.asked]
    return finished(
        figure,
        "relearn",
        title=f"Relearning {domain}",
        caption="Held-out text of the lost domain, measured on the way; it chooses nothing. "
        "The dashed line is the loss asked for. "
        + ("Bands reach from the least to the greatest seed." if seeds > 1 else ""),
        alt=f"Loss and accuracy on {domain} against tokens. Losses asked for: "
        f"{', '.join(map(plain, asked))}. Tokens to it ÷ those of fresh weights: "
        f"{'; '.join(told)}.",
    )

