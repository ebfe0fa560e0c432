"""What the command line prints: plans, rows and listings as tables."""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, JustifyMethod, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from . import report
from .report import duration, percent, size, thousands

if TYPE_CHECKING:
    from pathlib import Path

    from .anatomy import Inspected
    from .benchmark import Bench
    from .checkpoint import Verified
    from .domains import DomainRow
    from .models import ModelRow
    from .page import Written
    from .plan import Plan
    from .rows import Row
    from .scoring import Scored
    from .stages import Pruned
    from .to_gguf import Exported


# C0 but tab and line feed, C1, the line breaks of Unicode, and what turns the writing round.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def plan(found: "Plan", stability: Mapping[str, float]) -> RenderableType:
    """Units of each layer before and after, then parameters and bytes; equal layers on one line."""
    table = _table("Plan", "layers", "kind", "units", "kept", "removed")
    for kind in dict.fromkeys(row.kind for row in found.rows):
        rows = [row for row in found.rows if row.kind == kind and row.before]
        for (before, after), same in groupby(rows, key=lambda row: (row.before, row.after)):
            names = [_layer(row.group) for row in same]
            layers = names[0] if len(names) == 1 else f"{names[0]}-{names[-1]}"
            removed = percent(1 - after / before)
            table.add_row(layers, kind, thousands(before), thousands(after), removed)
    left = f"{found.parameters_after / found.parameters_before:.1%}"
    lines = [
        f"parameters {thousands(found.parameters_before)} → {thousands(found.parameters_after)}"
        f" ({left}), bytes {size(found.bytes_before)} → {size(found.bytes_after)}"
    ]
    lines += [
        f"both halves of the calibration text agree on {percent(share)} of the kept {kind}"
        for kind, share in stability.items()
    ]
    return Group(table, *lines)


def vocabulary(facts: Mapping[str, Any]) -> str:
    """How many tokens stay, and what that saves."""
    saved = facts["parameters_before"] - facts["parameters"]
    return (
        f"Vocabulary: {thousands(facts['used'])} of {thousands(facts['rows_before'])} tokens come "
        f"up at least {facts['threshold']} times in the text; with what they need "
        f"{thousands(facts['rows'])} stay, which saves {thousands(saved)} parameters "
        f"({saved / facts['parameters_before']:.1%})."
    )


def bought(threshold: int | None, facts: Mapping[str, Any]) -> str:
    """Which threshold of the vocabulary the budget comes to."""
    if threshold is None:
        return "At these prices the budget buys no token of the vocabulary: it stays whole."
    return (
        f"The budget buys tokens of {facts['bought']:,.0f} parameters, for about "
        f"{facts['expected']:+.3f} nats/token: those seen fewer than {threshold} times go."
    )


def query_heads(facts: Mapping[str, Any]) -> str:
    """How many query heads stay of each key/value head, and what that saves."""
    saved = facts["parameters_before"] - facts["parameters"]
    return (
        f"Query heads: {facts['after']} of {facts['before']} stay with each key/value head, which "
        f"saves {thousands(saved)} parameters ({saved / facts['parameters_before']:.1%})."
    )


def channels(facts: Mapping[str, Any]) -> str:
    """How many channels of the residual stream stay, and what that saves."""
    saved = facts["parameters_before"] - facts["parameters"]
    return (
        f"Channels: {thousands(facts['after'])} of {thousands(facts['before'])} stay in the "
        f"residual stream, which saves {thousands(saved)} parameters "
        f"({saved / facts['parameters_before']:.1%})."
    )


def lasso(facts: Mapping[str, Any]) -> RenderableType:
    """What the lasso left, and where the units that go come from."""
    lines = [
        f"The lasso left {thousands(facts['zero'])} of {thousands(facts['units'])} units at zero; "
        f"of the {thousands(facts['removed'])} that go, {thousands(facts['removed_zero'])} are of "
        f"these and {thousands(facts['removed_by_score'])} are chosen by score."
    ]
    if change := facts["logits_change"]:
        lines.append(
            f"Silencing the zero units changes float32 logits by {change['masked']:g} (exactly), "
            f"taking them out by {change['removed']:.1e} of the largest."
        )
    return Group(*lines)


def pruned(result: "Pruned") -> RenderableType:
    """The plan after a dry run; else what was measured, samples, and where it is."""
    if result.folder is None:
        found = plan(result.plan, result.manifest["stability"])
        return Group(found, "", forecast(result.manifest["forecast"]))
    if not result.rows:  # of several processes only the first has measured
        return Group()
    texts = [
        Panel(Text.assemble((seen(sample["prompt"]), "dim"), seen(sample[label])), title=label)
        for sample in result.manifest["samples"]
        for label in ("before", "after")
    ]
    lost = forgotten(result.manifest.get("forget", {"domains": {}}))
    where = f"Written to {result.folder}; see report.md there."
    return Group(rows(result.rows), *lost, *texts, where)


