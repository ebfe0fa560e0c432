"""The words and numbers of a comparison: its headline, its tables, and report.md of it."""

import math
from collections.abc import Sequence
from typing import Any

from .figure_compare import tokens_text
from .figure_style import Drawn, short
from .page_compare import WORDS, Advantage, Comparison, Entry, has
from .page_text import Key, command_of, cut, key, last, number, samples, sections
from .report import NOT_MEASURED, at, plain, ranged, signed, table, thousands


def compared_page(c: Comparison, drawn: Sequence[Drawn]) -> dict[str, Any]:
    """What the template needs of several runs."""
    models = list(dict.fromkeys(last(at(e.run.manifest, "model", "name")) for e in c.entries))
    domains = " and ".join(map(last, c.domains))
    only = models[0] if len(models) == 1 and models[0] else ""
    commands = [command_of(e.run.manifest) for e in c.entries]
    return {
        "kind": "comparison",
        "title": f"{only} narrowed to {domains}" if only else f"{len(c.entries)} runs on {domains}",
        "lede": _counted(c),
        "alarm": "",
        "keys": _compared_keys(c),
        "sections": sections(drawn, {"Size, tokens and loss": tuple(d.name for d in drawn)}),
        "samples": _side_by_side(c),
        "tables": [],
        "runs": runs_table(c),
        "advantages": advantages_table(c),
        "facts": [],
        "commands": list(dict.fromkeys(text for text in commands if text)),
        "hashes": [],
    }


def runs_table(c: Comparison) -> dict[str, Any]:
    """Every run a line: `columns` of (name, is a number), `lines` of (text, value to sort by)."""
    several = len(c.domains) > 1
    rates = any(e.lr is not None for e in c.entries)
    columns = [("method", False), ("size", True), ("seed", True), ("parameters", True)]
    columns += [("loss", True), ("bits per byte", True), ("tokens", True)]
    columns += [("learning rate", True)] if rates else []
    columns += [("domain", False)] if several else []
    lines = []
    for e in sorted(c.entries, key=lambda e: (c.methods.index(e.method), *_order(e))):
        bits = has(e.row, "bits_per_byte")
        line = [
            (e.method, e.method.lower()),
            (e.size or "-", str(e.row.parameters)),
            ("-" if e.seed is None else str(e.seed), _sort(e.seed)),
            (thousands(e.row.parameters), str(e.row.parameters)),
            (ranged(e.row.loss), _sort(e.row.loss.value)),
            (ranged(e.row.bits_per_byte) if bits else NOT_MEASURED,
             _sort(e.row.bits_per_byte.value if bits else None)),
            (NOT_MEASURED if e.tokens is None else thousands(e.tokens), _sort(e.tokens)),
        ]  # fmt: skip
        if rates:
            line.append(("-" if e.lr is None else f"{e.lr:g}", _sort(e.lr)))
        if several:
            line.append((e.row.domain, e.row.domain.lower()))
        lines.append({"cells": line, "aside": not e.chosen})
    return {"columns": columns, "lines": lines}


def advantages_table(c: Comparison) -> list[list[str]]:
    """Cells, the header first: tokens to the best loss of each other method. Empty if none."""
    if not c.advantages:
        return []
    header = ["size", "against", "its best loss", "its tokens", f"tokens of {c.champion}", "ratio"]
    return [header] + [
        [a.size, a.other, plain(a.loss), tokens_text(a.other_tokens), tokens_text(a.tokens),
         _ratio(a.ratio)]
        for a in c.advantages
    ]  # fmt: skip


def markdown(c: Comparison, drawn: Sequence[Drawn], warnings: Sequence[str]) -> str:
    """report.md of a comparison."""
    page = compared_page(c, drawn)
    runs = page["runs"]
    keys = [f"- **{k['value']}** {k['name']}{': ' + k['note'] if k['note'] else ''}"
            for k in page["keys"]]  # fmt: skip
    cells = [[name for name, _ in runs["columns"]]]
    cells += [[text for text, _ in line["cells"]] for line in runs["lines"]]
    images = [f"### {d.title}\n\n![{d.alt}](figures/{d.name}.png)\n\n{d.caption}" for d in drawn]
    found = [
        f"# {page['title']}",
        page["lede"],
        "\n".join(f"> Warning: {w}" for w in warnings),
        "\n".join(keys),
        *images,
        "## Tokens to the best loss of the others" if page["advantages"] else "",
        table(page["advantages"]) if page["advantages"] else "",
        "## All runs",
        table(cells),
    ]
    return "\n\n".join(text for text in found if text) + "\n"


