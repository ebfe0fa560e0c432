"""The paper's claims: every rule in all its outcomes, rows that run and resume, the page.

Results of the toy experiments are put together by the examples' own functions from made-up parts,
and those of commands by the library's own rows and answers, so that formats cannot drift apart.
"""

import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer

from commands import Done, refused
from example_modules import opened
from llm_narrow import (
    channels,
    cli,
    models,
    paper,
    paper_claims,
    paper_page,
    paper_run,
    recipe,
    rows,
    units,
)
from llm_narrow.compare_shapes import Asked
from llm_narrow.errors import BadInput, NarrowError, UnknownName
from llm_narrow.families import find_groups
from llm_narrow.paper_claims import CLAIMS, PRESETS, Claim, Step, named
from llm_narrow.paper_exact import STUDENT, mean, rank_sum, sign_test
from llm_narrow.paper_judge import Answer, Judgement, Question, Way
from llm_narrow.relearn_answers import Answer as Ratio
from llm_narrow.relearn_answers import Answers, Line, Point, Subject
from llm_narrow.rows import Estimate, Row
from llm_narrow.scores import CRITERIA, score
from tiny import batch, tiny

YES, NO, OPEN = "reproduced", "not reproduced", "open at this budget"
SHORT = {"y": YES, "n": NO, "o": OPEN}


PARITY, MNIST, PAPER = opened("parity"), opened("mnist"), opened("paper")


def verdicts(number: int, found: Any) -> tuple[str, ...]:
    """The verdicts of all ways, the one that counts last, after a round through JSON."""
    j = named(str(number)).judge(json.loads(json.dumps(found)))
    assert j.verdict == j.ways[-1].verdict and j.numbers and j.rests_on
    return tuple(way.verdict for way in j.ways)


def spelled(text: str) -> tuple[str, ...]:
    return tuple(SHORT[letter] for letter in text)


# The rule and its statistics -------------------------------------------------------------------


def test_a_single_no_decides_and_yes_needs_all() -> None:
    q = Question("Is it?", "it is", "it is not")
    yes, no, open_ = (Answer(q, says, "") for says in ("yes", "no", "open"))  # type: ignore[arg-type]
    for answers, verdict in (((yes, yes), YES), ((yes, open_), OPEN), ((yes, open_, no), NO),
                             ((), OPEN)):  # fmt: skip
        assert Way("a way", "", answers).verdict == verdict
    assert q.answered("", yes=True, no=True).says == "open"
    two = Judgement((Way("one", "", (yes,)), Way("two", "", (no,))), (), ())
    assert two.verdict == NO and "changes the verdict" in two.changes


@pytest.mark.parametrize(
    ("p", "claimed", "says"),
    [(0.04, True, "yes"), (0.06, True, "open"), (0.04, False, "open"), (0.009, False, "no"),
     (None, True, "open")],
)  # fmt: skip
def test_a_test_answers_by_its_p_and_its_side(p: float | None, claimed: bool, says: str) -> None:
    assert Question("Is it?", "", "").tested("", p, claimed=claimed).says == says


def test_statistics_are_those_of_the_examples_and_of_tables() -> None:
    assert sign_test(5, 0) == PARITY["exact"].sign_test(5, 5) == 2 / 32
    assert sign_test(0, 0) == 1
    for a, b in (([1.0, 2, 3, 4, 5], [6.0, 7, 8, 9, 10]), ([1.0, 3, math.inf], [2.0, 2, 5])):
        theirs = [[None if math.isinf(v) else v for v in side] for side in (a, b)]
        assert rank_sum(a, b)[0] == pytest.approx(MNIST["exact"].rank_sum(*theirs))
    assert rank_sum([1, 2], [3, 4])[1] is False and rank_sum([3, 4], [1, 2])[1] is True
    told = mean([1.0, 2.0, 3.0])
    half = STUDENT[1] / math.sqrt(3)  # a standard deviation of 1
    assert (told["low"], told["high"]) == pytest.approx((2 - half, 2 + half))
    assert mean([1.0])["low"] is None
    assert list(STUDENT) == sorted(STUDENT, reverse=True)


# Claims 1 to 3 ---------------------------------------------------------------------------------

ARMS = PARITY["presets"].quick().curriculum.arms
BROAD, SHALLOW = "broad", ("broad, shallow", "broad, shallow and wide")


def curriculum(learned: Mapping[str, int], begun: Mapping[str, int] | None = None,
               order: Sequence[int] = (40, 0)) -> Any:  # fmt: skip
    """What the example makes of so many seeds of 40 that learned and began; `order` says in how
    many of the broad arm the composite came after its atomics, and before."""

    def part(arm: Any) -> dict[str, Any]:
        n = learned.get(arm.name, 0)
        more = max(n, (begun or {}).get(arm.name, 0))
        fell = [[100, 200, 300, 900]] * order[0] + [[100, 200, 300, 50]] * order[1]
        fell += [[100, None, None, None]] * (40 - len(fell))
        yes = [k < n for k in range(40)]
        return {"learned": yes, "converged": yes, "begun": [k < more for k in range(40)],
                "samples": arm.samples, "parameters": arm.parameters,
                "samples_to_learn": fell}  # fmt: skip

    by_name = {f"curriculum-{PARITY['curriculum'].slug(arm.name)}": part(arm) for arm in ARMS}
    place = SimpleNamespace(
        preset=SimpleNamespace(curriculum=SimpleNamespace(arms=ARMS, seeds=40)), name="quick",
        state=lambda name: None, part=lambda name, make, state=None: by_name[name],
    )  # fmt: skip
    return PARITY["curriculum"].run(place)


@pytest.mark.parametrize(
    ("learned", "begun", "expected"),
    [
        ({BROAD: 20}, {}, "yy"),
        ({BROAD: 3}, {}, "oo"),  # Fisher's p of 3 against 0 is 0.24
        ({BROAD: 20}, {"composite only": 2}, "yo"),  # may be only slower
        ({BROAD: 20, "composite only": 1}, {}, "yn"),  # a single one refutes "only"
        ({BROAD: 2, "composite only": 20}, {}, "nn"),
        ({BROAD: 20, "other atomics": 15}, {}, "yo"),  # variety would do as well
    ],
)
def test_claim_1(learned: dict[str, int], begun: dict[str, int], expected: str) -> None:
    assert verdicts(1, curriculum(learned, begun)) == spelled(expected)


