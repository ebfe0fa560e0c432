"""The judges of claims 10 to 12, on language models that are trained after they were cut.

They take the runs of `llm-narrow compare`, as paper_read.comparison gives them.
"""

import math
from collections.abc import Sequence
from typing import Any

from .paper_exact import mean
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

SPARSITY = 0.8  # share of neurons that claim 10 removes
NEAR = 0.05  # of it
SOON = 0.56  # tokens of a parameter after which the paper's model is below: 3,000 steps of 592 M
ABOVE = 0.37  # nats per token above the whole model: the paper's target of 1.7 against 1.33
LAG = 0.025  # share of the steps that the paper's moving mean reaches back over
MARGIN = 0.02  # nats per token within which two losses are called equal
RECOVERED = 0.53  # tokens of a parameter at the paper's earliest equality: step 5,365 of 667 M
SEEDS = 3  # that have to agree
Runs = Sequence[Found]


def chosen(runs: Runs, method: str, size: str | None = None) -> list[Found]:
    """The runs of a method, of a size where one is given, by seed."""
    own = [r for r in runs if r["method"] == method and (size is None or r["size"] == size)]
    return sorted(own, key=lambda r: int(r["seed"]))


def paired(one: Runs, two: Runs) -> dict[str, Any]:
    """The mean of `two` less `one` on held-out text over the seeds that both have."""
    first = {r["seed"]: r["loss"]["value"] for r in one}
    return mean([r["loss"]["value"] - first[r["seed"]] for r in two if r["seed"] in first])


def below(e: Found, limit: float) -> bool:
    """Whether the interval is there and lies below the limit."""
    return e["high"] is not None and bool(e["high"] < limit)


def above(e: Found, limit: float) -> bool:
    """Whether the interval is there and lies above the limit."""
    return e["low"] is not None and bool(e["low"] > limit)


def recovery(found: Found) -> Judgement:
    """Claim 10: recovery is fast, and comes below the unpruned model."""
    runs = [r for r in found["runs"] if r["neurons_removed"] is not None]
    sizes = {r["size"]: r["neurons_removed"] for r in chosen(runs, "oneshot")}
    size = min(sizes, key=lambda s: abs(sizes[s] - SPARSITY), default=None)
    own = chosen(runs, "oneshot", size) if size else []
    near = size is not None and abs(sizes[size] - SPARSITY) <= NEAR
    gap = mean([r["difference"]["value"] for r in own])
    # To the digits that the paper's own is known to.
    per = round(own[0]["tokens"] / own[0]["parameters"], 2) if own else 0.0
    removed = "none" if size is None else f"{sizes[size]:.0%} of the neurons"
    fast = Question(
        f"Is the model without {SPARSITY:.0%} of its neurons below the unpruned one on held-out "
        f"text after at most {SOON:g} tokens of training a parameter?",
        f"the interval of the difference over seeds lies below 0, with {SPARSITY - NEAR:.0%} to "
        f"{SPARSITY + NEAR:.0%} removed",
        "it lies above 0 after at least that many",
    ).answered(
        f"{ranged(gap)} nats per token, {removed} removed, {len(own)} seeds, {per:.2g} tokens a "
        f"parameter{short_of(per, SOON)}",
        yes=near and below(gap, 0) and per <= SOON,
        no=near and above(gap, 0) and per >= SOON,
    )
    return Judgement(
        ways=(Way("held-out text", "The paper reads a moving mean of training losses.", (fast,)),),
        numbers=(
            Number("loss of the unpruned model", "1.33", over(own, "unpruned")),
            Number(f"after training, {removed} removed", "1.30 at 3,450 steps of 108 x 1,024 "
                   "tokens, 1.04 at 36,000", over(own, "loss")),
            Number("tokens of training", tokens(3_450 * 108 * 1024),
                   tokens(own[0]["tokens"]) if own else "none"),
        ),
        rests_on=(f"{len(own)} seeds, Student's t over them; held-out text paired by document",),
        differs=(*compare_differs(found),
                 "the unpruned model is not trained on the domain, in the paper nor here: below it "
                 "is where training on the domain leads, beside recovery"),
    )  # fmt: skip


