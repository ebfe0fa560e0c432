"""What the two ways say of the paper's claim, beside its numbers, and where they differ."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import exact
from presets import METHODS

from llm_narrow.errors import BadInput
from llm_narrow.paper_toys import Place

Found = Mapping[str, Any]

# Examples of training until 97 % of the even digits by hidden units, as figure 4 shows them.
PAPER: Mapping[str, Mapping[int, float]] = {
    "scratch": {30: 53_200, 50: 35_800, 100: 23_600, 160: 21_300, 280: 17_500, 400: 16_000,
                600: 15_500, 800: 14_900, 1200: 13_900, 1600: 14_200, 2000: 14_500, 2400: 15_000},
    "distillation": {30: 42_400, 50: 22_400, 70: 17_300, 90: 16_200, 130: 14_500, 200: 13_600,
                     280: 13_000, 400: 12_200, 600: 11_600, 800: 11_500, 1200: 11_200,
                     1600: 11_200, 2000: 10_700, 2400: 10_800},
    "attribution": {24: 50_700, 29: 37_200, 49: 19_200, 99: 13_800, 189: 7_700, 241: 7_100,
                    399: 4_900, 596: 2_700, 797: 2_300, 1190: 1_640},
    "lasso": {24: 30_200, 29: 29_600, 34: 24_400, 36: 20_200, 46: 20_700, 65: 17_700, 87: 14_000,
              120: 12_400, 198: 9_500, 257: 11_100, 285: 9_500, 365: 7_200, 410: 6_100, 468: 6_200,
              542: 5_900, 767: 3_500, 934: 3_700, 1179: 1_840},
}  # fmt: skip
PAIRS = (("lasso", "scratch"), ("lasso", "distillation"), ("attribution", "scratch"),
         ("attribution", "distillation"), ("distillation", "scratch"),
         ("lasso", "attribution"))  # fmt: skip
SURE = 0.05


def run(place: Place) -> dict[str, Any]:
    """Both ways beside each other. Raises BadInput where one of them has not been run."""
    done = place.results()["experiments"]
    if missing := [name for name in place.preset.ways if name not in done]:
        raise BadInput(f"compared needs {' and '.join(missing)}, not finished in {place.out}. "
                       "Run without --only, or these first.")  # fmt: skip
    ways = {name: done[name] for name in place.preset.ways}
    buckets = {str(size): bucket(ways, size) for size in place.preset.buckets}
    changes = [change(size, pair, found) for size, found in buckets.items() for pair in PAIRS]
    return {
        "runs": {name: {method: place.preset.ways[name].arms[method].runs for method in METHODS}
                 for name in ways},
        "outcomes": buckets,
        "lines": {name: lines(way) for name, way in ways.items()},
        "paper": PAPER,
        "tests": [{"way": name, "size": int(size), **test} for size, found in buckets.items()
                  for name in ways for test in found[name]["tests"]],
        "changes": changes,
        "verdict_inputs": {
            "7": {"claim": "pruned networks take fewer examples than distilled ones and ones from "
                           "scratch to 97 % of the even digits, at every size",
                  "paper": {size: found["paper's numbers"] for size, found in buckets.items()},
                  "same_setting": place.name == "paper",
                  "measured": {name: {size: {"methods": found[name]["methods"],
                                             "tests": found[name]["tests"],
                                             "pruned_is_better": better(found[name])}
                                      for size, found in buckets.items()} for name in ways},
                  "teachers": {name: way["teacher"] for name, way in ways.items()},
                  "changes": [c for c in changes if c["changed"]]},
        },
    }  # fmt: skip


def bucket(ways: Mapping[str, Found], size: int) -> dict[str, Any]:
    """One size: in each way the methods at their size nearest to it, and tests between them."""
    found: dict[str, Any] = {"paper's numbers": {m: nearest(PAPER[m], size) for m in METHODS}}
    for name, way in ways.items():
        at = {m: at_size(way, m, size) for m in METHODS}
        found[name] = {"methods": at, "tests": [between(at, *pair) for pair in PAIRS]}
    return found


def nearest(line: Mapping[int, float], size: int) -> dict[str, float]:
    """The point of a line whose number of units is nearest by ratio."""
    units = min(line, key=lambda n: abs(math.log(n / size)))
    return {"neurons": units, "examples": line[units]}


def at_size(way: Found, method: str, size: int) -> dict[str, Any]:
    """A method's number, by the way's rule, where its units are nearest to the size by ratio."""
    sizes = way["outcomes"][method]["sizes"]
    held = min(sizes.values(), key=lambda s: abs(math.log(s["neurons"]["value"] / size)))
    told = held[way["rule"]]
    return {
        "neurons": held["neurons"]["value"], "examples": told["value"], "low": told["low"],
        "high": told["high"], "rule": way["rule"], "failed": held["failed"]["count"],
        "runs": held["failed"]["of"], "cap": held["cap"], "every": held["every"],
        "config": held["config"], "values": held["examples"],
        "test_accuracy_when_stopped": held["test_accuracy_when_stopped"]["value"],
    }  # fmt: skip


def between(at: Mapping[str, Found], one: str, two: str) -> Mapping[str, Any]:
    """Which of two methods takes fewer examples, by how much, and whether that may be chance."""
    a, b = at[one]["examples"], at[two]["examples"]
    runs = [at[m]["values"] for m in (one, two)]
    known = a is not None and b is not None
    fewer = None
    if known and a != b:
        fewer = one if a < b else two
    elif not known and (a is None) != (b is None):
        fewer = two if a is None else one
    return exact.tested(
        "Wilcoxon's rank sum, exact, two-sided", exact.rank_sum(*runs), methods=[one, two],
        fewer=fewer, factor=b / a if known and a else None,
    )  # fmt: skip


def better(found: Found) -> dict[str, Any]:
    """Whether the better of the pruned ones takes fewer examples than each of the others."""
    told = {tuple(test["methods"]): test for test in found["tests"]}
    answer = {}
    for other in ("distillation", "scratch"):
        tests = {pruned: told[pruned, other] for pruned in ("lasso", "attribution")}
        answer[f"than {other}"] = {
            pruned: {"fewer": test["fewer"] == pruned, "p": test["p"], "factor": test["factor"],
                     "sure": test["fewer"] == pruned and test["p"] < SURE}
            for pruned, test in tests.items()
        }  # fmt: skip
    return answer


def change(size: str, pair: tuple[str, str], found: Found) -> dict[str, Any]:
    """What each way says of two methods at a size, and whether that is the same."""
    said = {}
    for name in (key for key in found if key != "paper's numbers"):
        test = next(t for t in found[name]["tests"] if tuple(t["methods"]) == pair)
        sure = test["p"] < SURE and test["fewer"] is not None
        says = f"{test['fewer']} takes fewer" if sure else "no sure difference"
        said[name] = {"fewer": test["fewer"], "p": test["p"], "factor": test["factor"],
                      "says": says}  # fmt: skip
    return {"size": int(size), "methods": list(pair), "ways": said,
            "changed": len({s["says"] for s in said.values()}) > 1}  # fmt: skip


def lines(way: Found) -> dict[str, list[dict[str, Any]]]:
    """Every size of every method, as the figure draws it, by rising numbers of units."""
    found = {}
    for method in METHODS:
        sizes: Sequence[Found] = list(way["outcomes"][method]["sizes"].values())
        points = [{"neurons": s["neurons"]["value"], "cap": s["cap"],
                   "failed": s["failed"]["count"], "runs": s["failed"]["of"],
                   **{key: s[way["rule"]][key] for key in ("value", "low", "high")}}
                  for s in sizes]  # fmt: skip
        found[method] = sorted(points, key=lambda p: p["neurons"])
    return found