@pytest.mark.parametrize(("order", "expected"), [((20, 1), "y"), ((3, 0), "o"), ((0, 20), "n")])
def test_claim_2(order: tuple[int, int], expected: str) -> None:
    assert verdicts(2, curriculum({BROAD: sum(order)}, order=order)) == spelled(expected)


@pytest.mark.parametrize(
    ("learned", "begun", "expected"),
    [
        ({BROAD: 30}, {}, "yy"),
        ({BROAD: 30}, {SHALLOW[1]: 28}, "yo"),  # only slower
        ({BROAD: 27, SHALLOW[0]: 19, SHALLOW[1]: 16}, {}, "oo"),  # the paper's own counts
        ({BROAD: 3, SHALLOW[0]: 30}, {}, "nn"),
    ],
)
def test_claim_3(learned: dict[str, int], begun: dict[str, int], expected: str) -> None:
    assert verdicts(3, curriculum(learned, begun)) == spelled(expected)


# Claims 4 to 6 ---------------------------------------------------------------------------------


def pruned(after: Sequence[float], before: float = 0.1, *, unbroken: float | None = None,
           other: float = 0.97, fresh: float = 0.6, seeds: int = 5) -> Any:  # fmt: skip
    """What the example makes of limits by width, and of accuracies on the other code at .74."""
    widths = [64, 128, 256][: len(after)]

    def part(limit: float) -> dict[str, Any]:
        spread = [limit + 0.001 * n for n in range(seeds)]
        low = [before + 0.001 * n for n in range(seeds)]
        field = {"largest": spread, "unbroken": spread if unbroken is None else [unbroken] * seeds,
                 "left": [9] * seeds}  # fmt: skip
        by = {"before": {"largest": low, "unbroken": low, "left": [9] * seeds}, "after": field,
              "last_batch": field}  # fmt: skip
        rows = [
            {"seed": n, "way": way, "trained_on": "other", "sparsity": s, "before": 0.5,
             "after": accuracy + 0.001 * n}
            for n in range(seeds) for s in (0.3, 0.74) for way, accuracy in
            (("paper", other), ("fresh", fresh))
        ]  # fmt: skip
        return {"whole": {"kept": [1.0] * seeds, "other": [1.0] * seeds}, "rows": rows,
                "limits": {way: by for way in ("paper", "signed", "random")}}  # fmt: skip

    parts = {f"pruning-w{w}": part(limit) for w, limit in zip(widths, after, strict=True)}
    setting = SimpleNamespace(training=dict.fromkeys(widths), seeds=seeds)
    place = SimpleNamespace(
        preset=SimpleNamespace(pruning=setting), name="quick",
        part=lambda name, make, state=None: parts[name],
    )  # fmt: skip
    return PARITY["pruning"].run(place)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (pruned([0.4, 0.7, 0.9]), "yy"),
        (pruned([0.4, 0.7, 0.9], unbroken=0.05), "yn"),  # only as smaller ones need not be good
        (pruned([0.4]), "oo"),  # a single width has no trend
        (pruned([0.9, 0.7, 0.4]), "nn"),
        (pruned([0.4, 0.7, 0.9], before=0.95), "nn"),  # worse with recovery
        (pruned([0.4, 0.7], seeds=2), "oo"),
    ],
)
def test_claim_4(found: Any, expected: str) -> None:
    assert verdicts(4, found) == spelled(expected)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (pruned([0.4, 0.7, 0.9]), "yy"),
        (pruned([0.4, 0.7, 0.9], fresh=0.99), "yn"),  # comes back, but is learned anew as well
        (pruned([0.4, 0.7, 0.9], other=0.52, fresh=0.5), "nn"),
        (pruned([0.4, 0.7, 0.9], seeds=3), "oo"),  # three networks answer nothing
        (pruned([0.9]), "yo"),  # five pairs: a sign test is never below 0.06
    ],
)
def test_claim_5(found: Any, expected: str) -> None:
    assert verdicts(5, found) == spelled(expected)


def lassoed(limits: Mapping[str, float], back: Mapping[str, float], cut: float | None = 900,
            new: float | None = 1000, seeds: int = 5) -> Any:  # fmt: skip
    """What the example makes of limits without recovery and accuracies on the other code by arm,
    and of samples until it is learned again."""
    arms = ["before", "gradient", "proximal", "none"]

    def part(arm: str) -> dict[str, Any]:
        limit, accuracy = limits.get(arm, 0.1), back.get(arm, 0.99)
        spread = [limit + 0.001 * n for n in range(seeds)]
        field = {"largest": spread, "unbroken": spread, "left": [9] * seeds}
        rows = [{"seed": n, "way": arm, "trained_on": "other", "sparsity": s,
                 "after": accuracy + 0.001 * n}
                for n in range(seeds) for s in (0.1, 0.9)]  # fmt: skip
        longer = [
            {"seed": n, "way": way, "sparsity": 0.5,
             "samples_to_learn": None if v is None else v + n}
            for n in range(seeds) for way, v in ((arm, cut), ("fresh", new))
        ]  # fmt: skip
        return {"whole": {"kept": [1.0] * seeds, "other": [1.0] * seeds}, "rows": rows,
                "longer": longer, "zero_share": [0.0] * seeds,
                "limits": {"before": field, "after": field}}  # fmt: skip

    parts = {f"lasso-{arm}": part(arm) for arm in arms}
    setting = SimpleNamespace(lasso=SimpleNamespace(arms=dict.fromkeys(arms[1:])),
                              pruning=SimpleNamespace(seeds=seeds))  # fmt: skip
    place = SimpleNamespace(preset=setting, name="quick", state=lambda name: None,
                            part=lambda name, make, state=None: parts[name])  # fmt: skip
    return PARITY["lasso"].run(place)


FAR, GONE = {"gradient": 0.95}, {"gradient": 0.5}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (lassoed(FAR, GONE), "yy"),
        (lassoed(FAR, GONE, cut=100), "yn"),  # at chance for now, and soon learned again
        (lassoed(FAR, GONE, cut=None, new=None), "yo"),  # nobody learns it
        (lassoed({**FAR, "none": 0.97}, GONE), "yn"),  # the training did it, not the penalty
        (lassoed(FAR, {**GONE, "none": 0.5}), "yo"),
        (lassoed(FAR, {"gradient": 0.95}), "no"),
        (lassoed(FAR, GONE, seeds=3), "oo"),
        (lassoed({"gradient": 0.05}, GONE), "nn"),
    ],
)
def test_claim_6(found: Any, expected: str) -> None:
    assert verdicts(6, found) == spelled(expected)