def frontier(found: Found) -> Judgement:
    """Claim 11: pruning comes to a loss with fewer tokens than distillation and scratch."""
    runs = found["runs"]
    fair, papers, rows = [], [], []
    for size in sizes_of(runs):
        for other in ("distilled", "scratch"):
            one, two = chosen(runs, "oneshot", size), chosen(runs, other, size)
            if one and two:
                fair.append(reaches(found, size, one, two, other))
                papers.append(crosses(size, one, two, other))
    for size in sizes_of(runs):
        for method in ("oneshot", "lasso", "distilled", "scratch"):
            if own := chosen(runs, method, size):
                rows.append(Number(f"held-out loss, {method}, {own[0]['parameters'] / 1e6:.1f} M "
                                   f"parameters, {tokens(own[0]['tokens'])} tokens",
                                   "not shown", over(own, "loss")))  # fmt: skip
    return Judgement(
        ways=(
            Way(PAPERS, "A moving mean of the training loss, one run of each (here every seed).",
                tuple(papers)),
            Way(FAIR, "Held-out loss, true tokens, one shape for all methods, learning rates "
                "chosen for each.", tuple(fair)),
        ),
        numbers=(
            Number("parameters and tokens to 1.7 nats, pruned",
                   "667 M in 76 M, 417 M in 144 M, 296 M in 205 M, 118 M in 596 M", "see above"),
            Number("distilled", "339 M in 1.07 G, 984 M in 0.72 G, 2.26 G in 0.69 G", "see above"),
            Number("from scratch", "339 M in 1.69 G, 984 M in 0.97 G, 3.21 G in 1.13 G",
                   "see above"),
            *rows,
        ),
        rests_on=(f"{seeds_of(runs)} seeds, Student's t over them",),
        differs=compare_differs(found),
    )  # fmt: skip


def reaches(found: Found, size: str, one: Runs, two: Runs, other: str) -> Answer:
    """Who comes to the target within the tokens of a run, and who sooner."""
    target = one[0]["unpruned"]["value"] + ABOVE
    ours, theirs = (mean([r["loss"]["value"] for r in runs]) for runs in (one, two))
    ratio = next((a for a in found["advantages"] if a["size"] == size
                  and (a["method"], a["other"]) == ("oneshot", other)), None)  # fmt: skip
    sooner = ratio is not None and ratio["how"] != "never" and (
        ratio["low"] is None or ratio["low"] > 1
    ) and len(one) >= SEEDS  # fmt: skip
    later = ratio is not None and ratio["high"] is not None and ratio["high"] < 1
    told = f"; tokens of {other} ÷ pruned to the best loss of {other}: " + (
        "unknown" if ratio is None else "pruned has it untrained" if ratio["how"] == "untrained"
        else "never" if ratio["how"] == "never" else ranged({**ratio, "value": ratio["ratio"]})
    )  # fmt: skip
    return Question(
        f"At {size}, does the pruned model come to the whole model's loss + {ABOVE:g} (the paper's "
        f"target) with fewer tokens than {other}?",
        f"its held-out interval over seeds ends below the target, and {other}'s begins above it; "
        f"or both end below, and in each of at least {SEEDS} seeds it needs fewer tokens",
        f"{other}'s ends below and its own begins above; or both end below and in no seed it does",
    ).answered(
        f"target {target:.3f}; pruned {ranged(ours)}, {other} {ranged(theirs)}{told}",
        yes=below(ours, target) and (above(theirs, target) or (below(theirs, target) and sooner)),
        no=below(theirs, target) and (above(ours, target) or (below(ours, target) and later)),
    )


def crosses(size: str, one: Runs, two: Runs, other: str) -> Answer:
    """The same by the moving mean of the training loss, as in the paper."""
    target = one[0]["unpruned"]["value"] + ABOVE
    ours = {r["seed"]: crossing(r["training"], target) for r in one}
    theirs = {r["seed"]: crossing(r["training"], target) for r in two}
    both = [(ours[s], theirs[s]) for s in ours.keys() & theirs.keys()]
    told = (f"{name} " + ", ".join(tokens(None if math.isinf(v) else v) for v in side.values())
            for name, side in (("pruned", ours), (other, theirs)))  # fmt: skip
    return Question(
        f"At {size}, does the moving mean of the training loss come to the target with fewer "
        f"tokens than that of {other}?",
        "in every seed", "in no seed, and later in all",
    ).answered(
        "; ".join(told),
        yes=bool(both) and all(a < b for a, b in both),
        no=bool(both) and all(a > b for a, b in both),
    )  # fmt: skip


def crossing(training: Sequence[Sequence[float]], target: float) -> float:
    """Tokens until the moving mean of the training loss is below the target; inf is never."""
    weight = min(1.0, 1 / max(1.0, LAG * len(training)))
    total = norm = 0.0
    for seen, loss in training:
        total, norm = (1 - weight) * total + weight * loss, (1 - weight) * norm + weight
        if total / norm < target:
            return seen
    return math.inf