def _order(e: Entry) -> tuple[int, float, int]:
    return -e.row.parameters, e.lr or 0.0, e.seed or 0


def _sort(value: float | None) -> str:
    return "" if value is None else repr(value)


def _ratio(value: float) -> str:
    if value == 0:
        return "never"
    if math.isinf(value):
        return "needs none"
    return f"{value:,.0f}\u00d7" if value >= 10 else f"{value:.1f}\u00d7"


def _compared_keys(c: Comparison) -> list[Key]:
    """The advantage of the best method over each other; without one, the best and the smallest."""
    keys = []
    for other in dict.fromkeys(a.other for a in c.advantages):
        found = [a for a in c.advantages if a.other == other]
        keys.append(_advantage(found))
    keys = keys[:4]
    if not keys:
        best = min(c.groups, key=lambda g: g.estimate.value)
        least = min(c.groups, key=lambda g: g.parameters)
        keys.append(key(f"lowest {WORDS[c.metric]}", plain(best.estimate.value), best.method))
        keys.append(key("fewest parameters", short(least.parameters), least.method))
    whole = c.whole
    if whole is not None and c.champion is not None:
        own = min((g for g in c.groups if g.method == c.champion), key=lambda g: g.parameters)
        above = own.estimate.value - c.estimate(whole).value
        nats = c.metric == "loss"
        name = "loss above the whole model" if nats else "above the whole model"
        unit = "nats" if nats else "bits per byte"
        where = f"{own.method} at {own.size or short(own.parameters)}"
        keys.insert(0, key(name, signed(above), f"{unit}; {where}"))
    return keys


def _advantage(found: Sequence[Advantage]) -> Key:
    """In one number: the least of the ratios at those sizes where the loss was reached at all."""
    other, method = found[0].other, found[0].method
    reached = [a.ratio for a in found if a.ratio > 0]
    every = len(reached) == len(found)
    sizes = "at every size" if every else f"at {len(reached)} of {len(found)} sizes"
    note = f"{method}, {sizes if len(found) > 1 else f'at {found[0].size}'}"
    if not reached:
        return key(f"to the best loss of {other}", "never", f"{method}, at any size")
    least = min(reached)
    if math.isinf(least):
        return key(f"tokens needed for the best loss of {other}", "0", note)
    name, shown = ("fewer", least) if least >= 1 else ("more", 1 / least)
    bound = "\u2265" if len({*reached}) > 1 and least >= 1 else ""
    return key(f"{name} tokens for the best loss of {other}", bound + _ratio(shown), note)


def _counted(c: Comparison) -> str:
    """`30 runs: 5 methods at 3 sizes, 2 seeds, on python.`"""
    seeds = {e.seed for e in c.entries if e.seed is not None}
    told = any(e.told for e in c.entries)
    parts = [number(len(c.methods), "method"), f"at {number(len(c.sizes), 'size')}"]
    text = f"{number(len(c.entries), 'run')}{': ' + ' '.join(parts) if told else ' compared'}"
    if len(seeds) > 1:
        text += f", {len(seeds)} seeds"
    measured = [e.row for e in c.entries]
    counts = {(r.tokens, r.documents) for r in measured}
    if len(counts) == 1:
        text += f", measured on {thousands(measured[0].tokens)} tokens of "
        text += f"{number(measured[0].documents, 'document')} held out of training"
    aside = sum(not e.chosen for e in c.entries)
    if aside:
        text += (
            f". {number(aside, 'run')} of other learning rates or smaller budgets "
            f"{'is' if aside == 1 else 'are'} in the table only"
        )
    return text + "."


def _side_by_side(c: Comparison) -> list[dict[str, Any]]:
    """What up to four methods wrote after the same prompts, at the size most of them have."""
    having = [e for e in c.entries if e.chosen and samples(e.run)]
    if not having:
        return []
    sizes = [e.size for e in having]
    size = max(dict.fromkeys(sizes), key=sizes.count)
    told = [e for e in having if e.size == size] if any(e.told for e in having) else having
    shown = {m: e for e in reversed(told) for m in [e.method]}
    chosen = [shown[m] for m in c.methods if m in shown][:4]
    found = []
    for sample in samples(chosen[0].run)[:3]:
        texts = []
        for e in chosen:
            same = [s for s in samples(e.run) if s.get("prompt") == sample.get("prompt")]
            if same:
                texts.append((f"{e.method} {e.size}".strip(), cut(same[0].get("after"))))
        found.append({"prompt": cut(sample.get("prompt")), "texts": texts})
    return found