# Claim 7 ---------------------------------------------------------------------------------------


def mnist(**examples: Mapping[str, float]) -> Any:
    """What the example makes of examples needed by method, in each way; nine runs of each."""

    def way(by: Mapping[str, float], rule: str) -> dict[str, Any]:
        def sizes(value: float) -> dict[str, Any]:
            runs = [value + n for n in range(9)]
            told = {"value": value, "low": value, "high": value + 8}
            return {"100": {"neurons": {"value": 100}, "mean": told, "median": told,
                            "failed": {"count": 0, "of": 9}, "cap": 9999, "every": 10,
                            "config": {}, "examples": runs,
                            "test_accuracy_when_stopped": {"value": 0.97}}}  # fmt: skip

        return {"rule": rule, "teacher": {},
                "outcomes": {m: {"sizes": sizes(v)} for m, v in by.items()}}  # fmt: skip

    ways = {name: way(by, {"paper": "mean", "fair": "median"}[name])
            for name, by in examples.items()}  # fmt: skip
    arms = {m: SimpleNamespace(runs=9) for m in MNIST["compared"].METHODS}
    preset = SimpleNamespace(ways={n: SimpleNamespace(arms=arms) for n in ways}, buckets=(100,))
    place = SimpleNamespace(preset=preset, name="quick", out=Path("there"),
                            results=lambda: {"experiments": ways})  # fmt: skip
    return MNIST["compared"].run(place)


BEST = {"lasso": 100.0, "attribution": 500.0, "distillation": 300.0, "scratch": 400.0}
SAME = dict.fromkeys(BEST, 300.0)
WORST = {"lasso": 900.0, "attribution": 500.0, "distillation": 300.0, "scratch": 400.0}


@pytest.mark.parametrize(
    ("paper_way", "fair", "expected"),
    [(BEST, BEST, "yy"), (BEST, SAME, "yo"), (BEST, WORST, "yn"), (SAME, SAME, "oo")],
)
def test_claim_7(paper_way: Any, fair: Any, expected: str) -> None:
    assert verdicts(7, mnist(paper=paper_way, fair=fair)) == spelled(expected)


# Claims 8 and 9 --------------------------------------------------------------------------------


def ends(value: float, half: float = 0.05) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def correlated(neurons: float, streams: float, library: float | None = None) -> Any:
    by = {"neurons": {s: ends(neurons) for s in ("raw", "log")},
          "channels": {s: ends(streams) for s in ("raw", "log")}}  # fmt: skip
    other = {**by, "channels": {s: ends(streams if library is None else library)
                                for s in ("raw", "log")}}  # fmt: skip
    about = {"units": {"neurons": 500, "channels": 576}, "batches": 3, "tokens": 2048,
             "of": {"neurons": 46080, "channels": 576},
             "model": "a model", "precision": "float32"}  # fmt: skip
    return {"about": about, "zeros": 0, "correlations": {"weights": by, "attribution": other}}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (correlated(0.8, 0.05), "yy"),
        (correlated(0.8, 0.05, library=0.7), "yn"),  # the library's score is no poor one
        (correlated(0.3, 0.05), "nn"),
        (correlated(0.52, 0.05), "oo"),
        (correlated(0.8, 0.48), "oo"),
    ],
)
def test_claim_8(found: Any, expected: str) -> None:
    assert verdicts(8, found) == spelled(expected)


def curves(lasso: Sequence[float], none: float = 1.0, trained: float = 1.0,
           tokens: float = 1e6) -> Any:  # fmt: skip
    """Models with such rises at .1, .2, .3 and .4; of `none` and `trained` the same at all."""
    at = (0.1, 0.2, 0.3, 0.4)

    def model(name: str, drawn: Any, rises: Sequence[float]) -> dict[str, Any]:
        rows = [{"sparsity": s, "loss": ends(2 + r), "rise": ends(r, 0.01)}
                for s, r in zip((0.0, *at), (0.0, *rises), strict=True)]  # fmt: skip
        return {"name": name, "drawn": drawn, "curve": rows}

    models = [model("none", {}, [none] * 4), model("trained", {}, [trained] * 4),
              model("strength 0.001", {"strength": 0.001}, lasso)]  # fmt: skip
    about = {"lasso_tokens": tokens, "held_out_tokens": 100, "model": "m", "lasso": "gradient"}
    return {"about": about, "models": {m["name"]: m for m in models}}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (curves([0, 0, 0, 0]), "yy"),
        (curves([0, 0, 0, 0], trained=0), "yn"),  # the training did it, not the lasso
        (curves([0.1, 0.2, 0.3, 0.4]), "oo"),  # too few tokens to say so
        (curves([0.1, 0.2, 0.3, 0.4], tokens=1e9), "nn"),
        (curves([0, 0, 0.045, 1]), "oo"),  # free to .2, and the interval at .3 reaches over 0.05
    ],
)
def test_claim_9(found: Any, expected: str) -> None:
    assert verdicts(9, found) == spelled(expected)


# Claims 10 to 12 -------------------------------------------------------------------------------

WHOLE = 2.0


def row(label: str, loss: float, parameters: int) -> Row:
    around = Estimate(loss, loss - 0.1, loss + 0.1)
    difference = None if label == "before" else Estimate(loss - WHOLE, 0, 0)
    return Row(label, "smol", "0", "python", "held_out", 10, 2, around, around, around, parameters,
               parameters, loss_difference=difference)  # fmt: skip


