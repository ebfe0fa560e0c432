"""report.md of a run folder: what was done, what it cost in quality, and what it saved.

Reads manifest.json, rows.jsonl and keep.safetensors. What a file does not hold is said to be not
measured, so a run that was stopped half-way can be reported too.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import report_widths
from . import rows as rowfile
from .errors import BadInput
from .rows import Estimate, Row, Spread

NOT_MEASURED = "not measured"
Manifest = Mapping[str, Any]


def markdown(run: Path) -> str:
    """The text of report.md. Raises BadInput for a missing folder and unreadable files."""
    if not run.is_dir():
        raise BadInput(f"No run folder at {run}. `llm-narrow prune … --out {run}` makes one.")
    manifest = read_manifest(run / "manifest.json")
    rows: list[Row] = []
    warnings: list[str] = []
    if (run / "rows.jsonl").exists():
        rows, warnings = rowfile.read(run / "rows.jsonl")
    plan = at(manifest, "plan") or report_widths.plan_of(run)
    sections = [
        _heading(manifest),
        recovery_mark(manifest),
        "\n".join(f"> Warning: {w}" for w in warnings),
        "## Before and after",
        benchmark(rows) or f"Loss, accuracy, size and speed: {NOT_MEASURED}.",
        "## What was removed",
        widths(plan) or f"Widths: {NOT_MEASURED}.",
        _facts(manifest),
        "## A sample",
        samples(at(manifest, "samples")) or f"Completions: {NOT_MEASURED}.",
        "## To reproduce",
        reproduction(manifest),
    ]
    return "\n\n".join(s for s in sections if s) + "\n"


def read_manifest(file: Path) -> dict[str, Any]:
    """The manifest, empty if the file is not there. Raises BadInput if it is not a JSON object."""
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BadInput(f"{file} is not readable JSON: {error}. Run it again.") from None
    if not isinstance(manifest, dict):
        raise BadInput(f"{file} must hold a JSON object, got {type(manifest).__name__}.")
    return manifest


def at(manifest: Any, *path: str) -> Any:
    """What the manifest holds at the path; None where it holds nothing."""
    for key in path:
        manifest = manifest.get(key) if isinstance(manifest, Mapping) else None
    return manifest


def benchmark(rows: Sequence[Row]) -> str:
    """One table per part of a domain, its models side by side. Empty without rows."""
    parts: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        parts.setdefault((row.domain, row.part), []).append(row)
    return "\n\n".join(
        f"{_on(part)}\n\n{table(comparison(part))}\n\n{_notes(part)}" for part in parts.values()
    )


def comparison(rows: Sequence[Row]) -> list[list[str]]:
    """Cells of a table, the header first: a line per figure, a column per row.

    All `rows` are of one part of a domain; ratios are to the first of them.
    """
    first = rows[0]

    def share(value: Callable[[Row], float | None], text: Callable[[float], str]) -> list[str]:
        whole = value(first)
        return [_share(value(r), whole, text, r is first) for r in rows]

    def each(value: Callable[[Row], str]) -> list[str]:
        return [value(r) for r in rows]

    def relative(
        value: Callable[[Row], Estimate | Spread | None], text: Callable[[float], str]
    ) -> list[str]:
        return [_relative(value(r), r is first, text) for r in rows]

    return [
        ["", *each(lambda r: r.label if r.label == r.model else f"{r.label}: {r.model}")],
        ["parameters", *share(lambda r: r.parameters, thousands)],
        ["  without embeddings", *share(lambda r: r.parameters_without_embeddings, thousands)],
        ["bytes of weights", *share(lambda r: r.bytes, size)],
        ["loss, nats/token", *each(lambda r: ranged(r.loss))],
        ["  Δ loss, paired", *relative(lambda r: r.loss_difference, signed)],
        ["bits per byte", *each(lambda r: ranged(r.bits_per_byte))],
        ["  ratio, paired", *relative(lambda r: r.bits_per_byte_ratio, plain)],
        ["top-1 accuracy", *each(lambda r: ranged(r.accuracy, percent))],
        ["prefill, tokens/s", *each(lambda r: _or(r.prefill, thousands))],
        ["  speed-up [least, greatest]", *relative(lambda r: r.prefill_ratio, times)],
        ["decode, tokens/s", *each(lambda r: _or(r.decode, lambda v: f"{v:,.1f}"))],
        ["  speed-up [least, greatest]", *relative(lambda r: r.decode_ratio, times)],
        ["MFLOP per token", *share(lambda r: r.flops, lambda v: f"{v / 1e6:,.1f}")],
        ["prefill speed-up ÷ FLOP saving", *each(lambda r: _realised(first, r))],
    ]


def table(cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the header first; figures stand to the right."""
    lines = [f"| {' | '.join(_cell(c) for c in line)} |" for line in cells]
    rule = "| --- |" + " ---: |" * (len(cells[0]) - 1)
    return "\n".join([lines[0], rule, *lines[1:]])


