"""docs/paper.md: every claim with its verdict, what does not reproduce first. Made from results."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from .paper import Judged, Paper
from .paper_judge import RULE, Judgement, Way
from .report import fenced, table

ORDER = {
    "not reproduced": "What does not reproduce",
    "open at this budget": "What is open",
    "reproduced": "What is reproduced",
    "not run": "What was not run",
}
ABOUT = (
    "The claims of [On the creation of narrow AI](https://arxiv.org/abs/2505.15811), each run here "
    "and judged by a rule in the program, which is printed beside its verdict. This page is made "
    "by `llm-narrow paper page` from the results and from nothing else. Numbers marked ≈ are read "
    "off the paper's figures. `quick` is a setting for two cores, `paper` the paper's own; "
    "[how to run a row](how-to/reproduce-the-paper.md)."
)


def write(paper: Paper, out: Path) -> list[Path]:
    """Write the page, and the figures of its rows into a folder of its name beside it.

    Figures that this page had before and has no more are removed; nothing else is.
    """
    beside = out.with_suffix("")
    once: dict[Path, Path] = {}  # what rows share is copied for the first of them
    figures = {row.claim.number: copied(row, beside, once) for row in paper.rows}
    kept = {file.name for files in figures.values() for file in files}
    for old in beside.glob("row-*.*") if beside.is_dir() else ():
        if old.name not in kept and re.fullmatch(r"row-\d+-[\w-]+\.(svg|png)", old.name):
            old.unlink()
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = out.with_name(f".{out.name}.partial")
    fresh.write_text(text(paper, figures), encoding="utf-8")
    fresh.replace(out)
    return [out, *once.values()]


def copied(row: Judged, beside: Path, once: dict[Path, Path]) -> list[Path]:
    """The figures of a row that its results have, copied beside the page: drawings if there are.

    `once` has what was copied before, and where it lies.
    """
    found = []
    for name in row.claim.figures if row.judgement is not None else ():
        for ending in (".svg", ".png"):
            source = row.place / f"{name}{ending}"
            if source in once:
                found.append(once[source])
                break
            if source.is_file():
                to = beside / f"row-{row.claim.number}-{source.name}"
                if to in found:  # of another folder, which comes first
                    break
                beside.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, to)
                once[source] = to
                found.append(to)
                break
    return found


def text(paper: Paper, figures: dict[int, list[Path]]) -> str:
    """The page in Markdown."""
    count = {verdict: sum(row.verdict == verdict for row in paper.rows) for verdict in ORDER}
    told = ", ".join(f"{n} {verdict}" for verdict, n in count.items() if n)
    parts = ["# The paper, claim by claim", ABOUT, f"Of {len(paper.rows)} claims: {told}.",
             overview(paper), f"**The rule.** {RULE}"]  # fmt: skip
    for verdict, title in ORDER.items():
        rows = [row for row in paper.rows if row.verdict == verdict]
        if rows:
            parts.append(f"## {title}")
            parts += [section(row, figures.get(row.claim.number, [])) for row in rows]
    return "\n\n".join(parts) + "\n"


def overview(paper: Paper) -> str:
    """A line for each claim."""
    cells = [["claim", "verdict", "setting", "in the paper"]]
    cells += [
        [f"{row.claim.number}. {row.claim.says}", row.verdict,
         row.preset if row.judgement is not None else "", row.claim.paper]
        for row in paper.rows
    ]  # fmt: skip
    return table(cells)


def section(row: Judged, figures: Sequence[Path]) -> str:
    """All that is told of a claim."""
    c = row.claim
    parts = [f"### {c.number}. {c.says.rstrip('.')}",
             f"In the paper ({c.source}): {c.paper}.",
             fenced("\n".join(row.commands), "sh"),
             f"or `llm-narrow paper run {c.name}{preset_flag(row)}`."]  # fmt: skip
    if row.judgement is not None:
        parts += judgement(row.judgement)
        parts += [f"![{caption(row, file)}]({file.parent.name}/{file.name})" for file in figures]
    return "\n\n".join(parts)


def caption(row: Judged, figure: Path) -> str:
    """What a figure shows, in words."""
    name = figure.stem.partition("-")[2].partition("-")[2]
    return re.sub(r"[\[\]\s]+", " ", row.told.get(name, f"{row.claim.says} ({name})")).strip()


def preset_flag(row: Judged) -> str:
    """The preset as a flag, where it is not the usual one."""
    return "" if row.preset == "quick" else f" --preset {row.preset}"


def judgement(j: Judgement) -> list[str]:
    """The verdict, the questions it follows from, the numbers, and what is not the paper's."""
    parts = [f"**{j.verdict.capitalize()}.**"]
    if j.changes:
        parts.append(j.changes)
    for way in j.ways:
        parts += [answers(way)]
    parts.append(table([["", "paper", "here"], *([n.what, n.paper, n.ours] for n in j.numbers)]))
    parts.append(f"Rests on: {'; '.join(j.rests_on)}.")
    if j.differs:
        parts.append(f"Not as in the paper: {'; '.join(j.differs)}.")
    return parts


def answers(way: Way) -> str:
    """The questions of a way, the rule of each, and what was found."""
    lines = [f"*{way.name.capitalize()}*: {way.verdict}. {way.about}"]
    lines += [f"- {a.question.rule} **{a.says.capitalize()}**: {a.found}." for a in way.answers]
    return "\n".join([lines[0], "", *lines[1:]])
