"""The words and tables of a comparison: compare.md, and what the command line prints."""

import math
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from .compare_answers import Advantage, Answers, Line, Tokens
from .compare_cost import Forecast
from .compare_shapes import Shape
from .report import duration, fenced, plain, ranged, size, table, thousands

Cells = list[list[str]]  # of a table, the header first


def markdown(a: Answers, command: str) -> str:
    """The text of compare.md."""
    parts = ["# Models of the same shape, trained alike", fenced(command, "sh")]
    parts += [f"> Warning: {warning}" for warning in a.warnings]
    parts += [_about(a)]
    for title, cells, note in _tables(a):
        parts += [f"## {title}", note, table(cells)]
    return "\n\n".join(part for part in parts if part) + "\n"


def compared(a: Answers, folder: Path | None) -> RenderableType:
    """The same on a terminal, and where it is."""
    drawn: list[RenderableType] = [Text(f"Warning: {w}", style="yellow") for w in a.warnings]
    for title, cells, _ in _tables(a):
        drawn.append(_drawn(title, cells))
    if folder is not None:
        drawn.append(f"Written to {folder}; see compare.md there.")
    return Group(*drawn)


def planned(shapes: Sequence[Shape], found: Forecast) -> RenderableType:
    """What a dry run tells: the shapes, and what all runs will take."""
    cells = [["size", "may go", "parameters", "without embeddings", "MFLOP/token"]]
    cells += [
        [s.size, ", ".join(s.kinds), thousands(s.parameters), thousands(s.without_embeddings),
         f"{s.flops / 1e6:,.1f}"]
        for s in shapes
    ]  # fmt: skip
    lines = [
        f"runs: {found.runs} in full, {found.sweeps} to choose learning rates; done are "
        f"{found.runs_done} and {found.sweeps_done}",
        f"tokens of training: {thousands(found.tokens)}",
        f"operations: {short(found.flops, 'FLOP')}, teachers, scores and validations included",
        f"weights kept on the disk: {size(found.bytes)}",
        left_text(found),
    ]
    return Group(_drawn("Sizes", cells), *(Text(line) for line in lines))


def left_text(found: Forecast) -> str:
    """`12 of 30 runs are done; about 3 h 20 min left, by finished runs.`"""
    done = f"{found.runs_done} of {found.runs} runs are done"
    if found.seconds is None:
        return f"{done}."
    return f"{done}; about {duration(found.seconds)} left, by {found.timed}."


def short(value: float, unit: str = "") -> str:
    """`655 k`, `1.3 PFLOP`: three digits, a letter, and the unit."""
    for limit, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"),
                          (1e3, "k")):  # fmt: skip
        if value >= 0.9995 * limit:
            scaled = value / limit
            digits = f"{scaled:.3g}" if scaled < 999.5 else f"{scaled:,.0f}"
            return f"{digits} {letter}{unit}"
    return f"{value:.3g} {unit}".strip()


def _about(a: Answers) -> str:
    budgets = sorted({line.tokens for line in a.lines})
    seeds = max((len(line.seeds) for line in a.lines), default=0)
    return (
        f"{len(a.lines)} combinations of method and size, up to {seeds} seeds each, trained on "
        f"{' or '.join(thousands(b) for b in budgets)} tokens. Brackets reach from the least to "
        "the greatest seed; with a single seed they are 95 % intervals over documents. Held-out "
        "text was measured once per run, at its end; learning rates and weights were chosen by "
        "the validation loss, on blocks of the calibration part that nothing was scored on."
    )


def _tables(a: Answers) -> list[tuple[str, Cells, str]]:
    """Title, cells and a note of each table that has a line."""
    found = [
        ("Loss by size and method", _lines(a.lines), ""),
        (
            "Tokens to a validation loss", _by_target(a.tokens, a.lines),
            "Tokens trained on until the mean over seeds is at the loss, between validations "
            "straight in their logarithm; FLOP of all that was done until then. “Never” is: not "
            "within the tokens of the run. Tokens that were scored and refitted on are not in it.",
        ),
        (
            "Parameters needed for a held-out loss", _needed(a),
            "After all tokens, between sizes straight in the logarithm of the parameters.",
        ),
        (
            "Tokens needed for the best loss of another", _gains(a.advantages),
            "How many times fewer tokens than the other needed for its own best validation loss. "
            "“Untrained” is: at that loss before any training.",
        ),
    ]  # fmt: skip
    return [(title, cells, note) for title, cells, note in found if len(cells) > 1]


