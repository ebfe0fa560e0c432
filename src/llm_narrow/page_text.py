"""The words and numbers of a page: its headline, its few figures that matter, its tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from .figure_style import Drawn, crossed, short
from .figures import pair
from .page_runs import Run
from .report import (
    NOT_MEASURED,
    at,
    comparison,
    percent,
    plain,
    recovery_mark,
    recovery_tokens,
    signed,
    size,
    thousands,
    times,
)
from .rows import Estimate, Row, Spread

LONGEST = 6000  # characters of a completion that are shown
Key = dict[str, str]  # name, value, note


def run_page(run: Run, drawn: Sequence[Drawn]) -> dict[str, Any]:
    """What the template needs of one run."""
    m = run.manifest
    model, domain = last(at(m, "model", "name")), last(at(m, "domain", "name"))
    quality = ("loss-by-domain", "speed-and-size", "loss-curves")
    return {
        "kind": "run",
        "title": f"{model or 'A model'} narrowed to {domain or 'a domain'}",
        "lede": _removed(run),
        "alarm": _alarm(m),
        "keys": _keys(run.rows),
        "sections": sections(
            drawn,
            {
                "What it cost, and what it saved": quality,
                "What was removed": tuple(d.name for d in drawn if d.name not in quality),
            },
        ),
        "samples": [_sample(s, ("before", "after")) for s in samples(run)],
        "tables": _tables(run.rows),
        "runs": None,
        "advantages": None,
        "facts": _facts(m),
        "commands": [command] if (command := command_of(m)) else [],
        "hashes": _hashes(m),
    }


def _keys(rows: Sequence[Row]) -> list[Key]:
    """The few numbers that matter of one run; none that was not measured."""
    if not rows:
        return []
    before, after = pair(rows)
    if after is before:
        return [key("loss", plain(after.loss.value), interval(after.loss)),
                key("parameters", short(after.parameters), "")]  # fmt: skip
    keys = []
    if (d := after.loss_difference) is not None:
        keys.append(key("loss above the whole model", signed(d.value), f"nats {interval(d)}"))
    elif (b := after.bits_per_byte_ratio) is not None:
        keys.append(key("bits per byte against the whole model", times(b.value), interval(b)))
    share = percent(after.parameters / before.parameters)
    keys.append(
        key("parameters", short(after.parameters), f"{share} of {short(before.parameters)}")
    )
    for name, ratio in (("prefill", after.prefill_ratio), ("decode", after.decode_ratio)):
        if ratio is not None:
            timed = f"{crossed(times(ratio.low))} to {crossed(times(ratio.high))}"
            keys.append(key(f"{name} speed", times(ratio.value), timed))
    if len(keys) < 4 and before.bytes and after.bytes:
        keys.append(key("weights", size(after.bytes), f"of {size(before.bytes)}"))
    return keys


def key(name: str, value: str, note: str) -> Key:
    """A number of the headline, its signs as print has them."""
    return {"name": name, "value": crossed(value), "note": note}


def interval(e: Estimate | Spread) -> str:
    """`[2.35, 2.46]`; empty where there is none."""
    return "" if e.low == e.high else f"[{plain(e.low)}, {plain(e.high)}]"


def number(count: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _removed(run: Run) -> str:
    """What was removed, in a sentence."""
    parts = []
    for kind in dict.fromkeys(str(row["kind"]) for row in run.plan):
        rows = [row for row in run.plan if row["kind"] == kind]
        whole, left = sum(r["before"] for r in rows), sum(r["after"] for r in rows)
        if left < whole:
            parts.append(f"{percent(1 - left / whole)} of its {thousands(whole)} {kind}")
    criterion = at(run.manifest, "scores", "criterion")
    text = f"{' and '.join(parts)} removed" if parts else ""
    if text and criterion:
        text += f" by {criterion} scores"
    tokens = recovery_tokens(run.manifest)
    if text and tokens:
        text += f", then trained on {thousands(tokens)} tokens"
    return text and f"{text}."


def _alarm(m: Mapping[str, Any]) -> str:
    if recovery_tokens(m) != 0:
        return ""
    return recovery_mark(m).removeprefix("> ").replace("**", "")


def sections(
    drawn: Sequence[Drawn], names: Mapping[str, tuple[str, ...]]
) -> list[tuple[str, list[Drawn]]]:
    """The figures under the headings that `names` puts them; headings without any are left out."""
    found = [(title, [d for d in drawn if d.name in of]) for title, of in names.items()]
    return [(title, figures) for title, figures in found if figures]


def samples(run: Run) -> list[Mapping[str, Any]]:
    """The completions that the manifest holds."""
    found = at(run.manifest, "samples")
    return [s for s in found if isinstance(s, Mapping)] if isinstance(found, list) else []


def _sample(sample: Mapping[str, Any], parts: Sequence[str]) -> dict[str, Any]:
    texts = [(part, cut(sample.get(part))) for part in parts]
    return {"prompt": cut(sample.get("prompt")), "texts": texts}


def cut(text: object) -> str:
    """A completion, its end told rather than shown where it is endless."""
    if text is None:
        return NOT_MEASURED
    shown = str(text)
    if len(shown) > LONGEST:
        return f"{shown[:LONGEST]}\n… {thousands(len(shown) - LONGEST)} more characters"
    return shown


def _tables(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The table of each part of each domain."""
    parts: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        parts.setdefault((row.domain, row.part), []).append(row)
    found = []
    for (domain, part), own in parts.items():
        first = own[0]
        caption = (
            f"{last(domain)}, {part.replace('_', '-')}: {thousands(first.tokens)} tokens of "
            f"{number(first.documents, 'document')}; 95 % intervals by bootstrap over documents"
        )
        cells = comparison(own)
        cells[0] = ["", *(row.label for row in own)]
        found.append({"caption": caption, "cells": cells})
    return found


