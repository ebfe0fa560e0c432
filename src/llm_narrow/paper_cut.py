"""The judges of claims 4 to 6, on what is left of parity networks that are cut (examples/parity).

Limits and recoveries are looked at in the paper's way beside a fair one, so both are judged.
"""

import math
from collections.abc import Sequence

from .paper_exact import rank_sum, sign_test
from .paper_judge import (
    CONTRARY,
    FAIR,
    FEWEST,
    PAPERS,
    SURE,
    Answer,
    Found,
    Judgement,
    Number,
    Question,
    Way,
    nearest,
    parity_differs,
    ranged,
    tokens,
)

BEFORE = "before"
KNOWN = 0.98  # accuracy at which a network knows a code
HALF_WAY = 0.75  # accuracy half way from chance to knowing
CHANCE = 0.6  # accuracy up to which a network is called at chance
GONE = 0.5  # of what a fresh network needs: below it, a skill was not gone
OTHER_AT, OTHER_WIDTH = 0.74, 256  # where the paper still recovers the other code


def nonlocality(found: Found) -> Judgement:
    """Claim 4: pruning for one skill needs recovery, and its limit grows with width."""
    about = found["verdict_inputs"]["4"]
    widths, paper = about["measured"]["widths"], about["paper"]
    names = sorted(widths, key=int)
    narrow, wide = widths[names[0]], widths[names[-1]]
    enough = all(w["networks"] >= FEWEST for w in widths.values())
    p = about["measured"]["trend_p"]
    ends = (f"{name} wide, {ranged(widths[name]['with recovery'])}" for name in names)
    trend = Question(
        "Can wider networks lose a larger share of their units?",
        f"Page's trend over widths, one-sided p < {SURE / 2:g}",
        f"the interval of the widest lies below that of the narrowest, of {FEWEST} networks each",
    ).answered(
        "; ".join(ends) + ("" if p is None else f"; p = {p:.2g}"),
        yes=p is not None and p < SURE / 2,
        no=enough and wide["with recovery"]["high"] < narrow["with recovery"]["low"],
    )
    test = next(t for t in found["tests"] if t["of"].endswith("recovery against none"))
    needed = Question(
        "Is recovery needed to get that far?",
        f"the limit is higher after recovery in most networks, sign test p < {SURE:g}",
        f"lower in most, p < {CONTRARY:g}",
    )
    recovery = needed.tested(
        f"higher in {test['above']}, lower in {test['below']}", test["p"],
        claimed=test["above"] > test["below"],
    )  # fmt: skip
    pairs = [
        pair
        for w in widths.values()
        for pair in zip(
            w["with recovery, unbroken"]["values"], w["without recovery"]["values"], strict=True
        )
    ]
    above, below = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    unbroken = Question(
        "The same, where every smaller sparsity has to be good as well?",
        needed.yes, needed.no,
    ).tested(
        f"higher in {above}, lower in {below} of {len(pairs)}", sign_test(above, below),
        claimed=above > below,
    )  # fmt: skip
    return Judgement(
        ways=(
            Way(PAPERS, "The limit is the largest sparsity that is good, even if smaller ones are "
                "not.", (trend, recovery)),
            Way(FAIR, "As well, the limit is the sparsity up to which all are good, with recovery "
                "and without.", (trend, unbroken)),
        ),
        numbers=tuple(
            Number(f"limit with recovery, {name} wide",
                   mean_text(paper.get(name, paper.get(int(name)))),
                   ranged(widths[name]["with recovery"]))
            for name in names
        ) + tuple(
            Number(f"without recovery, {name} wide", ".15" if int(name) == OTHER_WIDTH else "",
                   ranged(widths[name]["without recovery"]))
            for name in names
        ) + tuple(
            Number(f"random units with recovery, {name} wide", "not run",
                   ranged(widths[name]["random units"]))
            for name in names
        ),
        rests_on=(f"{', '.join(str(widths[n]['networks']) for n in names)} networks that knew the "
                  "code, by width; bootstrap intervals over them",),
        differs=parity_differs(about),
    )  # fmt: skip


def entanglement(found: Found) -> Judgement:
    """Claim 5: the other skill can be recovered from units kept for the first."""
    about = found["verdict_inputs"]["5"]
    widths, paper = about["measured"]["widths"], about["paper"]
    width = nearest(list(widths), OTHER_WIDTH)
    one = widths[width]
    at = nearest(list(one["sparsities"]), OTHER_AT)
    here = one["sparsities"][at]
    enough = one["networks"] >= FEWEST
    share = here["recovered"]
    papers = Question(
        f"Does the other code come back at a sparsity of {at}, {width} wide?",
        f"the interval of its accuracy after recovery lies above {HALF_WAY:g}, half way from "
        f"chance, of at least {FEWEST} networks",
        f"it lies below {HALF_WAY:g}",
    ).answered(
        f"{ranged(share)}, {one['networks']} networks",
        yes=enough and share["low"] > HALF_WAY, no=enough and share["high"] < HALF_WAY,
    )  # fmt: skip
    at_each = {w: v["sparsities"][nearest(list(v["sparsities"]), OTHER_AT)]
               for w, v in widths.items()}  # fmt: skip
    above, below = (sum(v[k] for v in at_each.values()) for k in ("above", "below"))
    fair = Question(
        "Does it come back better than fresh networks of the same shapes learn it in as many "
        "steps?",
        f"in most networks of all widths at that sparsity, sign test p < {SURE:g}",
        f"worse in most, p < {CONTRARY:g}",
    ).tested(f"better in {above}, worse in {below}", sign_test(above, below), claimed=above > below)
    rows = []
    for sparsity, accuracy in paper.items():
        near = nearest(list(one["sparsities"]), float(sparsity))
        told = one["sparsities"][near]
        rows.append(
            Number(f"other code after recovery, paper at {sparsity}, here at {near}, {width} wide",
                   f"{accuracy:g}", f"{ranged(told['recovered'])}; fresh {ranged(told['fresh'])}")
        )  # fmt: skip
    return Judgement(
        ways=(
            Way(PAPERS, "That it comes back is shown on cut networks alone.", (papers,)),
            Way(FAIR, "Fresh networks of the same shapes tell what the training alone teaches.",
                (papers, fair)),
        ),
        numbers=tuple(rows),
        rests_on=(f"{one['networks']} networks of width {width}; {above + below} of all widths "
                  "that differ from their fresh partner",),
        differs=parity_differs(about),
    )  # fmt: skip


