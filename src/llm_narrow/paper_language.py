"""The judges of claims 8 and 9, on language models that are cut without training afterwards.

They take what examples/paper/attribution.py and examples/paper/lasso_curves.py wrote.
"""

from collections.abc import Sequence

from .paper_judge import (
    FAIR,
    PAPERS,
    Answer,
    Found,
    Judgement,
    Number,
    Question,
    Way,
    ranged,
    short_of,
    tokens,
)

GOOD = 0.5  # a correlation from which a score is said to tell which units matter
FREE = 0.05  # nats per token: a rise below it is called free
LEAST = 0.3  # sparsity that has to be free
PAPERS_TOKENS = 70_000 * 108 * 512  # that the paper's lasso models were trained on, at most
ENOUGH = 0.1  # of them, from which a failure is one of the method and not of the budget
WEIGHTS, LIBRARY = "weights", "attribution"
PAPER_R = {("neurons", "raw"): ".44", ("neurons", "log"): ".80",
           ("channels", "raw"): ".39", ("channels", "log"): ".05"}  # fmt: skip
PAPER_CURVE = {
    "none": "1.33 whole; 1.90 at .30, 2.89 at .60, 4.41 at .80",
    "0.0003": "1.36, flat to about .40; 1.83 at .60, 4.71 at .80",
    "0.0005": "1.48, flat to about .63; 2.85 at .80",
    "0.001": "1.67, flat to about .80; 3.37 at .90",
}


def attribution(found: Found) -> Judgement:
    """Claim 8: attribution tells what ablation would for neurons, and poorly for channels."""
    formulas = found["correlations"]
    about = found["about"]
    return Judgement(
        ways=(
            Way("the paper's formula",
                "The sum over all weights of a unit of gradient times weight: coupled weights each "
                "count the same effect.",
                attributed(formulas[WEIGHTS])),
            Way("the library's score",
                "The sum over tokens of activation times gradient where the unit is read, absolute "
                "by sequence.",
                attributed(formulas[LIBRARY])),
        ),
        numbers=tuple(
            Number(f"Pearson r of {kind}, {scale}, by {formula}",
                   PAPER_R[kind, scale] if formula == WEIGHTS else "not run", ranged(kinds[scale]))
            for formula, by_kind in formulas.items()
            for kind, kinds in by_kind.items()
            for scale in ("raw", "log")
        ),
        rests_on=(
            f"{about['units']['neurons']} of {about['of']['neurons']:,} neurons, as many of each "
            f"layer, and {about['units']['channels']} of {about['of']['channels']:,} channels, "
            f"drawn without replacement, {about['batches']} batches of "
            f"{about['tokens']:,} tokens; intervals reach over those by bootstrap of the units and "
            "over the range of single batches",
            f"without a logarithm, as exactly 0, are {found['zeros']} of the pairs",
        ),
        differs=(f"{about['model']} for Llama-3.2-1B, {about['precision']}",
                 "several batches instead of one, and no unit twice"),
    )  # fmt: skip


def attributed(by_kind: Found) -> tuple[Answer, ...]:
    """Both halves of the claim, for one formula."""
    neurons, channels = (by_kind[kind]["log"] for kind in ("neurons", "channels"))
    return (
        Question(
            "Does attribution tell what the ablation of a neuron costs (Pearson r of logarithms)?",
            f"the interval of r lies above {GOOD:g}", "it lies below",
        ).answered(ranged(neurons), yes=neurons["low"] > GOOD, no=neurons["high"] < GOOD),
        Question(
            "Does it tell that poorly for a channel of the residual stream?",
            f"the interval of r lies below {GOOD:g}", "it lies above",
        ).answered(ranged(channels), yes=channels["high"] < GOOD, no=channels["low"] > GOOD),
        Question(
            "Worse than for a neuron?",
            "the interval of channels lies below that of neurons", "it lies above",
        ).answered(
            f"{ranged(channels)} against {ranged(neurons)}",
            yes=channels["high"] < neurons["low"], no=channels["low"] > neurons["high"],
        ),
    )  # fmt: skip