def random(found: Found) -> Judgement:
    """Claim 12: random units are as good as chosen ones after recovery."""
    runs = found["runs"]
    fair, papers, rows = [], [], []
    for size in sizes_of(runs):
        one, two = chosen(runs, "oneshot", size), chosen(runs, "random", size)
        if one and two:
            gap = paired(one, two)
            fair.append(equal(f"At {size}", one, two, gap))
            rows.append(
                Number(f"random less chosen, {one[0]['parameters'] / 1e6:.1f} M parameters",
                       "0.0018 at step 5,365; 0 to 0.01 at 20,000", ranged(gap))
            )  # fmt: skip
        drawn = chosen(runs, "random") if one else []
        replaced = [r for r in drawn if near_replaced(r, one[0])]
        if replaced:
            gap = paired(one, replaced)
            kept = replaced[0]["neurons_removed"]
            papers.append(equal(f"At {size} for the chosen, {kept:.1%} of the neurons for the "
                                "random", one, replaced, gap))  # fmt: skip
            rows.append(Number(f"the same, {one[0]['neurons_removed']:.1%} and {kept:.1%} of the "
                               "neurons removed", "the paper's true shares at 50 %: 50 and 39.3 %",
                               ranged(gap)))  # fmt: skip
    ways = [Way(FAIR, "Units drawn without replacement: exactly as many as are chosen.",
                tuple(fair))]  # fmt: skip
    if papers:
        about = ("Drawn with replacement, so that of a share s only 1 - exp(-s) goes: the random "
                 "models are larger.")  # fmt: skip
        ways.insert(0, Way(PAPERS, about, tuple(papers)))
    return Judgement(
        ways=tuple(ways), numbers=tuple(rows),
        rests_on=(f"{seeds_of(runs)} seeds, differences paired by seed, Student's t over them",),
        differs=(*compare_differs(found), "neurons alone go, no channels",
                 "both are refitted before the training"),
    )  # fmt: skip


def near_replaced(run: Found, one: Found) -> bool:
    """Whether a run has the units that drawing those of `one` with replacement leaves."""
    shares = run["neurons_removed"], one["neurons_removed"]
    return None not in shares and abs(shares[0] - (1 - math.exp(-shares[1]))) < 0.01


def equal(where: str, one: Runs, two: Runs, gap: Found) -> Answer:
    """Whether the gap is none, after a recovery that is one."""
    per = one[0]["tokens"] / one[0]["parameters"]
    left = [mean([r["loss"]["value"] - r["unpruned"]["value"] for r in runs])
            for runs in (one, two)]  # fmt: skip
    done = per >= RECOVERED or all(below(e, 0) for e in left)
    return Question(
        f"{where}, are random units as good as chosen ones after recovery?",
        f"the interval of the difference over seeds lies within ±{MARGIN:g} nats per token",
        f"it lies above {MARGIN:g} (or below -{MARGIN:g}) though recovery is done: at least "
        f"{RECOVERED:g} tokens a parameter, or both below the unpruned model",
    ).answered(
        f"{ranged(gap)} nats per token, {per:.2g} tokens a parameter"
        f"{'' if done else short_of(per, RECOVERED)}",
        yes=below(gap, MARGIN) and above(gap, -MARGIN),
        no=done and (above(gap, MARGIN) or below(gap, -MARGIN)),
    )


def sizes_of(runs: Runs) -> list[str]:
    """All sizes, the largest first."""
    largest = {r["size"]: r["parameters"] for r in runs}
    return sorted(largest, key=lambda s: -int(largest[s]))


def seeds_of(runs: Runs) -> str:
    """How many seeds each method and size has."""
    counts = [len(chosen(runs, m, s)) for m, s in {(r["method"], r["size"]) for r in runs}]
    few, many = min(counts), max(counts)
    return f"{few}" if few == many else f"{few} to {many}"


def over(runs: Runs, name: str) -> str:
    """The mean over seeds of a loss, with its interval."""
    return ranged(mean([r[name]["value"] for r in runs]))


def compare_differs(found: Found) -> tuple[str, ...]:
    """How the runs of a comparison are not the paper's."""
    runs = found["runs"]
    few, many = (f([r["tokens"] for r in runs]) for f in (min, max))
    names = ", ".join(dict.fromkeys(r["model"] for r in runs))
    budget = tokens(many) if few == many else f"{tokens(few)} to {tokens(many)}"
    return (f"{names} for Llama-3.2-1B", f"{budget} tokens of training for up to 1.3 G or more",
            "held-out loss of other projects for a moving mean of training losses")  # fmt: skip