def seen(text: str) -> str:
    """What a model wrote, with no character that would move the cursor or command the terminal."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def forgotten(facts: Mapping[str, Any]) -> list[str]:
    """One line for each domain to forget."""
    found = []
    for name, told in facts["domains"].items():
        times = "" if told["selectivity"] is None else (
            f", {told['selectivity']:.1f} times the rise on the domain itself"
        )  # fmt: skip
        found.append(
            f"{name}: bits per byte {told['bits_per_byte_before']:.3f} → "
            f"{told['bits_per_byte']:.3f}{times}"
        )
    return found


def forecast(parts: Sequence[Mapping[str, Any]]) -> RenderableType:
    """What the parts after the plan will take, and all of them."""
    table = _table("About what the rest takes", "part", "tokens", "TFLOP", "time", "memory")
    for p in parts:
        flops = f"{p['flops'] / 1e12:,.0f}"
        table.add_row(
            p["name"], thousands(p["tokens"]), flops, duration(p["seconds"]), size(p["bytes"])
        )
    total = duration(sum(p["seconds"] for p in parts))
    return Group(table, f"together about {total}, going by one forward pass on this machine")


def reported(result: "Written") -> RenderableType:
    """Where the report is, and what was wrong with the runs."""
    return Group(*result.warnings, f"{result.html} ({size(result.bytes)} with its figures)")


def converted(done: "Verified", out: "Path") -> str:
    """Where it is, and how it was proved."""
    return (
        f"Written to {out}: {done.layout}, opened by {done.model_type}, "
        f"{size(sum(done.files.values()))}; logits differ by {done.difference:.1e} of the largest."
    )


def scored(result: "Scored") -> RenderableType:
    """One line per kind of unit scored, and where the scores are."""
    about = result.made_by
    return (
        f"{len(result.scores)} groups scored by {about['criterion']} on {about['tokens']} tokens: "
        f"{result.path}"
    )


def bench(result: "Bench") -> RenderableType:
    """The models side by side."""
    return rows(result.rows)


def rows(found: "Sequence[Row]") -> RenderableType:
    """A column per row, a line per figure; figures that were not measured are left out."""
    lines = report.comparison(found)[1:]
    title = f"{found[0].domain}, {found[0].part}: {thousands(found[0].tokens)} tokens"
    table = _table(title, "", *(row.label for row in found))
    for name, *cells in lines:
        if any(re.search(r"\d", cell) for cell in cells):
            table.add_row(name, *cells)
    return table


def exported(result: "Exported") -> RenderableType:
    """Where the file is, what was found of it, and what its user has to know."""
    what = f"{result.arch}, {result.quantization}, {size(result.bytes)}"
    lines = [f"Written to {result.file}: {what}."]
    if found := result.check:
        judged = "" if found.tolerance is None else f" (at most {found.tolerance:g} is allowed)"
        lines += [
            f"{found.runtime}: {found.whole} of {found.prompts} prompts go on with the very same "
            f"tokens as in transformers, {found.same} of {found.tokens} greedy tokens are the "
            f"same, and {found.ties} more are as good within the tolerance.",
            f"Log-probabilities differ by {found.difference:.1e} of the largest logit{judged}; the "
            f"loss of a text is {found.loss_there:.4f} there and {found.loss:.4f} here, and "
            f"{percent(found.agreement)} of its likeliest tokens agree. {found.texts} texts are "
            "encoded the same.",
        ]
    if result.wide:
        lines.append(
            f"{len(result.wide)} tensors are in f16, as their rows fill no whole blocks: "
            f"{', '.join(result.wide[:4])}{' …' * (len(result.wide) > 4)}"
        )
    return Group(*lines, *result.notes)


def inspected(result: "Inspected") -> RenderableType:
    """What can be removed of each kind, and what that would save."""
    title = f"{result.name}: {result.model_type}, {thousands(result.parameters)} parameters"
    columns = ("layers", "units", "parameters of one", "of all", "share", "even cut loads in")
    table = _table(title, "kind", *columns)
    for r in result.removable:
        table.add_row(
            r.kind,
            str(r.groups),
            thousands(r.units),
            thousands(r.parameters_per_unit),
            thousands(r.parameters),
            percent(r.parameters / result.parameters),
            "transformers" if r.stock else "llm_narrow",
        )
    lines = [f"{thousands(result.fixed)} parameters belong to no unit and always stay."]
    lines += [f"{kind} cannot be removed: {reason}" for kind, reason in result.refused.items()]
    return Group(table, *lines)


def known_models(found: "Iterable[ModelRow]") -> RenderableType:
    """Models by alias."""
    table = _table("Models", "alias", "source", "parameters", "licence", "on this disk", left=4)
    for row in found:
        held = size(row.bytes) if row.cached else "-"
        table.add_row(row.alias, row.source, row.parameters, row.licence, held)
    return table


def known_domains(found: "Iterable[DomainRow]") -> RenderableType:
    """Domains, with what their parts hold once they are cached."""
    columns = ("name", "source", "part", "projects", "documents", "size")
    table = _table("Domains", *columns, left=3)
    for row in found:
        if not row.parts:
            table.add_row(row.name, row.source, "not read yet", "", "", "")
        for number, (part, held) in enumerate(row.parts.items()):
            names = (row.name, row.source) if number == 0 else ("", "")
            counts = (thousands(held.projects), thousands(held.documents), size(held.bytes))
            table.add_row(*names, part, *counts)
    return table


def _table(title: str, *columns: str, left: int = 1) -> Table:
    """A table whose first `left` columns are words and the others figures; nothing is cut off."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        justify: JustifyMethod = "left" if number < left else "right"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=number == 0)
    return table


def _layer(group: str) -> str:
    """The layer's number in a group's name, or the name where it has none."""
    found = re.search(r"\d+", group)
    return found[0] if found else group