def _facts(m: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How the choice was made, as far as the manifest says; what it lacks is left out."""
    seconds = at(m, "seconds")
    found = {
        "scores": _listed(at(m, "scores"), {"sha256"}),
        "refit": _listed(at(m, "refit")),
        "checkpoint": _listed(at(m, "checkpoint"), {"files", "sha256"}),
        "tokens": _listed(at(m, "domain", "tokens")),
        "documents left out": _listed(at(m, "domain", "dropped")),
        "seconds": _listed(seconds),
        "seed": str(found) if (found := at(m, "seed")) is not None else "",
        "versions": _listed(at(m, "versions")),
    }
    return [(name, text) for name, text in found.items() if text]


def _hashes(m: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = {"model": at(m, "model", "sha256"), "scores": at(m, "scores", "sha256")}
    domain = at(m, "domain", "sha256")
    if isinstance(domain, Mapping):
        found |= {f"domain, {str(part).replace('_', '-')}": v for part, v in domain.items()}
    found["checkpoint"] = at(m, "checkpoint", "sha256")
    return [(name, str(text)) for name, text in found.items() if text]


def _listed(found: Any, without: set[str] = frozenset()) -> str:  # type: ignore[assignment]
    if not isinstance(found, Mapping):
        return ""
    parts = [(str(k).replace("_", " "), _worded(v)) for k, v in found.items() if k not in without]
    return " · ".join(f"{name} {text}" for name, text in parts if text)


def _worded(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return thousands(value)
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else thousands(value)
    return "" if value is None or isinstance(value, Mapping | list) else str(value)


def command_of(m: Mapping[str, Any]) -> str:
    """The command that made the run; empty if the manifest does not say."""
    command = at(m, "command")
    return " ".join(map(str, command)) if isinstance(command, list) else str(command or "")


def last(name: object) -> str:
    """The last part of a path or hub id."""
    text = str(name or "").rstrip("/")
    return text.rpartition("/")[2] or text