def run_folder(place: Path, method: str, size: str, seed: int, loss: float, *, gone: int,
               tokens: int, training: Sequence[float], parameters: int) -> None:  # fmt: skip
    """A run of `compare`, as far as the judges read it."""
    place.mkdir(parents=True)
    told = {
        "compare": {"method": method, "size": size, "seed": seed, "lr": 1e-3, "tokens": tokens},
        "model": {"name": "smol"},
        "plan": [{"group": "layers.0.mlp", "kind": "neurons", "before": 1000,
                  "after": 1000 - gone}],
    }  # fmt: skip
    (place / "manifest.json").write_text(json.dumps(told))
    rows.append(place / "rows.jsonl", [row("before", WHOLE, 1000), row("after", loss, parameters)])
    steps = [{"step": n, "tokens": 100 * (n + 1), "loss": v} for n, v in enumerate(training)]
    (place / "recover.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))


def comparison(place: Path, losses: Mapping[tuple[str, int], Sequence[float]], *,
               tokens: int = 100, ratio: Mapping[str, Any] | None = None,
               training: Mapping[str, Sequence[float]] | None = None) -> Any:  # fmt: skip
    """The results of runs with such losses by method and neurons gone of 1000, a loss per seed."""
    for (method, gone), values in losses.items():
        folder = place / ("recovery" if gone in (500, 800) else "recovery-replaced")
        size = f"{1000 - gone // 2}"
        for seed, loss in enumerate(values):
            curve = (training or {}).get(method, [9.0] * 50)
            run_folder(folder / f"{method}-{size}-{seed}", method, size, seed, loss, gone=gone,
                       tokens=tokens, training=curve, parameters=1000 - gone // 2)  # fmt: skip
    told = {"advantages": [{"size": f"{1000 - gone // 2}", "method": "oneshot", "other": other,
                            **(ratio or {})} for gone in (500, 800)
                           for other in ("distilled", "scratch") if ratio]}  # fmt: skip
    (place / "recovery" / "compare.json").write_text(json.dumps(told))
    found = paper_claims.runs_compared(place)
    assert found is not None and len(found["runs"]) == sum(map(len, losses.values()))
    return found


def near(loss: float, spread: float = 0.001) -> list[float]:
    return [loss - spread, loss, loss + spread]


@pytest.mark.parametrize(
    ("losses", "tokens", "expected"),
    [
        ({("oneshot", 800): near(1.9)}, 100, "y"),
        ({("oneshot", 800): near(1.9)}, 5000, "o"),  # below, but not shown to be fast
        ({("oneshot", 800): near(2.5)}, 100, "o"),  # above after too few tokens
        ({("oneshot", 800): near(2.5)}, 5000, "n"),
        ({("oneshot", 800): [1.9]}, 100, "o"),  # a single seed has no interval
        ({("oneshot", 500): near(1.9)}, 100, "o"),  # not the share that is claimed
    ],
)
def test_claim_10(losses: Any, tokens: int, expected: str, tmp_path: Path) -> None:
    assert verdicts(10, comparison(tmp_path, losses, tokens=tokens)) == spelled(expected)


def three(pruned_loss: float, other: float, count: int = 3) -> dict[tuple[str, int], list[float]]:
    both = {"distilled": other, "scratch": other, "oneshot": pruned_loss}
    return {(method, 500): near(v)[:count] for method, v in both.items()}


TRAINED = {"how": "trained", "ratio": 5.0, "low": 3.0, "high": 9.0}
SLOW, FAST = [9.0] * 40 + [2.0] * 10, [9.0] * 10 + [2.0] * 40


@pytest.mark.parametrize(
    ("losses", "ratio", "training", "expected"),
    [
        (three(2.2, 7.0), None, {"oneshot": FAST}, "yy"),
        (three(2.6, 7.0), None, {}, "oo"),  # nobody comes to the target
        (three(2.2, 2.3), TRAINED, {"oneshot": FAST, "distilled": SLOW, "scratch": SLOW}, "yy"),
        (three(2.2, 2.3, count=2), TRAINED, {}, "oo"),  # two seeds agree by luck too easily
        (three(2.2, 2.3), {**TRAINED, "low": 0.5}, {}, "oo"),
        (three(2.2, 2.1), {**TRAINED, "low": 0.1, "high": 0.5}, {}, "on"),
        (three(7.0, 2.2), None, {"distilled": FAST, "scratch": FAST}, "nn"),
    ],
)
def test_claim_11(losses: Any, ratio: Any, training: Any, expected: str, tmp_path: Path) -> None:
    found = comparison(tmp_path, losses, ratio=ratio, training=training)
    assert verdicts(11, found) == spelled(expected)


def test_the_moving_mean_lags_and_begins_without_bias() -> None:
    from llm_narrow.paper_trained import crossing

    steps = [[float(n), 5.0 if n < 100 else 1.0] for n in range(200)]
    assert crossing(steps, 6.0) == 0  # the first value stands as it is
    assert 100 < crossing(steps, 2.0) < 115
    assert crossing(steps, 0.5) == math.inf


REPLACED = {500: 393, 800: 551}


def lots(exact: float, replaced: float | None = None, **more: Any) -> dict[Any, Any]:
    found = {("oneshot", 500): near(1.9), ("random", 500): near(1.9 + exact, **more)}
    if replaced is not None:
        found["random", REPLACED[500]] = near(1.9 + replaced)
    return found


@pytest.mark.parametrize(
    ("losses", "tokens", "expected"),
    [
        (lots(0.002), 10_000, "y"),
        (lots(0.5), 10_000, "n"),
        (lots(0.01, spread=0.05), 10_000, "o"),  # the interval reaches over the margin
        (lots(0.5, 0.0), 10_000, "yn"),  # as good only where more of them stay
        (lots(0.002, -0.3), 10_000, "ny"),
        ({("oneshot", 500): near(2.9), ("random", 500): near(3.9)}, 100, "o"),  # not recovered
        ({("oneshot", 500): near(1.5), ("random", 500): near(1.9)}, 100, "n"),  # both recovered
        ({("oneshot", 500): near(1.5), ("random", 500): near(2.9)}, 100, "o"),  # one of them
        ({("oneshot", 500): [1.9], ("random", 500): [1.9]}, 10_000, "o"),
    ],
)
def test_claim_12(losses: Any, tokens: int, expected: str, tmp_path: Path) -> None:
    assert verdicts(12, comparison(tmp_path, losses, tokens=tokens)) == spelled(expected)


def test_a_comparison_is_read_once_it_is_finished(tmp_path: Path) -> None:
    assert paper_claims.runs_compared(tmp_path) is None
    found = comparison(tmp_path, {("oneshot", 500): [1.9], ("scratch", 800): [2.5]})
    by = {run["method"]: run for run in found["runs"]}
    assert by["oneshot"]["neurons_removed"] == 0.5
    assert by["scratch"]["neurons_removed"] is None  # fresh weights lost nothing
    assert by["oneshot"]["difference"]["value"] == pytest.approx(-0.1)
    assert by["oneshot"]["training"][:2] == [[100, 9], [200, 9]]


# Claim 13 --------------------------------------------------------------------------------------


def audited(ratios: Mapping[str, tuple[float | None, float | None]],
            accuracy: Mapping[str, float], seeds: int = 3) -> Any:  # fmt: skip
    """relearn.json with such bounds of the ratio, and accuracies at the end; the whole one's .5."""

    def line(name: str, kind: Any, at: float) -> Line:
        e = Estimate(at, at - 0.01, at + 0.01)
        subject = Subject(name, kind, name, "m", None, "s", 10, 1.0)
        points = (Point(0, e, e, e), Point(1000, e, e, e))
        return Line(subject, 1e-3, (), tuple(range(seeds)), points)

    lines = [line("whole", "whole", 0.5), line("fresh", "scratch", 0.2),
             *(line(name, "run", accuracy[name]) for name in ratios)]  # fmt: skip
    told = [
        Ratio(name, "fresh", goal, goal == "whole", 2.0, None, None, 1000,
              None, low if goal == "whole" else 9.0, high if goal == "whole" else 9.0, None, None)
        for name, (low, high) in ratios.items() for goal in ("whole", "scratch")
    ]  # fmt: skip
    found = Answers("whole", 0.1, tuple(lines), tuple(told)).to_dict()  # type: ignore[arg-type]
    return {**found, "whole": {"name": "m"}, "domain": {"name": "english"}}


LOST, KEPT = (0.7, None), (None, 0.1)
LOW, HIGH = 0.3, 0.49


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (audited({"lasso": LOST, "random": LOST, "oneshot": KEPT},
                 {"lasso": LOW, "random": LOW, "oneshot": HIGH}), "yy"),
        (audited({"lasso": KEPT, "random": LOST, "oneshot": KEPT},
                 {"lasso": LOW, "random": LOW, "oneshot": HIGH}), "yn"),  # hidden, not gone
        (audited({"lasso": LOST, "random": LOST, "oneshot": LOST},
                 {"lasso": LOW, "random": LOW, "oneshot": LOW}), "nn"),
        (audited({"lasso": (None, None), "random": LOST, "oneshot": KEPT},
                 {"lasso": 0.4, "random": LOW, "oneshot": HIGH}), "oo"),
        (audited({"lasso": LOST, "random": LOST, "oneshot": KEPT},
                 {"lasso": LOW, "random": LOW, "oneshot": HIGH}, seeds=2), "yo"),
    ],
)  # fmt: skip
def test_claim_13(found: Any, expected: str) -> None:
    assert verdicts(13, found) == spelled(expected)


