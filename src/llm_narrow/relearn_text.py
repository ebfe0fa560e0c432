"""The words and tables of a relearning audit: relearn.md, and what the command line prints."""

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .compare_cost import Forecast
from .compare_text import left_text, short
from .relearn_answers import Answer, Answers, Line, Subject
from .report import fenced, percent, plain, ranged, table, thousands

Cells = list[list[str]]  # of a table, the header first
RATIO = "tokens ÷ fresh"
GOALS = {"whole": "whole + margin", "scratch": "best of fresh", "given": "given"}


def markdown(
    a: Answers, domain: str, notes: Sequence[str], command: str, *, drawn: bool
) -> str:
    """The text of relearn.md."""
    parts = [f"# How fast `{domain}` comes back", fenced(command, "sh")]
    parts += [f"> {note}" for note in notes]
    parts += [
        "Tokens of training until the loss on held-out text is at the target, divided by those "
        "that a model of the same shape with fresh weights needs: 1 is really gone, 0 was never "
        "lost. Every model learns the same text in the same order; its learning rate is chosen on "
        "the calibration part, and held-out text chooses nothing. Losses to come to: *whole + "
        f"margin*, the whole model's before any training and {a.margin:g} nats per token; *best "
        "of fresh*, the lowest that fresh weights come to.",
        "## Tokens to relearn", table(_ratios(a)), _why(a),
        "![Loss and accuracy against tokens](relearn.svg)" if drawn else "",
        "## Before and after all tokens", table(_ends(a)),
        "## On the way", *(_curve(line) for line in a.lines),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def relearned(a: Answers, notes: Sequence[str], folder: Path | None) -> RenderableType:
    """The same on a terminal, and where it is."""
    found: list[RenderableType] = [Text(note, style="yellow") for note in notes]
    found += [_drawn("Tokens to relearn", _ratios(a)), _drawn("Before and after", _ends(a))]
    if folder is not None:
        found.append(Text(f"Written to {folder}; see relearn.md there."))
    return Group(*found)


def planned(
    subjects: Sequence[Subject], found: Forecast, notes: Sequence[str]
) -> RenderableType:
    """What a dry run tells."""
    cells = [["what", "made by", "parameters", "MFLOP/token"]]
    cells += [
        [s.name, s.method, thousands(s.parameters), f"{s.flops / 1e6:,.1f}"] for s in subjects
    ]
    lines = [
        f"runs: {found.runs} in full, {found.sweeps} to choose learning rates; done are "
        f"{found.runs_done} and {found.sweeps_done}",
        f"tokens of training: {thousands(found.tokens)}",
        f"operations: {short(found.flops, 'FLOP')}, validations and looks included",
        left_text(found),
        *notes,
    ]
    return Group(_drawn("What learns", cells), *(Text(line) for line in lines))


def ratio_text(
    ratio: float | None, bounds: tuple[float | None, float | None],
    over_seeds: tuple[float | None, float | None],
) -> str:  # fmt: skip
    """`0.31 [0.28, 0.35]`, `below 0.02`, `above 4`; `unknown` where neither gets there."""
    if ratio is not None:
        if over_seeds == (ratio, ratio):
            return f"{ratio:.3g}"
        ends = ["open" if end is None else f"{end:.3g}" for end in over_seeds]
        return f"{ratio:.3g} [{', '.join(ends)}]"
    at_least, at_most = bounds
    if at_most is not None:
        return f"below {at_most:.3g}"
    return "unknown" if at_least is None else f"above {at_least:.3g}"


def answer_text(a: Answer) -> str:
    """The same of an answer."""
    return ratio_text(a.ratio, (a.at_least, a.at_most), (a.low, a.high))


def tokens_text(tokens: float | None, budget: int) -> str:
    """`0`, `65.5 k` or `never within 200 k`."""
    return f"never within {short(budget)}" if tokens is None else short(tokens)


def _ratios(a: Answers) -> Cells:
    cells = [["model", "to a loss of", "which is", "tokens", "of fresh weights", RATIO]]
    for x in sorted(a.answers, key=lambda x: not x.asked):
        cells.append([
            x.subject, plain(x.target), GOALS[x.goal], tokens_text(x.tokens, x.budget),
            tokens_text(x.scratch_tokens, x.budget), answer_text(x),
        ])  # fmt: skip
    return cells


def _why(a: Answers) -> str:
    if all(x.ratio is not None for x in a.answers):
        return ""
    return (
        "Where one of the two is never at the loss the budget bounds the ratio; where neither is, "
        "it is unknown: give more --tokens, or ask for --target scratch."
    )


def _ends(a: Answers) -> Cells:
    cells = [
        ["model", "made by", "parameters", "learning rate", "loss before", "loss after",
         "bits per byte before", "after", "accuracy before", "after"]
    ]  # fmt: skip
    for line in a.lines:
        first, last = line.curve[0], line.curve[-1]
        cells.append([
            line.subject.name, line.subject.method, thousands(line.subject.parameters),
            f"{line.lr:g}", ranged(first.loss), ranged(last.loss),
            ranged(first.bits_per_byte), ranged(last.bits_per_byte),
            ranged(first.accuracy, percent), ranged(last.accuracy, percent),
        ])  # fmt: skip
    return cells


def _curve(line: Line) -> str:
    cells = [["tokens", "loss, nats/token", "bits per byte", "top-1 accuracy"]]
    cells += [
        [thousands(p.tokens), ranged(p.loss), ranged(p.bits_per_byte), ranged(p.accuracy, percent)]
        for p in line.curve
    ]
    tried = ", ".join(
        f"{t['lr']:g}: {plain(t['validation']) if t['validation'] is not None else t['error']}"
        for t in line.tried
    )
    told = f"Learning rate {line.lr:g}" + (f", of {tried} on the calibration part." * bool(tried))
    return f"### {line.subject.name}\n\n{told}\n\n{table(cells)}"


def _drawn(title: str, cells: Cells) -> Table:
    drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(cells[0]):
        left = number == 0 or name in ("made by", "which is")
        drawn.add_column(name, justify="left" if left else "right", overflow="fold")
    for line in cells[1:]:
        drawn.add_row(*map(Text, line))
    return drawn
