"""What the results of a run say, as the plain data that the page of narrow.py is made of.

A figure with an interval is {value, low, high}. Results of other weights do not count: they are
told among what is missing. Nothing is measured here; only the share of the whole model's passes
has an interval of its own, drawn from how many problems both, one or none of the two solve, which
is all that pairing them needs.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from finished import Finished
from narrow_steps import Asked, audits, certified, of_these, step_of, told_line, uncertified

FORM = 1  # of matrix.json
BY_HAND = "# put there by hand; this is how --run would make it"
Data = dict[str, Any]


def found(asked: Asked, run: Finished) -> Data:
    """All of a run. Raises BadInput for files that are not what their names say."""
    from llm_narrow import certificate

    missing = []
    parts: Data = {}
    for step, reader in (("matrix", of_matrix), ("tasks", of_tasks)):
        parts[step] = None
        if of_these(asked, run, step):
            parts[step] = _read(asked.file(run, step), step, reader, run, asked.whole_sha256)
            line = told_line(asked, run, step)
            parts[step]["command"] = line or f"{step_of(asked, step, run).line} {BY_HAND}"
        else:
            there = asked.file(run, step).exists()
            missing.append({
                "what": f"{step}{' of these weights' * there}",
                "command": step_of(asked, step, run).line,
            })  # fmt: skip
    again = []
    for lost in asked.lost:
        if (folder := asked.audit(lost)) in audits(asked, run):
            again.append(_read(folder / "relearn.json", "relearn", of_audit, run, ""))
        else:
            missing.append({"what": f"relearning of {lost}",
                            "command": step_of(asked, "relearn", None, lost).line})  # fmt: skip
    made = certified(asked, run)
    own = made.on_domain
    if why := uncertified(asked, run):
        missing.append({"what": f"certificate ({why})",
                        "command": step_of(asked, "certify", run).line})  # fmt: skip
    held = None if why else certificate.load(run.folder)
    return {
        "name": run.name, "made": run.made, "method": run.method, "trained": run.trained,
        "forget_weight": run.weight, "forget_refit": run.refit, "sha256": run.after.sha256,
        "parameters": run.after.parameters,
        "parameters_before": made.original.parameters,
        "share": run.after.parameters / made.original.parameters,
        "commands": run.commands,
        "own": {
            "domain": own.domain, "tokens": own.tokens, "documents": own.documents,
            "before": own.bits_per_byte[0].model_dump(), "after": own.bits_per_byte[1].model_dump(),
            "increase": own.increase.model_dump(), "command": own.command,
        },
        "speed": None if made.speed is None else made.speed.model_dump(),
        "stability": made.stability, **parts, "relearning": again,
        "certificate": None if held is None else {
            "command": held.command,
            "selectivity": held.selectivity and held.selectivity.model_dump(),
        },
        "missing": missing,
    }  # fmt: skip


def _read(file: Path, what: str, reader: Any, *given: Any) -> Data:
    """What a result file says. Raises BadInput where it is none."""
    from llm_narrow.errors import BadInput

    try:
        told: Data = reader(json.loads(file.read_text("utf-8")), *given)
        return told
    except (KeyError, TypeError, IndexError, StopIteration, ValueError) as error:
        raise BadInput(
            f"{file} is not what `{what}` writes ({error!r}). Remove it, or make it again."
        ) from None


def of_matrix(told: Mapping[str, Any], run: Finished, whole: str) -> Data:
    """Texts, groups of them that are off the domain, questions and selectivities."""
    if told["form"] != FORM:
        raise ValueError(f"form {told['form']}, and this reads {FORM}")
    names = {model["sha256"]: model["name"] for model in told["models"]}
    first, own = told["models"][0]["name"], names[run.after.sha256]
    if names[whole] != first:
        raise ValueError(f"its first model is {first}, not the whole one")
    texts, questions = [], []
    rows = {(r["set"], r["model"]): r for r in (*told["losses"], *told["choices"])}
    for name, about in told["sets"].items():
        was, now = rows[name, first], rows[name, own]
        if "bits_per_byte" in now:
            texts.append({
                "set": name, "group": about["group"], "own": about["own"], "items": now["items"],
                "before": three(was, "bits_per_byte"), "after": three(now, "bits_per_byte"),
                "increase": three(now, "increase"),
            })  # fmt: skip
        else:
            questions.append({
                "set": name, "items": now["items"], "chance": now["chance"],
                "before": three(was, "acc"), "after": three(now, "acc"),
                "difference": three(now, "acc_difference"),
                **{key: now[key] for key in ("won", "lost", "p")},
            })  # fmt: skip
    ratios = [
        {
            "on": r["on"], "off": r["off"], "on_increase": three(r, "on_increase"),
            "off_increase": three(r, "off_increase"), "selectivity": three(r, "selectivity"),
        }
        for r in told["selectivities"] if r["model"] == own
    ]  # fmt: skip
    return {
        "texts": texts, "groups": groups(texts, ratios), "questions": questions,
        "selectivities": ratios, "notes": told["notes"],
        "sets": {name: about["sha256"] for name, about in told["sets"].items()},
    }  # fmt: skip


def groups(texts: Sequence[Data], ratios: Sequence[Data]) -> Data:
    """By group of texts off the domain: mean, least and greatest bits per byte before and after."""
    some: dict[str, list[Data]] = {}
    for text in texts:
        if not text["own"]:
            some.setdefault(text["group"], []).append(text)
    made: Data = {}
    for name, several in some.items():
        rise = next((r["off_increase"] for r in ratios if r["off"] == f"all {name}"), None)
        made[name] = {"sets": [text["set"] for text in several], "increase": rise}
        for when in ("before", "after"):
            values = [text[when]["value"] for text in several]
            made[name][when] = {"value": fmean(values), "low": min(values), "high": max(values)}
    return made


def of_tasks(told: Mapping[str, Any], run: Finished, whole: str) -> Data:
    """Greedy answers by set and form of prompt, and those of all sets together."""
    greedy = [r for r in told["rows"] if not r["temperature"]]
    had = {(r["task"], r["prompt"]): r for r in greedy if r["sha256"] == whole}
    rows = []
    for own in (r for r in greedy if r["sha256"] == run.after.sha256):
        was = had.get((own["task"], own["prompt"]))
        if was is None:  # the whole one has no chat template, and its copy has
            continue
        rows.append({
            "task": own["task"], "prompt": own["prompt"], "problems": own["problems"],
            "before": three(was, "pass_at_1"), "after": three(own, "pass_at_1"),
            "difference": three(own, "pass_at_1_difference"),
            "share": share([(was, own)]), "parsed": [was["parsed"], own["parsed"]],
            "ended": [was["whole"], own["whole"]],
            **{key: own[key] for key in ("won", "lost", "p")},
        })  # fmt: skip
    forms = dict.fromkeys(row["prompt"] for row in rows)
    together = []
    for form in forms:
        pairs = [
            (had[r["task"], form], r) for r in greedy
            if r["sha256"] == run.after.sha256 and r["prompt"] == form and (r["task"], form) in had
        ]  # fmt: skip
        problems = sum(now["problems"] for _, now in pairs)
        together.append({
            "prompt": form, "tasks": [now["task"] for _, now in pairs], "problems": problems,
            "passed": [sum(passed(pair[n]) for pair in pairs) for n in (0, 1)],
            "share": share(pairs),
        })  # fmt: skip
    return {
        "rows": rows, "together": together, "sandboxed": told["sandboxed"], "notes": told["notes"],
        "protections": told["protections"], "sets": told["problems_sha256"],
    }  # fmt: skip


def passed(row: Mapping[str, Any]) -> int:
    """How many problems were solved."""
    return round(row["pass_at_1"] * row["problems"])


def share(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> Data | None:
    """Passes ÷ those of the whole model, with its 95 % interval over problems, paired.

    None where the whole model passes nothing: then there is no share.
    """
    import torch

    from llm_narrow.measure import bootstrap

    each: list[list[float]] = []
    for was, now in pairs:
        both = passed(was) - now["lost"]
        neither = now["problems"] - both - now["lost"] - now["won"]
        each += [[1, 1]] * both + [[1, 0]] * now["lost"] + [[0, 1]] * now["won"]
        each += [[0, 0]] * neither
    if not any(was for was, _ in each):
        return None
    # A resample in which the whole model passes nothing counts as if it had passed one.
    sums = torch.tensor(each, dtype=torch.float64)
    return vars(bootstrap(sums, lambda s: s[..., 1] / s[..., 0].clamp(min=1)))


def of_audit(told: Mapping[str, Any], run: Finished, _: str) -> Data:
    """The answers of an audit for a run, and its bits per byte before and after all tokens."""
    lines = told["lines"]
    whole = next(x for x in lines if x["subject"]["kind"] == "whole")
    own = next(x for x in lines if x["subject"]["sha256"] == run.after.sha256)
    ends = [point["bits_per_byte"]["value"] for point in (own["curve"][0], own["curve"][-1])]
    keys = ("goal", "asked", "target", "tokens", "scratch_tokens", "budget", "ratio", "at_least",
            "at_most", "low", "high")  # fmt: skip
    return {
        "domain": told["domain"]["name"], "command": told["command"], "seeds": len(own["seeds"]),
        "whole": whole["curve"][0]["bits_per_byte"]["value"], "before": ends[0], "after": ends[1],
        "trained": own["curve"][-1]["tokens"], "notes": told["notes"],
        "answers": [
            {key: answer[key] for key in keys}
            for answer in told["answers"] if answer["subject"] == own["subject"]["name"]
        ],
    }  # fmt: skip


def three(row: Mapping[str, Any], name: str) -> Data:
    """A figure of a row with its interval; a value of None is not defined."""
    return {"value": row[name], "low": row[f"{name}_low"], "high": row[f"{name}_high"]}


def alike(rows: Sequence[Data]) -> list[str]:
    """What keeps the rows from standing in one table: results of different items."""
    wrong = [
        f"{row['name']} is measured on other text than {rows[0]['name']}: {row['own']['documents']}"
        f" documents of {row['own']['domain']}, not {rows[0]['own']['documents']} of "
        f"{rows[0]['own']['domain']}: show them apart"
        for row in rows[1:]
        if any(row["own"][k] != rows[0]["own"][k] for k in ("domain", "documents"))
    ]
    for part in ("matrix", "tasks"):
        having = [row for row in rows if row[part]]
        for row in having[1:]:
            if row[part]["sets"] != having[0][part]["sets"]:
                wrong.append(
                    f"{part}.json of {row['name']} is of other items than that of "
                    f"{having[0]['name']} (another --limit, or other sets): measure one of them "
                    "again"
                )
    return wrong


def against_plain(rows: Sequence[Data], near: float = 0.01) -> None:
    """Add to each row that forgets the plain one of its method and size, and the quotient of their
    selectivities."""
    for row in rows:
        if not (row["forget_weight"] or row["forget_refit"]):
            continue
        plain = next(
            (
                other for other in rows
                if not (other["forget_weight"] or other["forget_refit"])
                and (other["method"], other["trained"]) == (row["method"], row["trained"])
                and abs(other["parameters"] / row["parameters"] - 1) <= near
            ), None,
        )  # fmt: skip
        ratio = None
        if plain is not None:
            own, beside = (selectivity(one) for one in (row, plain))
            if own and beside and own["value"] and beside["value"]:
                ratio = own["value"] / beside["value"]
        row["plain"] = {"name": plain and plain["name"], "selectivity_ratio": ratio}


def selectivity(row: Data) -> Data | None:
    """That of the domain against all that is off it; None where it was not measured."""
    ratios = (row["matrix"] or {}).get("selectivities", ())
    chosen = [r for r in ratios if r["on"] == "domain" and r["off"] == "off the domain"]
    return chosen[0]["selectivity"] if chosen else None
