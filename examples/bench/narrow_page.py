"""The tables of narrow.py's page, from its rows alone; every part ends with its commands."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from results import table

Row = Mapping[str, Any]
GROUPS = {"prose": "English prose", "texts": "own texts"}
LACKS = "not measured"


def page(about: Mapping[str, Any], rows: Sequence[Row], weak: Sequence[str]) -> str:
    """All of it, from what was made to what is missing."""
    parts = [
        f"# {about['model']}, narrowed to {about['domain']}",
        f"{about['parameters']:,} parameters before. Every figure is read from the result of the "
        f"command that stands with it; the page is made by `{about['command']}`. Brackets are 95 % "
        "intervals, over documents, texts, questions or problems.",
        "## What was made", made(about, rows),
        commands(line for r in rows for line in r["commands"]),
        "## On the domain and off it", *on_and_off(about, rows),
        "## Questions of general knowledge", *questions(rows),
        "## Programs that run", *programs(rows),
        "## Relearning", *relearning(rows),
        "## Where it is weak", listed(weak) or "Nothing that these results can show.",
        "## What is missing", missing(rows),
    ]  # fmt: skip
    return "\n\n".join(part.rstrip("\n") for part in parts if part) + "\n"


def made(about: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """What each model is, and its own held-out text."""
    head = ["model", "made by", "parameters", "of the whole",
            f"bits per byte on {about['domain']}", "above the whole"]  # fmt: skip
    if fast := any(r["speed"] for r in rows):
        head += ["prefill", "decoding"]
    whole = rows[0]["own"]["before"]
    lines = [["whole", "", f"{about['parameters']:,}", "100.0%", ranged(whole), "",
              *(["", ""] if fast else [])]]  # fmt: skip
    for r in rows:
        line = [r["name"], r["made"], f"{r['parameters']:,}", f"{r['share']:.1%}",
                ranged(r["own"]["after"]), ranged(r["own"]["increase"], "{:+.2%}")]  # fmt: skip
        if fast:
            speed = r["speed"] or {}
            line += [ranged(speed.get(name), "{:.2f} x") for name in ("prefill", "decode")]
        lines.append(line)
    return table(head, lines)


def on_and_off(about: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    """Bits per byte of the domain and of each group off it, what was lost, and selectivity."""
    having = [r for r in rows if r["matrix"]]
    if not having:
        return [f"The domain matrix: {LACKS}."]
    first = having[0]["matrix"]
    own = [t["set"] for t in first["texts"] if t["own"]]
    off = {name: _group(name, g) for name, g in first["groups"].items()}
    head = ["bits per byte", *own, *off.values()]
    lines = [["whole", *(ranged(_text(first, s)["before"]) for s in own),
              *(ranged(first["groups"][g]["before"]) for g in off)]]  # fmt: skip
    rises = []
    for r in rows:
        m = r["matrix"]
        if not m:
            lines.append([r["name"], *([LACKS] * (len(head) - 1))])
            continue
        lines.append([r["name"], *(ranged(_text(m, s)["after"]) for s in own),
                      *(ranged(m["groups"][g]["after"]) for g in off)])  # fmt: skip
        plain = r.get("plain") or {}
        times = plain.get("selectivity_ratio")
        rises.append([
            r["name"], *(ranged(_text(m, s)["increase"], "{:+.3f}") for s in own),
            *(ranged(m["groups"][g]["increase"], "{:+.3f}") for g in off),
            *(_selective(m, "domain", name) for name in ("off the domain", "all languages")),
            "" if not plain else "no such run" if plain["name"] is None
            else "not defined" if times is None else f"{times:.2f} ({plain['name']})",
        ])  # fmt: skip
    sets = list(dict.fromkeys(t["set"] for r in having for t in r["matrix"]["texts"]))
    each = [["whole, bits per byte, then nats per byte above it", *(r["name"] for r in having)]]
    by_set = [
        [f"{s} {_text(first, s)['before']['value']:.3f}",
         *(ranged(_text(r["matrix"], s)["increase"], "{:+.3f}") for r in having)]
        for s in sets
    ]  # fmt: skip
    return [
        "Groups of sets: mean (least to greatest).", table(head, lines),
        "What was lost: nats per byte above the whole model; selectivity is the rise off the "
        f"domain ÷ that on {about['domain']}.",
        table(["nats per byte above the whole", *own, *off.values(), "selectivity",
               "selectivity, languages only", "÷ that of the plain run"], rises),
        "By set:", table(each[0], by_set), notes(having, "matrix"),
        commands(r["matrix"]["command"] for r in having),
    ]  # fmt: skip


def questions(rows: Sequence[Row]) -> list[str]:
    """Accuracy by set, and the mean over sets."""
    having = [r for r in rows if r["matrix"] and r["matrix"]["questions"]]
    if not having:
        return [f"Accuracy: {LACKS}."]
    first = having[0]["matrix"]["questions"]
    head = ["share right", "chance", "whole", *(r["name"] for r in having)]
    lines = []
    for number, q in enumerate(first):
        line = [f"{q['set']} ({q['items']})", f"{q['chance']:.1%}", ranged(q["before"], "{:.1%}")]
        for r in having:
            own = r["matrix"]["questions"][number]
            line.append(f"{own['after']['value']:.1%}, {ranged(own['difference'], '{:+.1%}')}, "
                        f"p {own['p']:.2g}")  # fmt: skip
        lines.append(line)
    means = [_mean(q["chance"] for q in first), _mean(q["before"]["value"] for q in first)]
    means += [_mean(q["after"]["value"] for q in r["matrix"]["questions"]) for r in having]
    lines.append(["mean over sets", *means])
    return [
        "Likeliest choice, zero-shot; beside it the difference to the whole model and the p of "
        "McNemar's exact test.", table(head, lines), "By the commands of the part above.",
    ]  # fmt: skip


def programs(rows: Sequence[Row]) -> list[str]:
    """pass@1 by set and form of prompt, then of all sets together."""
    having = [r for r in rows if r["tasks"] and r["tasks"]["rows"]]
    if not having:
        return [f"pass@1 on HumanEval and MBPP: {LACKS}."]
    lines, together = [], []
    for n, x in enumerate(having[0]["tasks"]["rows"]):
        what = f"{x['task']}, {x['prompt']} ({x['problems']})"
        lines.append([f"{what}: whole", ranged(x["before"], "{:.1%}"), "", "", "",
                      f"{x['parsed'][0]:.0%}", f"{x['ended'][0]:.0%}"])  # fmt: skip
        for r in having:
            own = r["tasks"]["rows"][n]
            lines.append([
                f"{what}: {r['name']}", ranged(own["after"], "{:.1%}"), _share(own["share"]),
                ranged(own["difference"], "{:+.1%}"),
                f"{own['won']}/{own['lost']}, {own['p']:.2g}",
                f"{own['parsed'][1]:.0%}", f"{own['ended'][1]:.0%}",
            ])  # fmt: skip
    for n, x in enumerate(having[0]["tasks"]["together"]):
        what = f"{' + '.join(x['tasks'])}, {x['prompt']}"
        together.append([f"{what}: whole", f"{x['passed'][0]} of {x['problems']}", ""])
        for r in having:
            own = r["tasks"]["together"][n]
            told = f"{own['passed'][1]} of {own['problems']}"
            together.append([f"{what}: {r['name']}", told, _share(own["share"])])
    head = ["greedy answers", "pass@1", "÷ whole", "Δ", "won/lost, p", "parse", "ended"]
    return [
        table(head, lines), "All sets together:",
        table(["greedy answers", "passed", "÷ whole"], together),
        notes(having, "tasks"), commands(r["tasks"]["command"] for r in having),
    ]  # fmt: skip


def relearning(rows: Sequence[Row]) -> list[str]:
    """Tokens until a lost domain is back ÷ those of fresh weights, for every loss to come to."""
    from llm_narrow.relearn_text import GOALS, ratio_text, tokens_text

    lines, told = [], []
    for r in rows:
        for audit in r["relearning"]:
            told.append(audit)
            for a in audit["answers"]:
                ratio = ratio_text(a["ratio"], (a["at_least"], a["at_most"]), (a["low"], a["high"]))
                lines.append([
                    f"{audit['domain']}: {r['name']}",
                    f"{audit['whole']:.3f}, {audit['before']:.3f} → {audit['after']:.3f}",
                    f"{GOALS[a['goal']]}, {a['target']:.3f}",
                    *(tokens_text(a[key], a["budget"]) for key in ("tokens", "scratch_tokens")),
                    f"**{ratio}**" if a["asked"] else ratio,
                ])  # fmt: skip
    if not lines:
        return [f"Tokens to relearn what was lost: {LACKS}."]
    head = ["lost domain", "bits per byte: whole, then before → after all tokens",
            "to a loss of, nats per token", "tokens", "of fresh weights", "÷ fresh"]  # fmt: skip
    seeds = max(audit["seeds"] for audit in told)
    heard = dict.fromkeys(note for audit in told for note in audit["notes"])
    return [
        "Tokens of training until the loss is back, divided by those that fresh weights of the "
        "same shape need: 1 is really gone, 0 was never lost. Bold: to the loss that was asked "
        f"for{f'; brackets: least and greatest of {seeds} seeds' * (seeds > 1)}.",
        table(head, lines), listed(heard), commands(audit["command"] for audit in told),
    ]  # fmt: skip


def missing(rows: Sequence[Row]) -> str:
    """What was not measured, each with the command that does; certificates that are there."""
    lacks = [f"{r['name']}: {one['what']}" for r in rows for one in r["missing"]]
    certified = [r["certificate"]["command"] for r in rows if r["certificate"]]
    parts = [listed(lacks) or "Nothing: every run has every result."]
    if lacks:
        parts.append(commands(one["command"] for r in rows for one in r["missing"]))
    if certified:
        parts += ["Certificates are written by:", commands(certified)]
    return "\n\n".join(parts)


def notes(rows: Sequence[Row], part: str) -> str:
    """What the results themselves say has to be known of them."""
    found: dict[str, None] = {}
    for r in rows:
        found |= dict.fromkeys(r[part]["notes"])
    if part == "tasks":
        bare = {name: why for r in rows for name, why in r[part]["protections"].items()
                if why is not True}  # fmt: skip
        told = ", ".join(f"{name} ({why})" for name, why in bare.items())
        state = f"NOT active: {told}" if told else "all protections were active"
        found[f"Sandbox: {state}."] = None
    return listed(found)


def commands(lines: Iterable[str]) -> str:
    """A block of commands, none of them twice."""
    return "\n".join(["```sh", *dict.fromkeys(lines), "```"])


def listed(lines: Iterable[str]) -> str:
    """A list; empty where there is nothing."""
    return "\n".join(f"- {line}" for line in lines)


def ranged(e: Mapping[str, Any] | None, form: str = "{:.3f}") -> str:
    """`0.815 (0.776 to 0.853)`; the value alone where it has no interval."""
    if e is None or e["value"] is None:
        return "not defined" if e else LACKS
    told = form.format(e["value"])
    if e["low"] is None and e["high"] is None:
        return told
    low, high = ("no bound" if e[end] is None else form.format(e[end]) for end in ("low", "high"))
    return told if low == high == told else f"{told} ({low} to {high})"


def _share(e: Mapping[str, Any] | None) -> str:
    return "the whole one passes none" if e is None else ranged(e, "{:.2f}")


def _selective(m: Mapping[str, Any], on: str, off: str) -> str:
    row = next((r for r in m["selectivities"] if (r["on"], r["off"]) == (on, off)), None)
    return LACKS if row is None else ranged(row["selectivity"], "{:.2f}")


def _group(name: str, g: Mapping[str, Any]) -> str:
    many = len(g["sets"])
    if name == "languages":
        return f"{many} other languages"
    return f"{GROUPS.get(name, name)} ({many} {'set' if many == 1 else 'sets'})"


def _text(m: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(t for t in m["texts"] if t["set"] == name)
    return found


def _mean(values: Iterable[float]) -> str:
    some = list(values)
    return f"{sum(some) / len(some):.1%}"