def widths(plan: Any) -> str:
    """A table of the units before and after, runs of equal layers on one line. Empty if none.

    `plan` is a list of {group, kind, before, after}; one that is not is told like none.
    """
    found = report_widths.cells(plan)
    return table(found) if found else ""


def recovery_mark(manifest: Manifest) -> str:
    """A loud warning if nothing was trained after the removal; empty if something was."""
    tokens = recovery_tokens(manifest)
    if tokens is None:
        return f"Recovery training: {NOT_MEASURED}."
    if tokens:
        return f"Recovery training: {tokens:,} tokens."
    refit = at(manifest, "refit") and at(manifest, "recipe", "prune", "refit") != "none"
    done = "what is left was only refitted in closed form" if refit else "nothing mended it"
    return (
        f"> **NOT RECOVERED: this model was not trained after the removal; {done}.** "
        "Expect its text to be worse than that of a model trained at this size."
    )


def recovery_tokens(manifest: Manifest) -> int | None:
    """How many tokens the model was trained on after the removal; None if nothing says."""
    for path in (("recover", "tokens"), ("recipe", "recover", "tokens")):
        tokens = at(manifest, *path)
        if isinstance(tokens, int):
            return tokens
    return None


def samples(found: Any) -> str:
    """Each prompt with what the model wrote before and after. Empty if there are none."""
    if not isinstance(found, list):
        return ""
    texts = []
    for sample in found:
        for part in ("prompt", "before", "after"):
            text = at(sample, part)
            texts.append(f"{part.capitalize()}:")
            texts.append(fenced(str(text)) if text is not None else NOT_MEASURED)
    return "\n\n".join(texts)


def reproduction(manifest: Manifest) -> str:
    """The command, and what has to be equal for the same result: versions, seed, hashes."""
    command = at(manifest, "command")
    text = " ".join(map(str, command)) if isinstance(command, list) else command
    seed = at(manifest, "seed")
    lines = [
        _fact("seed", None if seed is None else str(seed)),
        _fact("versions", at(manifest, "versions")),
        _fact("model sha256", at(manifest, "model", "sha256")),
        _fact("domain sha256", at(manifest, "domain", "sha256")),
        _fact("scores sha256", at(manifest, "scores", "sha256")),
        _fact("files", at(manifest, "checkpoint", "files")),
    ]
    return "\n\n".join([fenced(str(text or f"# command {NOT_MEASURED}"), "sh"), "\n".join(lines)])


def plain(value: float) -> str:
    """`1.165`."""
    return f"{value:.3f}"


def ranged(e: Estimate | Spread, text: Callable[[float], str] = plain) -> str:
    """`2.404 [2.35, 2.46]`; without the interval where there is none, as with one document."""
    return text(e.value) if e.low == e.high else f"{text(e.value)} [{text(e.low)}, {text(e.high)}]"


def percent(value: float) -> str:
    """`45.1 %` of 0.451."""
    return f"{100 * value:.1f} %"


def signed(value: float) -> str:
    """`+0.420`."""
    return f"{value:+.3f}"


def times(value: float) -> str:
    """`1.62 x`."""
    return f"{value:.2f} x"


def thousands(value: float) -> str:
    """`134,515,008`."""
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def size(value: float) -> str:
    """Bytes in decimal units: `538.1 MB`."""
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:,.0f} B" if unit == "B" else f"{value:,.1f} {unit}"
        value /= 1000
    return f"{value:,.2f} GB"