def _lines(lines: Sequence[Line]) -> Cells:
    cells = [
        ["size", "method", "parameters", "without embeddings", "learning rate", "tokens", "FLOP",
         "held-out loss, nats/token", "bits per byte", "validation loss"]
    ]  # fmt: skip
    for x in lines:
        cells.append([
            x.size, x.method, thousands(x.parameters), thousands(x.without_embeddings),
            "-" if x.lr is None else f"{x.lr:g}", thousands(x.tokens),
            "-" if x.flops is None else short(x.flops), ranged(x.loss),
            ranged(x.bits_per_byte) if x.bits_per_byte else "-",
            ranged(x.validation) if x.validation else "-",
        ])  # fmt: skip
    return cells


def _by_target(found: Sequence[Tokens], lines: Sequence[Line]) -> Cells:
    targets = list(dict.fromkeys(t.target for t in found))
    cells = [["size", "method", *(f"to {t:g}" for t in targets)]]
    for line in lines:
        own = [t for t in found if (t.method, t.size) == (line.method, line.size)]
        if own:
            cells.append([line.size, line.method, *(_reached(t, line) for t in own)])
    return cells


def _reached(t: Tokens, line: Line) -> str:
    if t.tokens is None:
        return f"never within {short(line.tokens)}"
    text = short(t.tokens)
    if t.low is not None and (t.high is None or t.high > t.low):
        high = "never" if t.high is None else short(t.high)
        text += f" [{short(t.low)}, {high}]"
    return text if t.flops is None else f"{text} ({short(t.flops, 'FLOP')})"


def _needed(a: Answers) -> Cells:
    targets = list(dict.fromkeys(s.target for s in a.sizes))
    cells = [["method", *(f"for {t:g}" for t in targets)]]
    for method in dict.fromkeys(s.method for s in a.sizes):
        texts = []
        for s in (s for s in a.sizes if s.method == method):
            shown = "never" if s.parameters is None else short(s.parameters)
            texts.append(f"at most {shown}" if s.at_most else shown)
        cells.append([method, *texts])
    return cells


def _gains(found: Sequence[Advantage]) -> Cells:
    cells = [
        ["size", "method", "than", "loss", "tokens", "of the other", "fewer tokens",
         "with those of the calibration", "fewer FLOP"]
    ]  # fmt: skip
    for x in found:
        cells.append([
            x.size, x.method, x.other, plain(x.loss),
            "never" if x.tokens is None else short(x.tokens),
            short(x.other_tokens), _times(x.how, x.ratio, x.low, x.high),
            _times(x.how, x.ratio_with_calibration), _times(x.how, x.flops_ratio),
        ])  # fmt: skip
    return cells


def _times(
    how: str, ratio: float | None, low: float | None = math.nan, high: float | None = math.nan
) -> str:
    """`21 x [18 x, 25 x]`; of single seeds 0 is never, and None untrained."""
    if how == "never":
        return "never"
    if ratio is None:
        return "untrained"
    text = f"{ratio:.3g} x"
    if low != high:
        ends = [
            "untrained" if end is None else f"{end:.3g} x" if end else "never"
            for end in (low, high)
            if end is None or not math.isnan(end)
        ]
        text += f" [{', '.join(ends)}]" if ends else ""
    return text


def _drawn(title: str, cells: Cells) -> Table:
    drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in cells[0]:
        word = name in ("size", "method", "than", "may go")
        justify: JustifyMethod = "left" if word else "right"
        drawn.add_column(name, justify=justify, overflow="fold", no_wrap=word)
    for line in cells[1:]:
        drawn.add_row(*line)
    return drawn
