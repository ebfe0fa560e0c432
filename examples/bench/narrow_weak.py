"""Where a narrowed model is weak, in sentences made from its figures alone."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from narrow_found import selectivity
from narrow_page import ranged

Row = Mapping[str, Any]
MOST_TOLD = 3  # sets named of each kind
GONE = 0.5  # of the tokens of fresh weights: less is not gone
UNSURE = 0.05  # a p above it does not tell two models apart


def weak(rows: Sequence[Row], *, most_cost: float, least_pass: float) -> list[str]:
    """All sentences, run by run; then what holds for all of them."""
    found = []
    for row in rows:
        parts = (*_on_domain(row, most_cost), *_selective(row), *_texts(row), *_questions(row),
                 *_programs(row, least_pass), *_relearning(row))  # fmt: skip
        found += [f"{row['name']} {part}." for part in parts]
        if row["missing"]:
            lacks = ", ".join(one["what"] for one in row["missing"])
            found.append(f"Of {row['name']} nothing can be said on {lacks}: not measured.")
    return [*found, *_whole(rows)]


def _on_domain(row: Row, most: float) -> Iterator[str]:
    own = row["own"]
    if own["increase"]["value"] > most:
        yield (
            f"has lost on its own domain: {ranged(own['increase'], '{:+.2%}')} bits per byte on "
            f"{own['domain']}, more than {most:+.0%}"
        )


def _selective(row: Row) -> Iterator[str]:
    if row["matrix"] is None:
        return
    found = selectivity(row)
    if found is not None and found["value"] is None:
        yield "has no selectivity: the loss on its domain has not risen, so the ratio says nothing"
    elif found is not None and (found["low"] is None or found["low"] <= 1):
        yield (
            f"is not shown to be narrow: its selectivity is {ranged(found, '{:.2f}')}, and 1 is a "
            "loss all over"
        )
    plain = row.get("plain") or {}
    if plain.get("name") is None and plain:
        yield "has no plain run of its method, size and training beside it to be held against"
    elif plain.get("selectivity_ratio") is not None and plain["selectivity_ratio"] <= 1:
        yield (
            f"is no more selective than {plain['name']}, which forgets nothing: "
            f"{plain['selectivity_ratio']:.2f} times"
        )


def _texts(row: Row) -> Iterator[str]:
    if row["matrix"] is None:
        return
    texts = row["matrix"]["texts"]
    risen = sorted(texts, key=lambda t: t["increase"]["value"], reverse=True)
    lost = [t for t in risen if t["increase"]["value"] > 0][:MOST_TOLD]
    if lost:
        yield "has lost most on " + "; ".join(
            f"{t['set']} ({ranged(t['increase'], '{:+.3f}')} nats per byte, "
            f"{t['before']['value']:.3f} → {t['after']['value']:.3f} bits)"
            for t in lost
        )
    domain = next((t for t in texts if t["set"] == "domain"), None)
    if domain is None:
        return
    rise = domain["increase"]["value"]
    own = [t["set"] for t in risen if t["own"] and t["increase"]["value"] > rise]
    if own:
        yield f"has lost more on {', '.join(own)}, of its domain too, than on the domain's text"
    less = [t for t in reversed(risen) if not t["own"] and t["increase"]["value"] <= rise]
    if less:
        told = "; ".join(
            f"{t['set']} ({t['increase']['value']:+.3f})" for t in less[: 2 * MOST_TOLD]
        )
        more = f" and {len(less) - 2 * MOST_TOLD} more" if len(less) > 2 * MOST_TOLD else ""
        yield f"has lost no more than on its domain ({rise:+.3f} nats per byte) on {told}{more}"


def _questions(row: Row) -> Iterator[str]:
    asked = row["matrix"]["questions"] if row["matrix"] else []
    fallen = sorted(asked, key=lambda q: q["difference"]["value"])
    lost = [q for q in fallen if q["difference"]["value"] < 0 and q["p"] <= UNSURE][:MOST_TOLD]
    if lost:
        yield "answers fewer questions of " + "; ".join(
            f"{q['set']} ({ranged(q['difference'], '{:+.1%}')}, p {q['p']:.2g})" for q in lost
        )
    guessing = [
        q["set"] for q in asked
        if q["before"]["low"] > q["chance"] >= q["after"]["low"]
    ]  # fmt: skip
    if guessing:
        yield f"is down to what guessing gives on {', '.join(guessing)}"


def _programs(row: Row, least: float) -> Iterator[str]:
    if row["tasks"] is None:
        return
    for x in row["tasks"]["rows"]:
        what = f"{x['task']} ({x['prompt']}, {x['problems']} problems)"
        if not x["after"]["value"] and x["before"]["value"]:
            beside = f"where the whole model passes {ranged(x['before'], '{:.1%}')}"
            yield f"passes nothing of {what}, {beside}"
        elif x["lost"] > x["won"] and x["p"] <= UNSURE:
            yield f"has lost {x['lost']} problems of {what} and won {x['won']} (p {x['p']:.2g})"
    for x in row["tasks"]["together"]:
        if x["share"] is None or x["share"]["value"] >= least:
            if x["share"] is not None and x["share"]["low"] < least:
                yield (
                    f"is not surely at {least:.0%} of the whole model's passes ({x['prompt']}): "
                    f"{ranged(x['share'], '{:.2f}')} on {x['problems']} problems"
                )
            continue
        yield (
            f"passes too few of all problems ({x['prompt']}): {x['passed'][1]} and not "
            f"{x['passed'][0]}, {ranged(x['share'], '{:.2f}')} of the whole model's, wanted "
            f"{least:.2f}"
        )


def _relearning(row: Row) -> Iterator[str]:
    from llm_narrow.relearn_text import ratio_text

    for audit in row["relearning"]:
        asked = next((a for a in audit["answers"] if a["asked"]), None)
        if asked is None:
            continue
        told = ratio_text(
            asked["ratio"], (asked["at_least"], asked["at_most"]), (asked["low"], asked["high"])
        )
        least = asked["at_least"] if asked["ratio"] is None else asked["ratio"]
        if least is None or least < GONE:
            yield (
                f"is not shown to have lost {audit['domain']} for good: tokens to relearn it ÷ "
                f"those of fresh weights: {told} (1 is really gone; up to {audit['trained']:,} "
                "tokens)"
            )


def _whole(rows: Sequence[Row]) -> Iterator[str]:
    """What the results cannot show of any run, since the whole model has nothing there to lose."""
    tasks = next((row["tasks"] for row in rows if row["tasks"]), None)
    for x in tasks["rows"] if tasks else ():
        if not x["before"]["value"]:
            yield (
                f"On {x['task']} ({x['prompt']}) the whole model passes nothing: these problems "
                "tell nothing of what was kept."
            )
    matrix = next((row["matrix"] for row in rows if row["matrix"]), None)
    guessed = [
        q["set"] for q in (matrix["questions"] if matrix else ())
        if q["before"]["low"] <= q["chance"]
    ]  # fmt: skip
    if guessed:
        yield (
            f"On {', '.join(guessed)} the whole model is not surely above guessing: what it knew "
            "there cannot be seen to go."
        )
    if tasks is not None and not tasks["sandboxed"]:
        yield "The programs ran without all of the sandbox's essential protections."