def lasso_curves(found: Found) -> Judgement:
    """Claim 9: the lasso makes neurons prunable for free."""
    about, models = found["about"], found["models"]
    drawn = {k: v for k, v in models.items() if v["drawn"]}
    enough = about["lasso_tokens"] >= ENOUGH * PAPERS_TOKENS
    more = short_of(about["lasso_tokens"], ENOUGH * PAPERS_TOKENS)
    free = flat(drawn, enough, more)
    ways = [Way(PAPERS, "Lasso models beside the model that they began with.",
                (free, apart(drawn, models["none"], "the model before")))]  # fmt: skip
    if "trained" in models:
        ways.append(
            Way(FAIR, "Lasso models beside the model trained on as many tokens of the domain "
                "without a penalty.",
                (free,
                 apart(drawn, models["trained"], "the model trained alike without a penalty")))
        )  # fmt: skip
    rows = []
    for model in models.values():
        curve = "; ".join(
            f"{row['loss']['value']:.2f} at {row['sparsity']:g}" for row in model["curve"]
        )
        key = f"{model['drawn']['strength']:g}" if "strength" in model["drawn"] else model["name"]
        known = PAPER_CURVE.get(key, "not run")
        told = f"{curve}; free to {free_to(model['curve']):g}"
        rows.append(Number(f"held-out loss, {model['name']}", known, told))
    return Judgement(
        ways=tuple(ways), numbers=tuple(rows),
        rests_on=(f"one training of each model; {about['held_out_tokens']:,} held-out tokens, "
                  "intervals of each rise over documents, paired",),
        differs=(f"{about['model']} for Llama-3.2-1B",
                 f"{tokens(about['lasso_tokens'])} tokens of the lasso for at most "
                 f"{tokens(PAPERS_TOKENS)}", f"the lasso: {about['lasso']}"),
    )  # fmt: skip


def free_to(curve: Sequence[Found]) -> float:
    """The largest sparsity up to which every rise is surely below FREE; 0 if none is."""
    reached = 0.0
    for row in sorted(curve, key=lambda r: float(r["sparsity"])):
        if row["rise"]["high"] >= FREE:
            break
        reached = float(row["sparsity"])
    return reached


def surely_not(curve: Sequence[Found]) -> bool:
    """Whether some sparsity up to LEAST surely costs FREE or more."""
    return any(r["rise"]["low"] >= FREE for r in curve if r["sparsity"] <= LEAST)


def flat(drawn: Found, enough: bool, more: str) -> Answer:
    """Whether some lasso model loses neurons for free; `more` is what it takes to deny it."""
    reached = {m["name"]: free_to(m["curve"]) for m in drawn.values()}
    return Question(
        f"Can a lasso model lose at least {LEAST:.0%} of its neurons for free?",
        f"of one of them, the rise of its held-out loss is below {FREE:g} nats per token at "
        "every sparsity up to there, upper end of the interval",
        f"of none, by lower ends, after a training on at least {ENOUGH:.0%} of the paper's tokens",
    ).answered(
        "; ".join(f"{name}, free to {s:g}" for name, s in reached.items()) + more,
        yes=max(reached.values(), default=0) >= LEAST,
        no=enough and all(surely_not(m["curve"]) for m in drawn.values()),
    )


def apart(drawn: Found, other: Found, what: str) -> Answer:
    """Whether what is free after the lasso is dear without it."""
    best = max(drawn.values(), key=lambda m: free_to(m["curve"]))
    at = free_to(best["curve"])
    here = next((r for r in other["curve"] if r["sparsity"] == at), None)
    question = Question(
        f"Does as much cost {what} more than that?",
        f"at the largest sparsity that is free after the lasso, the rise of {what} is above "
        f"{FREE:g}, lower end",
        "it is below, upper end",
    )
    if not at or here is None:
        return question.answered("nothing is free after the lasso", yes=False, no=False)
    return question.answered(
        f"at {at:g}, {best['name']}: {ranged(here['rise'])} nats per token",
        yes=here["rise"]["low"] > FREE, no=here["rise"]["high"] < FREE,
    )  # fmt: skip
