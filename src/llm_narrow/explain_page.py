"""The explanation of a run as a part of its report, where its folder has one."""

from pathlib import Path
from typing import Any

from .errors import BadInput
from .explain_form import Explained, Explanation, Snippet, read
from .explain_text import about, attended, ends, lot_line
from .report import fenced, percent, thousands


def found(folder: Path) -> tuple[Explanation | None, list[str]]:
    """The explanation of a run folder, if it has one, and why it is left out if it has another."""
    try:
        return read(folder), []
    except BadInput as error:
        return None, [f"Units are not explained: {error}"]


def section(explanation: Explanation | None) -> dict[str, Any] | None:
    """What the template needs. All text is as it was; the template escapes it."""
    if explanation is None:
        return None
    lots = {lot.kind: lot for lot in explanation.kinds}
    kinds = []
    for kind in dict.fromkeys(unit.kind for unit in explanation.units):
        lot = lots.get(kind)
        kinds.append(
            {
                "name": kind.capitalize(),
                "line": "" if lot is None else lot_line(lot),
                "layers": [] if lot is None else [
                    (str(x.layer), thousands(x.units), thousands(x.removed), percent(x.share))
                    for x in lot.layers
                ],
                "units": [_unit(unit) for unit in explanation.units if unit.kind == kind],
            }
        )  # fmt: skip
    return {
        "read": f"{thousands(explanation.tokens)} tokens of {thousands(explanation.documents)} "
        f"documents of {explanation.domain}, {explanation.part} part.",
        "chosen": explanation.chosen, "notes": explanation.notes, "kinds": kinds,
    }  # fmt: skip


def markdown(explanation: Explanation | None) -> str:
    """The section of report.md; empty without an explanation. Text stands in code blocks."""
    if explanation is None:
        return ""
    parts = ["## What units are used for", explanation.chosen, *explanation.notes]
    parts += [lot_line(lot) for lot in explanation.kinds]
    for unit in explanation.units:
        lines = [f"{o.count} x {o.token!r}" for o in unit.often]
        often = [f"most often at {', '.join(lines)}"] if lines else []
        shown = [f"{s.use:.3g}  {left}»{token}«{right}" for s in unit.snippets
                 for left, token, right in [ends(s)]]  # fmt: skip
        text = "\n".join([*often, *shown]) or "never used"
        parts += [f"### {unit.name}", f"{about(unit)}.", fenced(text)]
    return "\n" + "\n\n".join(parts) + "\n"


def _unit(unit: Explained) -> dict[str, Any]:
    return {
        "name": unit.name,
        "kept": unit.kept,
        "about": about(unit),
        "often": [(o.count, repr(o.token)) for o in unit.often],
        "snippets": [_snippet(snippet) for snippet in unit.snippets],
    }


def _snippet(snippet: Snippet) -> dict[str, str]:
    at = f"{snippet.project}/{snippet.path}" if snippet.project != snippet.path else snippet.path
    looked = f"; {attended(snippet.attended)}" if snippet.attended else ""
    token = snippet.token.replace("\n", "↵\n").replace("\t", "→\t")  # which would not be seen
    return {
        "before": snippet.before, "token": token, "after": snippet.after,
        "told": f"use {snippet.use:.3g}; {at}{looked}",
    }  # fmt: skip