# Rows and their commands -----------------------------------------------------------------------


def test_all_thirteen_are_listed_and_none_has_a_verdict_without_results(
    run: Any, tmp_path: Path
) -> None:
    done: Done = run("paper", "--results", tmp_path, "--json")
    told = json.loads(done.out)["rows"]
    assert [r["number"] for r in told] == list(range(1, 14))
    assert {r["verdict"] for r in told} == {"not run"}
    assert len({r["name"] for r in told}) == 13
    table = run("paper", "list", "13", "random", "--results", tmp_path)
    assert "llm-narrow paper" in table.out and "unlearning" in table.out
    assert "entanglement" not in table.out


STEPS = [(claim, preset, step) for claim in CLAIMS for preset in PRESETS
         for step in claim.steps[preset]]  # fmt: skip


@pytest.mark.parametrize(
    ("claim", "preset", "step"), STEPS,
    ids=[f"{c.name}-{p}-{n}" for n, (c, p, _) in enumerate(STEPS)],
)  # fmt: skip
def test_declared_commands_are_taken_by_what_they_call(
    claim: Claim, preset: str, step: Step
) -> None:
    program, *words = step.line(Path("there"))
    assert (Path("there") / step.makes).parts[:2] == ("there", step.folder)
    if program == "python":
        folder, name = Path(words[0]).parts[1], Path(words[0]).stem
        modules = {"parity": PARITY, "mnist": MNIST, "paper": PAPER}[folder]
        args = modules[name].parse(words[1:])
        assert args.out == Path("there") / step.folder
        if folder in ("parity", "mnist"):
            known = modules[name].EXPERIMENTS
            assert args.preset == preset and step.holds[1] in known
            assert not args.only or args.only == [step.holds[1]]
        return
    command = typer.main.get_command(cli.app).commands[words[0]]  # type: ignore[attr-defined]
    taken = command.make_context(words[0], words[1:]).params
    if words[0] in ("prune", "compare"):
        flags = {k: taken[k] for k in recipe.FLAGS if taken.get(k) is not None}
        recipe.load(None, flags, criteria=CRITERIA)
    if words[0] == "compare":
        Asked.of(sizes=taken["sizes"], methods=taken["methods"], lrs=taken["lrs"],
                 seeds=taken["seeds"], tokens=1, sweep_share=taken["sweep_share"])  # fmt: skip


def stub(place: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> list[Claim]:
    """Two rows that share one step, a script that runs `code` with OUT at hand; and a third."""
    (place / "examples").mkdir()
    text = f"import pathlib, sys\nOUT = pathlib.Path(sys.argv[1])\nOUT.mkdir(exist_ok=True)\n{code}"
    (place / "examples" / "stub.py").write_text(text)

    def row(number: int, name: str, folder: str) -> Claim:
        step = Step(f"python examples/stub.py {{at}}/{folder}", f"{folder}/found.json", ("done",))
        return replace(CLAIMS[0], number=number, name=name, steps={"quick": (step,), "paper": ()},
                       read=lambda at: paper_claims.held(at / folder / "found.json", "done"),
                       judge=CLAIMS[0].judge)  # fmt: skip

    found = [row(1, "one", "a"), row(2, "two", "a"), row(3, "three", "b")]
    for module in (paper, paper_claims, paper_run):
        monkeypatch.setattr(module, "CLAIMS", tuple(found))
    monkeypatch.setattr(paper_run, "root", lambda: place)
    return found


FOUND = curriculum({BROAD: 20})
WRITES = (
    "(OUT / 'runs').open('a').write('x')\nprint('alive', flush=True)\n"
    f"(OUT / 'found.json').write_text({json.dumps(json.dumps({'done': FOUND}))})\n"
)


def test_rows_run_once_are_judged_and_run_again_only_if_forced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any
) -> None:
    stub(tmp_path, monkeypatch, WRITES)
    at = tmp_path / "results"
    told = run("paper", "run", "two", "3", "--results", at)
    assert told.code == 0 and "stub.py" in told.err
    runs = {name: at / "quick" / name / "runs" for name in ("a", "b")}
    assert {name: file.read_text() for name, file in runs.items()} == {"a": "x", "b": "x"}
    again = run("paper", "run", "--results", at, "--json")
    assert all(f"{n}: finished before" in again.err for n in ("1 one", "2 two", "3 three"))
    assert [r["verdict"] for r in json.loads(again.out)["rows"]] == [YES] * 3
    assert {file.read_text() for file in runs.values()} == {"x"}
    (at / "quick" / "a" / "mark").touch()
    forced = run("paper", "run", "one", "--force", "--results", at)
    assert "held the results of 2 too" in forced.err.replace("\n", " ")
    assert not (at / "quick" / "a" / "mark").exists() and runs["a"].read_text() == "x"
    assert runs["b"].read_text() == "x"
    half = at / "quick" / "a" / "found.json"
    half.write_text(json.dumps({"other": 1}))  # another experiment of the folder is finished
    run("paper", "run", "one", "--results", at)
    assert runs["a"].read_text() == "xx"


