"""The judges of claims 1 to 3, on what sparse parity networks learn (examples/parity).

Seeds are counted in the paper's way beside a fair one, so both are judged.
"""

from .paper_judge import (
    CONTRARY,
    FAIR,
    PAPERS,
    SURE,
    Answer,
    Found,
    Judgement,
    Number,
    Question,
    Way,
    counted,
    parity_differs,
    spread,
    tokens,
)

BROAD = "broad"
SHALLOW = ("broad, shallow", "broad, shallow and wide")


def more(what: str, than: str) -> Question:
    """Whether one count is above another, by a test."""
    return Question(
        f"Do more seeds of {what} learn the composite than of {than}?",
        f"more do, Fisher's exact p < {SURE:g}",
        f"fewer do, p < {CONTRARY:g}",
    )


def curriculum(found: Found) -> Judgement:
    """Claim 1: the composite is learned only beside its atomics."""
    about = found["verdict_inputs"]["1"]
    m, paper = about["measured"], about["paper"]
    whole = m[BROAD]
    fair = [
        more(f"the arm {BROAD!r}", f"{m[label]['arm']!r}, {label}").tested(
            f"{counted(whole)} against {counted(m[label])}", m[label]["p"],
            claimed=whole["count"] > m[label]["count"],
        )
        for label in ("best learning rate", "other atomics")
    ]  # fmt: skip
    alone = {name: n for name, n in m["begun"].items() if name.startswith("composite only")}
    learned = max(m[label]["count"] for label in ("paper's way", "best learning rate"))
    of = m["paper's way"]["of"]
    fair.append(
        Question(
            "Is it never learned without its atomics, rather than only more slowly?",
            "no seed of any arm without atomics has even begun (a loss below 0.9 bits), of at "
            "least 35, so that the share is below 0.1 with 95 % confidence",
            "a seed has learned it without atomics",
        ).answered(
            f"begun: {'; '.join(f'{name}, {n} of {of}' for name, n in alone.items())}",
            yes=not any(alone.values()) and not learned and of >= 35, no=learned > 0,
        )
    )  # fmt: skip
    return Judgement(
        ways=(
            Way(PAPERS, "A seed counts where the lowest loss of the last 100 steps is below 0.1 "
                "bits; the composite alone at one learning rate, in smaller batches.",
                (by_rule(found, "converged", "composite only"),)),
            Way(FAIR, "A seed counts where the mean of the same losses is; the composite alone at "
                "the best of several learning rates in the same batches; and beside atomics that "
                "it is not made of.", tuple(fair)),
        ),
        numbers=(
            Number("seeds that learn it, with its atomics", paper["broad"], counted(whole)),
            Number("seeds that learn it alone", paper["composite only"],
                   counted(m["paper's way"])),
            Number("the same, best learning rate", "not run", counted(m["best learning rate"])),
            Number("seeds that learn it beside other atomics", "not run",
                   counted(m["other atomics"])),
            Number("samples of a seed", tokens(paper["samples"]), tokens(m["samples"])),
            Number("samples until it is learned", f"within {tokens(paper['learned within'])}",
                   spread(m["samples_to_learn"])),
        ),
        rests_on=(f"{whole['of']} seeds of each arm, Fisher's exact test",),
        differs=parity_differs(about),
    )  # fmt: skip


def by_rule(found: Found, rule: str, arm: str) -> Answer:
    """Whether the broad arm has more seeds than another one by a rule, from the tests."""
    test = next(t for t in found["tests"] if t["rule"] == rule and t["arms"] == [BROAD, arm])
    a, of_a, b, of_b = test["counts"]
    return more(f"the arm {BROAD!r}", f"{arm!r}").tested(
        f"{a} of {of_a} against {b} of {of_b} ({rule})", test["p"], claimed=a > b
    )


def order(found: Found) -> Judgement:
    """Claim 2: the composite is learned after its atomics."""
    about = found["verdict_inputs"]["2"]
    m, paper = about["measured"], about["paper"]
    answer = Question(
        "Is the composite learned after the last of its atomics?",
        f"in most seeds that learn all of them, sign test p < {SURE:g}",
        f"before it in most, p < {CONTRARY:g}",
    ).tested(
        f"after it in {m['after_all_atomics']} of {m['seeds']} seeds", m["sign_test_p"],
        claimed=2 * m["after_all_atomics"] > m["seeds"],
    )  # fmt: skip
    atomics, composite = ([tokens(v) for v in paper[k]] for k in ("atomics", "composite"))
    return Judgement(
        ways=(Way("every seed", "The paper shows one seed; here all that learn.", (answer,)),),
        numbers=(
            Number("samples to the last atomic", " to ".join(atomics), spread(m["last_atomic"])),
            Number("samples to the composite", " to ".join(composite), spread(m["composite"])),
            Number("ratio of the two", "2 to 7", spread(m["ratio"])),
        ),
        rests_on=(f"{m['seeds']} seeds that learned all codes, sign test",),
        differs=parity_differs(about),
    )


def depth(found: Found) -> Judgement:
    """Claim 3: depth helps."""
    about = found["verdict_inputs"]["3"]
    m, paper = about["measured"], about["paper"]
    fair = []
    for name in SHALLOW:
        fair.append(by_rule(found, "learned", name))
        fair.append(
            Question(
                f"Is {name!r} behind in what it has begun too, so that it is not only slower?",
                f"fewer of its seeds are below 0.9 bits, Fisher's exact p < {SURE:g}",
                f"more are, p < {CONTRARY:g}",
            ).tested(
                f"{m[BROAD]['begun']} against {m[name]['begun']} of {m[name]['of']}",
                m[name]["begun_p"], claimed=m[BROAD]["begun"] > m[name]["begun"],
            )
        )  # fmt: skip
    tested = "; ".join(f"{name}, p = {about['paper_p'][name]:.2g}" for name in SHALLOW)
    return Judgement(
        ways=(
            Way(PAPERS, "Seeds by the lowest loss of the last 100 steps, at the end of the budget.",
                tuple(by_rule(found, "converged", name) for name in SHALLOW)),
            Way(FAIR, "Seeds by the mean loss, and those on the way: the budget ends somewhere.",
                tuple(fair)),
        ),
        numbers=tuple(
            Number(f"{name}, {m[name]['parameters']:,} parameters", paper[name], counted(m[name]))
            for name in (BROAD, *SHALLOW)
        ),
        rests_on=(
            f"{m[BROAD]['of']} seeds of each arm, Fisher's exact test",
            f"by the same test the paper's own counts differ from the deep ones thus: {tested}",
        ),
        differs=parity_differs(about),
    )  # fmt: skip