def lasso(found: Found) -> Judgement:
    """Claim 6: the group lasso aligns a skill with units and unlearns the rest."""
    about = found["verdict_inputs"]["6"]
    arms, paper, n = about["measured"]["arms"], about["paper"], about["measured"]["networks"]
    enough = n >= FEWEST
    drawn = arms["gradient"]

    def farther(than: str, what: str) -> Answer:
        ours, theirs = (arm["kept without recovery, to"] for arm in (drawn, arms[than]))
        return Question(
            f"Can more units go without recovery after the lasso than {what}?",
            f"the interval of the limit lies above the other one, of at least {FEWEST} networks",
            "it lies below",
        ).answered(
            f"{ranged(ours)} against {ranged(theirs)}",
            yes=enough and ours["low"] > theirs["high"],
            no=enough and ours["high"] < theirs["low"],
        )

    after = drawn["other after recovery"]
    chance = Question(
        "Is the other code at chance after recovery at every sparsity?",
        f"every interval of its accuracy ends at or below {CHANCE:g}, of {FEWEST} networks",
        f"one begins above {CHANCE:g}",
    ).answered(
        "; ".join(f"at {s}, {ranged(e)}" for s, e in after.items()),
        yes=enough and all(e["high"] <= CHANCE for e in after.values()),
        no=enough and any(e["low"] > CHANCE for e in after.values()),
    )
    back = next(t for t in found["tests"] if t["arms"] == ["none", "gradient"])
    unlearned = Question(
        "Does the other code come back in fewer networks than after as long a training without "
        f"the penalty, at a sparsity of {back['sparsity']:g}?",
        f"in fewer, Fisher's exact p < {SURE:g}",
        f"in more, p < {CONTRARY:g}",
    ).tested(
        f"{back['counts'][0]} without, {back['counts'][2]} with the lasso, of {n}", back["p"],
        claimed=back["counts"][0] > back["counts"][2],
    )  # fmt: skip
    return Judgement(
        ways=(
            Way(PAPERS, "The lasso beside the networks before it; unlearned is chance after a "
                "short recovery.", (farther(BEFORE, "before it"), chance)),
            Way(FAIR, "The lasso beside training on the kept code for as long without a penalty; "
                "unlearned is not learned much sooner than by a fresh network.",
                (farther("none", "after as long a training without it"), unlearned,
                 sooner(found, n))),
        ),
        numbers=(
            Number("kept without recovery, to", f"{paper['kept without recovery, to']:g}",
                   ranged(drawn["kept without recovery, to"])),
            *(Number(f"the same, {arm}", "not run" if arm != BEFORE else ".15",
                     ranged(arms[arm]["kept without recovery, to"]))
              for arm in arms if arm != "gradient"),
            Number("kept with recovery, to", f"{paper['kept with recovery, to']:g}",
                   ranged(drawn["kept with recovery, to"])),
            *(Number(f"other code after recovery, at {s}",
                     f"{paper['other after recovery, at every sparsity']:g}", ranged(e))
              for s, e in after.items()),
        ),
        rests_on=(f"{n} networks that knew both codes, bootstrap intervals over them",),
        differs=parity_differs(about),
    )  # fmt: skip


def sooner(found: Found, networks: int) -> Answer:
    """Whether the other code was gone: how soon cut networks learn it beside fresh ones."""
    parts = found["outcomes"]
    whole = parts[BEFORE]["whole"]
    able = {n for n, both in enumerate(zip(whole["kept"], whole["other"], strict=True))
            if min(both) >= KNOWN}  # fmt: skip
    rows = parts["gradient"]["longer"]
    at = min(row["sparsity"] for row in rows)

    def samples(fresh: bool) -> list[float]:
        own = [row for row in rows if row["sparsity"] == at and row["seed"] in able
               and (row["way"] == "fresh") == fresh]  # fmt: skip
        return [math.inf if r["samples_to_learn"] is None else r["samples_to_learn"] for r in own]

    cut, new = samples(False), samples(True)
    told = "; ".join(
        f"{name}: {', '.join(tokens(None if math.isinf(v) else v) for v in sorted(values))}"
        for name, values in (("cut", cut), ("fresh", new))
    )
    question = Question(
        f"Do cut networks need at least {GONE:g} of the samples for the other code that fresh ones "
        f"of the same shape need, at a sparsity of {at:g}?",
        f"more than that, Wilcoxon's rank sum p < {SURE:g}",
        f"less, p < {CONTRARY:g}",
    )
    if not cut or not new or (math.isinf(min(cut)) and math.isinf(min(new))):
        return question.answered(f"none learns it ({told})", yes=False, no=False)
    p, later = rank_sum(cut, [GONE * v for v in new])
    return question.tested(f"samples to learn it: {told}", p, claimed=later)


def mean_text(values: Sequence[float] | None) -> str:
    """The mean and range of the paper's values."""
    if not values:
        return "not shown"
    return f"{sum(values) / len(values):.2f} ({min(values):.2f} to {max(values):.2f})"