def test_what_a_command_says_is_seen_as_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stub(tmp_path, monkeypatch, WRITES)
    paper.run(["one"], results=tmp_path / "results")
    assert "alive" in capfd.readouterr().out


def test_what_it_takes_is_told_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any
) -> None:
    rows = stub(tmp_path, monkeypatch, WRITES)
    timed = [replace(row, steps={"quick": tuple(replace(s, minutes=n) for s in row.steps["quick"])})
             for row, n in zip(rows, (70, 70, 50), strict=True)]  # fmt: skip
    for module in (paper, paper_claims, paper_run):
        monkeypatch.setattr(module, "CLAIMS", tuple(timed))
    told = run("paper", "run", "--results", tmp_path / "results").err
    assert "2 commands, about 2 h 0 min of one core in all" in told
    assert told.index("in all") < told.index("about 70 min of one core") < told.index("Done in")
    assert "in all" not in run("paper", "run", "--results", tmp_path / "results").err
    open_ended = paper_run.estimate([*timed[0].steps["quick"], replace(STEPS[0][2], minutes=None)])
    assert open_ended.startswith("at least about 70 min") and not paper_run.estimate([])


def test_every_quick_row_tells_what_it_takes_and_is_within_its_budget() -> None:
    """In minutes of one core; rows 10 to 12 together may take an hour, attribution 40 minutes."""
    within = {"attribution": 40, "recovery": 60, "frontier": 60, "random": 60, "unlearning": 35}
    for claim in CLAIMS:
        each = [step.minutes for step in claim.steps["quick"]]
        assert sum(filter(None, each)) <= within.get(claim.name, 25) and None not in each
    three = {s for claim in CLAIMS[9:12] for s in claim.steps["quick"]}
    assert sum(step.minutes or 0 for step in three) <= 60