def fenced(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any in the text."""
    longest = max((len(ticks) for ticks in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _heading(manifest: Manifest) -> str:
    model, domain = at(manifest, "model", "name"), at(manifest, "domain", "name")
    title = f"# {model or 'A model'} narrowed to {domain or 'a domain'}"
    command = at(manifest, "command")
    text = " ".join(map(str, command)) if isinstance(command, list) else command
    return f"{title}\n\n{fenced(str(text), 'sh')}" if text else title


def _facts(manifest: Manifest) -> str:
    """How the choice was made and mended, one line each."""
    stability = at(manifest, "stability")
    shared = (
        {k: percent(v) for k, v in stability.items() if isinstance(v, int | float)}
        if isinstance(stability, Mapping)
        else None
    )
    lines = [
        _fact("scores", _without(at(manifest, "scores"), "sha256")),
        _fact("kept by the scores of both halves of the calibration text", shared),
        *([f"- {budget_line(bought)}"] if (bought := at(manifest, "joint")) else []),
        *([_fact("forgotten", forgotten)] if (forgotten := at(manifest, "forget")) else []),
        _fact("refit", at(manifest, "refit") or at(manifest, "recipe", "prune", "refit")),
        _fact(
            "checkpoint, reloaded in a fresh process",
            _without(at(manifest, "checkpoint"), "files"),
        ),
        _fact("calibration and held-out tokens", at(manifest, "domain", "tokens")),
        _fact("documents left out", at(manifest, "domain", "dropped")),
        _fact("seconds", at(manifest, "seconds")),
    ]
    return "\n".join(lines)


def budget_line(facts: Mapping[str, Any]) -> str:
    """What one budget over all kinds bought, and how good the estimates were."""
    bought = ", ".join(f"{of['number']:,} {kind}" for kind, of in facts["bought"].items())
    return (
        f"Bought {bought}: loss on the {facts['tokens']:,} tokens of the prices "
        f"{facts['before']:.3f} → {facts['measured']:.3f} measured, {facts['listed']:.3f} by the "
        f"list, {facts['expected']:.3f} by the prices measured on the way."
    )


def _without(found: Any, key: str) -> Any:
    return {k: v for k, v in found.items() if k != key} if isinstance(found, Mapping) else found


def _fact(name: str, value: Any) -> str:
    return f"- {name}: {NOT_MEASURED if value is None or value == {} else _plain(value)}"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(v) for v in value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: NOT_MEASURED}[value]
    if isinstance(value, int):
        return thousands(value)
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"`{value}`" if re.fullmatch(r"[0-9a-f]{40,}", str(value)) else str(value)


def _on(part: Sequence[Row]) -> str:
    r = part[0]
    return (
        f"On {r.tokens:,} tokens of {r.documents:,} documents of `{r.domain}`, "
        f"part {r.part.replace('_', '-')}; 95 % intervals by bootstrap over documents."
    )


def _notes(part: Sequence[Row]) -> str:
    models = [f"- {r.label}: `{r.model}`, sha256 `{r.sha256}`" for r in part]
    timed = next((r.prompt_tokens for r in part if r.prefill and r.prompt_tokens), None)
    if timed:
        models.append(f"- speeds: side by side in turns, prompt of {timed:,} tokens, medians")
    return "\n".join(models)


def _or(value: float | None, text: Callable[[float], str]) -> str:
    return NOT_MEASURED if value is None else text(value)


def _share(
    value: float | None, whole: float | None, text: Callable[[float], str], first: bool
) -> str:
    if value is None or not whole or first:
        return _or(value, text)
    return f"{text(value)} ({percent(value / whole)})"


def _relative(e: Estimate | Spread | None, first: bool, text: Callable[[float], str]) -> str:
    if first:
        return "-"
    return NOT_MEASURED if e is None else ranged(e, text)


def _realised(first: Row, row: Row) -> str:
    """How much of the saving in operations shows as speed."""
    if row is first:
        return "-"
    if row.prefill_ratio is None or not first.prefill_flops or not row.prefill_flops:
        return NOT_MEASURED
    return f"{row.prefill_ratio.value * row.prefill_flops / first.prefill_flops:.2f}"


def _cell(text: str) -> str:
    indent = "&nbsp;&nbsp;" if text.startswith("  ") else ""
    return indent + text.strip().replace("|", "\\|").replace("\n", " ")
