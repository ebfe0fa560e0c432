"""The judge of claim 7, on the even digits of MNIST (examples/mnist), in both of its ways."""

from collections.abc import Sequence

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
    tokens,
)


def mnist(found: Found) -> Judgement:
    """Claim 7: pruned networks need fewer examples than distilled ones and ones from scratch."""
    about = found["verdict_inputs"]["7"]
    ways = []
    spoken = {"paper": (PAPERS, "Runs stop and are chosen by the test digits, means with failed "
                        "runs at their cap."),
              "fair": (FAIR, "Validation digits, as many configurations for each method, medians "
                       "with failed runs last.")}  # fmt: skip
    for key, (name, words) in spoken.items():
        if key in about["measured"]:
            ways.append(Way(name, words, tuple(mnist_answers(about["measured"][key]))))
    rows = []
    for key, (name, _) in spoken.items():
        for size, told in about["measured"].get(key, {}).items():
            for method, ours in told["methods"].items():
                theirs = about["paper"][size][method]
                rows.append(
                    Number(f"examples, {method}, about {size} units, {name}",
                           f"{tokens(theirs['examples'])} at {theirs['neurons']}",
                           f"{examples(ours)} at {ours['neurons']:.0f}")
                )  # fmt: skip
    runs = {m["runs"] for way in about["measured"].values() for s in way.values()
            for m in s["methods"].values()}  # fmt: skip
    return Judgement(
        ways=tuple(ways), numbers=tuple(rows),
        rests_on=(f"{min(runs)} to {max(runs)} runs of each method and size, all of one teacher; "
                  "Wilcoxon's rank sum, exact",),
        differs=() if about["same_setting"] else
        ("fewer runs and sizes than in the paper (docs/mnist.md, preset quick)",),
    )  # fmt: skip


def mnist_answers(sizes: Found) -> Sequence[Answer]:
    """For each size and other method: whether one of the pruned ones needs fewer examples."""
    found = []
    for size, told in sizes.items():
        for other in ("distillation", "scratch"):
            tests = [t for t in told["tests"] if t["methods"][1] == other
                     and t["methods"][0] in ("lasso", "attribution")]  # fmt: skip
            best = min((t["p"] for t in tests if t["fewer"] == t["methods"][0]), default=1.0)
            worse = [t["p"] for t in tests if t["fewer"] == other]
            said = "; ".join(
                f"{t['methods'][0]}: {t['fewer'] or 'neither'} takes fewer, p = {t['p']:.2g}"
                for t in tests
            )
            question = Question(
                f"Does a pruned network of about {size} units need fewer examples than one by "
                f"{other}?",
                f"one of lasso and attribution does, p < {SURE / 2:g} (half, as there are two)",
                f"both need more, p < {CONTRARY:g} each",
            )
            found.append(
                question.answered(said, yes=best < SURE / 2,
                                  no=len(worse) == len(tests) and max(worse) < CONTRARY)
            )  # fmt: skip
    return found


def examples(e: Found) -> str:
    """Examples with their interval; a bound that is not known is left open."""
    ends = (("…" if e[k] is None else tokens(e[k])) for k in ("low", "high"))
    failed = f", {e['failed']} of {e['runs']} failed" if e["failed"] else ""
    return f"{tokens(e['examples'])} [{', '.join(ends)}]{failed}"