def test_a_kill_in_the_middle_leaves_partial_results_that_are_judged_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any
) -> None:
    """The command dies by SIGKILL after one of two rows' experiments; the same call ends it."""
    dies = (
        "import os\nif not (OUT / 'runs').exists():\n    (OUT / 'runs').touch()\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    stub(tmp_path, monkeypatch, dies + WRITES)
    at = tmp_path / "results"
    done = run("paper", "run", "--results", at)
    assert done.code == 2 and "ended with code -9" in done.err.replace("\n", " ")

    def listed() -> list[str]:
        out = run("paper", "list", "--results", at, "--json").out
        return [row["verdict"] for row in json.loads(out)["rows"]]

    assert listed() == ["not run"] * 3
    run("paper", "run", "one", "--results", at)
    assert listed() == [YES, YES, "not run"]
    assert run("paper", "run", "--results", at).code == 2  # the third one dies in its turn
    assert listed() == [YES, YES, "not run"]
    assert run("paper", "run", "--results", at).code == 0
    assert listed() == [YES] * 3


@pytest.mark.parametrize(
    ("code", "says"), [("sys.exit(3)", "ended with code 3"), ("", "lacks what it should hold")]
)
def test_a_command_that_fails_is_named(
    code: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(tmp_path, monkeypatch, code)
    with pytest.raises(NarrowError, match=says):
        paper.run(["one"], results=tmp_path / "results")


def test_a_stopped_run_tells_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    told: list[str] = []

    class Started:
        def wait(self, timeout: float | None = None) -> int:
            told.append("wait")
            if timeout is None:
                raise SystemExit(143)
            raise subprocess.TimeoutExpired("it", timeout) if told.count("wait") == 2 else OSError

        def terminate(self) -> None:
            told.append("terminate")

        def kill(self) -> None:
            told.append("kill")

    with pytest.raises((SystemExit, OSError)):
        paper_run.wait(Started())  # type: ignore[arg-type]
    assert told[:4] == ["wait", "terminate", "wait", "kill"]


def test_names_presets_and_folders_that_are_not_there(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(run("paper", "run", "randon"), "claim 'randon' is unknown", "'random'")
    refused(run("paper", "run", "random", "--preset", "fast"), "preset 'fast' is unknown")
    refused(run("paper", "random"), "To run a claim: paper run NAME.")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paper_run, "__file__", str(tmp_path / "a" / "b" / "paper_run.py"))
    refused(run("paper", "run", "curriculum"), "Clone the repository")
    assert not list(tmp_path.iterdir())


def test_results_of_another_kind_are_refused(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "quick" / "attribution" / "attribution.json"
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    refused(run("paper", "--results", tmp_path), "8 attribution", "--force")
    file.write_text("{")
    refused(run("paper", "--results", tmp_path), "is not readable JSON")


# The page --------------------------------------------------------------------------------------


def test_the_page_says_first_what_does_not_reproduce(run: Any, tmp_path: Path) -> None:
    at = tmp_path / "results" / "quick"
    figures = [{"name": "attribution", "caption": "A point [is] a unit.", "alt": "Many."}]
    for folder, name, found in (
        ("parity-curriculum", "results", {"experiments": {"curriculum": curriculum({BROAD: 20})}}),
        ("attribution", "attribution", {**correlated(0.3, 0.05), "figures": figures}),
        ("lasso-curves", "lasso-curves", curves([0.1] * 4)),
    ):
        (at / folder).mkdir(parents=True)
        (at / folder / f"{name}.json").write_text(json.dumps(found))
    drawn = at / "attribution" / "figures"
    drawn.mkdir()
    (drawn / "attribution.svg").write_text("<svg/>")
    (drawn / "attribution.png").write_bytes(b"0")
    shared = at / "parity-curriculum" / "figures"  # by the claims 1 and 3
    shared.mkdir()
    (shared / "parity-curriculum.svg").write_text("<svg/>")
    page = tmp_path / "docs" / "paper.md"
    beside = tmp_path / "docs" / "paper"
    beside.mkdir(parents=True)
    (beside / "row-9-old.svg").touch()
    (beside / "mine.svg").touch()
    done = run("paper", "page", "--results", tmp_path / "results", "--out", page, "--json")
    assert done.code == 0
    text = page.read_text()
    titles = [line for line in text.splitlines() if line.startswith("#")]
    places = [titles.index(f"## {t}") for t in paper_page.ORDER.values()]
    assert places == sorted(places)
    assert titles[2].startswith("### 8. ")
    assert len([line for line in text.splitlines() if line.startswith("| ")]) > 13
    assert sum(t.startswith("### ") for t in titles) == 13
    section = text[text.index("### 8. ") : text.index("## What is open")]
    assert "**Not reproduced.**" in section
    assert "| Pearson r of neurons, log, by weights | .80 | 0.300 [0.250, 0.350] |" in section
    assert "![A point is a unit. Many.](paper/row-8-attribution.svg)" in section
    assert f"--out {at}/attribution" in section and "Yes: the interval of r lies" in section
    drawings = ["row-1-parity-curriculum.svg", "row-8-attribution.svg"]
    assert sorted(p.name for p in beside.iterdir()) == ["mine.svg", *drawings]
    assert json.loads(done.out)["written"] == [str(page), *(str(beside / d) for d in drawings)]
    assert text.count("](paper/row-1-parity-curriculum.svg)") == 2


def test_results_of_the_papers_setting_come_before_quick_ones(tmp_path: Path) -> None:
    for preset, learned in (("quick", 20), ("paper", 3)):
        place = tmp_path / preset / "parity-curriculum"
        place.mkdir(parents=True)
        found = {"experiments": {"curriculum": curriculum({BROAD: learned})}}
        (place / "results.json").write_text(json.dumps(found))
    (one,) = paper.judged(tmp_path, ["1"]).rows
    assert (one.preset, one.verdict) == ("paper", OPEN)
    (other,) = paper.judged(tmp_path, ["1"], preset="quick").rows
    assert other.verdict == YES and "runs/paper" not in other.commands[0]
    with pytest.raises(UnknownName):
        paper.judged(tmp_path, preset="slow")


# The scripts -----------------------------------------------------------------------------------

attribution, lasso_curves, kept = (PAPER[n] for n in ("attribution", "lasso_curves", "kept"))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_unit_is_gone_within_the_block_and_back_after_it(kind: str) -> None:
    model = tiny(kind)
    before = {name: p.clone() for name, p in model.named_parameters()}
    neurons = next(g for g in find_groups(model) if g.kind == "neurons")
    for group in (neurons, channels.group_of(model)):
        with attribution.without(model, group, 5):
            owned = units.norms(group, dict(model.named_parameters()))
            assert owned[5] == 0 and (owned > 0).sum() == group.size - 1
        assert all(p.equal(before[name]) for name, p in model.named_parameters())


def test_ablations_are_those_of_the_library_and_are_kept(tmp_path: Path) -> None:
    model = tiny("llama", intermediate_size=8)
    groups = [g for g in find_groups(model) if g.kind == "neurons"]
    pairs = attribution.sampled("neurons", groups, 12, seed=0)
    assert len({(g.name, u) for g, u in pairs}) == 12
    assert sorted(sum(g is own for g, _ in pairs) for own in groups) == [6, 6]
    assert len(attribution.sampled("neurons", groups, 16, seed=0)) == 16
    with pytest.raises(BadInput, match="--neurons must be at most 16"):
        attribution.sampled("neurons", groups, 17, seed=0)
    data = [batch("llama", seed=n) for n in (1, 2)]
    done = kept.Rows(tmp_path / "losses.jsonl", "x")

    def quiet(items: Any, what: str) -> Any:
        return items

    found = attribution.ablated(model, pairs, data, done, quiet, "neurons")
    exact = score(model, groups, data, criterion="ablation")
    ours = found.sum(0).float()
    assert ours == pytest.approx([float(exact[g.name][u]) for g, u in pairs], abs=1e-4)
    file = tmp_path / "losses.jsonl"
    lines = file.read_text().splitlines()
    assert len(lines) == 13
    file.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])  # killed in the last write
    made: list[str] = []
    again = kept.Rows(file, "x")
    true_add = again.add
    again.add = lambda key, row: (made.append(key), true_add(key, row))  # type: ignore[method-assign]
    assert attribution.ablated(model, pairs, data, again, quiet, "neurons").equal(found)
    assert made == [f"{pairs[-1][0].name} {pairs[-1][1]}"]
    assert not kept.Rows(file, "another making").done


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_layers_before_a_neurons_own_are_passed_over(kind: str) -> None:
    """To the losses of full passes, exactly; layers before it do not run, and do so again after."""
    model, data = tiny(kind), [batch(kind, seed=n) for n in (1, 2)]
    groups = [g for g in find_groups(model) if g.kind == "neurons"]
    with torch.no_grad():
        short = attribution.Shortened(model, data)
        whole = short.look()
        assert whole == short.losses()
        ran: list[int] = []
        for number, layer in enumerate(short.stack):
            layer.mlp.register_forward_pre_hook(lambda *_, n=number: ran.append(n))
        for number, group in enumerate(groups):
            with attribution.without(model, group, 3):
                full = [float(attribution.language_loss(model, b)) for b in data]
                ran.clear()
                assert short.losses(group) == full != whole
                assert {*ran} == {*range(number, len(groups))}
        assert short.losses() == whole


def test_the_papers_formula_sums_gradient_times_weight() -> None:
    """Over what reads a unit alone it is the library's effect; coupled writers count it again."""
    model, data = tiny("llama"), batch("llama")
    group = next(g for g in find_groups(model) if g.kind == "neurons")
    read = replace(group, writes=())
    both = attribution.by_weights(model, [group], data)[group.name].abs()
    ours = attribution.by_weights(model, [read], data)[group.name].abs()
    theirs = score(model, [group], [data], criterion="paper")[group.name]
    assert ours.tolist() == pytest.approx(theirs.tolist(), rel=1e-3, abs=1e-4)
    assert not both.allclose(theirs, rtol=0.1)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_correlations_and_what_has_no_logarithm() -> None:
    a = torch.tensor([[1.0, -2.0, 4.0, 0.0, 16.0]], dtype=torch.float64)
    found = attribution.correlation(a, a**2, "log", 0)
    assert found["value"] == pytest.approx(1) and found["batches"] == pytest.approx([1])
    raw = attribution.correlation(a, a**2, "raw", 0)
    assert 0.9 < raw["value"] < 1
    assert raw["low"] <= min(raw["batches"]) and raw["high"] >= max(raw["batches"])
    assert attribution.pearson(*attribution.pair(a[0], a[0] * 0, "log")) == 0


def test_attribution_is_a_result_that_is_judged(
    tmp_path: Path, model_folder: Path, domain_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "drawing", PAPER["drawing"])
    out = tmp_path / "quick" / "attribution"
    words = ["--model", str(model_folder), "--domain", str(domain_folder), "--length", "32",
             "--neurons", "9", "--tokens", "64", "--batches", "2", "--out", str(out)]  # fmt: skip
    attribution.main([*words, "--channels", "20"])
    found = json.loads((out / "attribution.json").read_text())
    assert found["about"]["units"] == {"neurons": 9, "channels": 20}
    assert found["about"]["tokens"] == 64 and found["about"]["batches"] == 2
    assert len(found["points"]["channels"]["ablation"]) == 20
    first = len((out / "losses.jsonl").read_text().splitlines())
    attribution.main(words)  # all channels: those that were ablated are not ablated again
    found = json.loads((out / "attribution.json").read_text())
    assert found["about"]["units"] == {"neurons": 9, "channels": 32}
    assert len((out / "losses.jsonl").read_text().splitlines()) == first + 12
    monkeypatch.setattr(kept.Rows, "add", lambda *a: pytest.fail("nothing is ablated again"))
    attribution.main(words)
    (row,) = paper.judged(tmp_path, ["attribution"]).rows
    assert row.judgement is not None and row.told["attribution"].startswith("A point is a unit")
    assert len(paper_page.write(paper.judged(tmp_path), tmp_path / "docs" / "paper.md")) == 2


def test_lasso_curves_train_measure_and_go_on(
    tmp_path: Path, model_folder: Path, domain_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "drawing", PAPER["drawing"])
    monkeypatch.setattr("llm_narrow.checkpoint.verify", lambda *args, **given: 0.0)
    lines: list[str] = []

    def here(line: Sequence[str]) -> None:
        lines.append(shlex.join(line))
        with pytest.raises(SystemExit) as ended:
            cli.main([*line, "--validation-tokens", "64"])
        assert not ended.value.code

    monkeypatch.setattr(lasso_curves, "trained", here)
    out = tmp_path / "quick" / "lasso-curves"
    words = ["--model", str(model_folder), "--domain", str(domain_folder), "--length", "32",
             "--batch-size", "2", "--lasso-tokens", "640", "--calibration-tokens", "128",
             "--held-out-tokens", "128", "--shares", "0.5", "--sparsities", "0.3,0.6",
             "--out", str(out)]  # fmt: skip
    lasso_curves.main(words)
    assert [line.split()[0] for line in lines] == ["recover", "regularize"]
    found = json.loads((out / "lasso-curves.json").read_text())
    models = found["models"]
    assert list(models) == ["none", "trained", "share 0.5"]
    rise = {name: [r["rise"]["value"] for r in m["curve"]] for name, m in models.items()}
    assert {r[0] for r in rise.values()} == {0.0}
    assert rise["none"][1] != 0 and rise["none"][2] != rise["none"][1]
    assert rise["share 0.5"][1] == 0 and rise["share 0.5"][2] != 0  # half is gone already
    monkeypatch.setattr(lasso_curves.Cut, "curve", lambda *a: pytest.fail("measured again"))
    lasso_curves.main(words)
    assert len(lines) == 2
    (row,) = paper.judged(tmp_path, ["9"]).rows
    assert row.judgement is not None
    assert row.judgement.ways[-1].answers[0].says == "yes"  # free by what the lasso took out
    monkeypatch.undo()
    names = [[m["folder"] for m in lasso_curves.models_wanted(lasso_curves.parse(w)).values()]
             for w in (words, [*words, "--lasso-lr", "1e-3"])]  # fmt: skip
    assert not {*names[0][1:]} & {*names[1][1:]}  # another making is another folder


def test_the_small_model_is_one_that_can_be_trained(tmp_path: Path, domain_folder: Path) -> None:
    small = PAPER["small"]
    words = ["--domains", str(domain_folder), "--vocabulary", "300", "--hidden", "16",
             "--megabytes", "0.01", "--out", str(tmp_path / "small")]  # fmt: skip
    small.main(words)
    told = json.loads((tmp_path / "small" / "small.json").read_text())
    loaded = models.load(str(tmp_path / "small" / "fresh"))
    assert sum(p.numel() for p in loaded.model.parameters()) == told["parameters"]
    assert sum(g.size for g in find_groups(loaded.model) if g.kind == "neurons") == 4 * 64
    lines = (tmp_path / "small" / "texts.jsonl").read_text().splitlines()
    texts = [json.loads(line) for line in lines]
    assert 10_000 <= sum(len(t["text"].encode()) for t in texts) < 13_000
    sent = texts[0]["text"]
    assert loaded.tokenizer.decode(loaded.tokenizer.encode(sent)) == sent
    before = (tmp_path / "small" / "small.json").stat().st_mtime_ns
    small.main(words)  # finished before
    assert (tmp_path / "small" / "small.json").stat().st_mtime_ns == before
    with pytest.raises(BadInput, match="multiple of 8"):
        small.parse(["--hidden", "20"])


def test_the_scripts_refuse_what_they_cannot_do() -> None:
    for words, says in (([], "--strengths or --shares"), (["--shares", "1.5"], "below 1"),
                        (["--strengths", "much"], "numbers with commas")):  # fmt: skip
        with pytest.raises(BadInput, match=says):
            lasso_curves.parse(words)
    with pytest.raises(BadInput, match="--batches must be at least 1"):
        attribution.parse(["--batches", "0"])
