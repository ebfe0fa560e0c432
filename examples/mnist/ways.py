"""All methods under one way: the teacher, the cells, and what each method takes at each size.

A cell is one method at one size; of the lasso at all sizes, which its networks pass on their way.
Where configurations are chosen on runs of their own there are two: `choose` and `told`.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import choosing
import exact
from digits import floats, split
from methods import Asked, start
from presets import Arm, Way
from race import Field, Raced, Row, race
from teacher import accuracy, logits, trained
from torch import nn

from llm_narrow.paper_toys import Place

CHOOSING = 100  # added to the seeds of runs that only choose


def run(place: Place, name: str) -> dict[str, Any]:
    """One way, all of it."""
    way = place.preset.ways[name]
    parts = split(place.digits, way.held_out) if way.held_out else None
    test = floats(place.digits.test).to(place.device)
    judged = floats(parts[1]).to(place.device) if parts else test
    part = floats(parts[0] if parts else place.digits.train).to(place.device)
    teacher = trained(
        part, judged, place.preset.teacher, state=place.state(f"{name}-teacher"),
        made_by={"digits": place.digits.sha256, "held_out": way.held_out},
        save_every=place.save_every, track=place.track,
    )  # fmt: skip
    facts = place.part(f"{name}-teacher", lambda: {
        "accuracy": {"test": accuracy(teacher, test), "judged": accuracy(teacher, judged)},
        "even": {"test": accuracy(teacher, test.even()),
                 "judged": accuracy(teacher, judged.even())},
        "digits": len(part), "even_digits": len(part.even()), "judged": len(judged.even()),
    })  # fmt: skip
    even, judged, test = part.even(), judged.even(), test.even()
    field = Field(even, judged, test, place.preset.goal, place.preset.entries,
                  logits(teacher, even))  # fmt: skip
    methods = {method: _method(place, name, method, field, teacher) for method in way.arms}
    return {"way": name, "rule": way.rule, "judged_on": "validation" if parts else "test",
            "teacher": facts, "outcomes": methods}  # fmt: skip


def _method(
    place: Place, name: str, method: str, field: Field, teacher: nn.Sequential
) -> dict[str, Any]:
    """All sizes of a method, with the curves that were watched."""
    arm = place.preset.ways[name].arms[method]
    together = [arm.sizes] if method == "lasso" else [(size,) for size in arm.sizes]
    sizes: dict[str, Any] = {}
    curves: list[Row] = []
    for some in together:
        label = f"{name}-{method}" + ("" if method == "lasso" else f"-{some[0]}")
        picked, chose, told = _cells(place, name, method, some, label, field, teacher)
        curves += told["curves"]
        for size in some:
            sizes[str(size)] = summary(arm, place.preset.ways[name], size, picked[size],
                                       chose["rows"], told["rows"])  # fmt: skip
    return {"settings": asdict(arm.training), "configs": [asdict(c) for c in arm.configs],
            "sizes": sizes, "curves": thinned(curves) if method == "lasso" else []}  # fmt: skip


def _cells(
    place: Place, name: str, method: str, sizes: Sequence[int], label: str, field: Field,
    teacher: nn.Sequential,
) -> tuple[dict[int, int], dict[str, Any], dict[str, Any]]:  # fmt: skip
    """The configuration chosen for each size, the rows it was chosen by, and those told."""
    way = place.preset.ways[name]
    arm = way.arms[method]
    cap, every = arm.training.most, range(len(arm.configs))
    separate = arm.choosing > 0 and len(arm.configs) > 1

    def cell(cell_name: str, asked: Asked, ends: bool, chooses: bool) -> dict[str, Any]:
        def made() -> dict[str, Any]:
            lost = choosing.losing(len(arm.configs), sizes, way.rule, cap, ends=ends)
            watched = asked.seeds[:1] if method == "lasso" and not ends else ()
            done: Raced = race(
                field, arm.training, lambda: start(asked, field.train, teacher),
                lost=lost if chooses else None, watched=watched, state=place.state(cell_name),
                made_by={"cell": cell_name, "digits": place.digits.sha256,
                         "goal": field.goal, "seeds": list(asked.seeds),
                         "sizes": {str(c): list(s) for c, s in asked.sizes.items()},
                         "configs": [asdict(c) for c in arm.configs]},
                save_every=place.save_every, track=place.track, what=cell_name,
            )  # fmt: skip
            return {"rows": done.rows, "curves": done.curves}

        return dict(place.part(cell_name, made, place.state(cell_name)))

    seeds = range(CHOOSING, CHOOSING + arm.choosing) if separate else range(arm.runs)
    asked = Asked(method, way, dict.fromkeys(every, tuple(sizes)), seeds)
    chose = cell(f"{label}-choose" if separate else label, asked, separate, len(arm.configs) > 1)
    picked = {size: choosing.chosen(chose["rows"], len(arm.configs), size, way.rule, cap)
              for size in sizes}  # fmt: skip
    if not separate:
        return picked, chose, chose
    of = {c: tuple(s for s in sizes if picked[s] == c) for c in every}
    asked = Asked(method, way, {c: s for c, s in of.items() if s}, range(arm.runs))
    return picked, chose, cell(label, asked, False, False)


def summary(
    arm: Arm, way: Way, size: int, config: int, chose: Sequence[Row], told: Sequence[Row]
) -> dict[str, Any]:
    """What a method takes at a size: mean and median of its runs, whatever the way's rule is."""
    rows = choosing.of(told, config, size)
    examples = [row["examples"] for row in rows]
    # A lasso run that failed may have many units left; it says nothing of the size it was to have.
    neurons = [row["neurons"] for row in rows if row["examples"] is not None] or [size]
    judged = [row["accuracy"] for row in rows if row["examples"] is not None]
    test = [row["told"] for row in rows if row["examples"] is not None]
    return {
        "config": asdict(arm.configs[config]), "cap": arm.training.most,
        "every": arm.training.every,
        "neurons": exact.mean(neurons, 0.0), "examples": examples,
        "mean": exact.mean(examples, arm.training.most), "median": exact.median(examples),
        "failed": exact.share(sum(e is None for e in examples), len(examples)),
        "accuracy_when_stopped": exact.mean(judged, 0.0),
        "test_accuracy_when_stopped": exact.mean(test, 0.0),
        "tried": [{**asdict(c), "examples": [r["examples"] for r in choosing.of(chose, n, size)],
                   "given_up": [r["given_up"] for r in choosing.of(chose, n, size)]}
                  for n, c in enumerate(arm.configs)],
        "rows": rows,
    }  # fmt: skip


def thinned(curves: Sequence[Row], most: int = 400) -> list[Row]:
    """Curves of every run that was watched, at most so many rows in all."""
    step = max(1, -(-len(curves) // most))
    ordered = sorted(curves, key=lambda r: (r["config"], r["target"] is None, r["target"] or 0,
                                            r["examples"]))  # fmt: skip
    return list(ordered[::step])

