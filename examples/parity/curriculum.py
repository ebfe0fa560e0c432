"""Is the composite learned only beside its atomics (figures 2 and 7)? Every arm over all seeds.

The budget ends somewhere: `begun` counts networks on the way there too, since an arm that is only
slower is not one that never learns.

The paper calls a seed converged where the lowest composite loss of the last 100 steps is below 0.1
bits; with few samples a step the lowest of 100 is low by luck, so `learned` here is by the mean of
the same steps. Both are counted, for every arm.

Where the paper has one arm without atomics, at the one learning rate and with smaller batches,
there are more here: the same steps and samples as the broad arm at several learning rates, of which
the best one counts; and atomics that have nothing to do with the composite, which tells a
curriculum from mere variety. Depth is compared with a test, which the paper's counts are without.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import exact
import torch
from network import fresh
from presets import Arm
from task import layout
from train import Trained, measure, train

from llm_narrow.paper_toys import Place

BITS = math.log(2)  # nats
LEARNED = 0.1  # bits
BEGUN = 0.9  # bits, below which a network is at least on the way
POINTS = 120  # of a curve that is kept
MEASURED = 5000  # samples
BROAD, NARROW = "broad", "composite only"
SHALLOW = ("broad, shallow", "broad, shallow and wide")
PAPER = {
    1: {"broad": "27/40", "composite only": "0/40", "samples": 2e9, "learned within": 2e8},
    2: {"seed": 2, "atomics": [1.0e7, 2.3e7], "composite": [4.5e7, 7e7]},
    3: {BROAD: "27/40", SHALLOW[0]: "19/40", SHALLOW[1]: "16/40"},
}


def run(place: Place) -> dict[str, Any]:
    """Train all arms, and compare them."""
    arms = place.preset.curriculum.arms
    parts = {}
    for arm in arms:
        name = f"curriculum-{slug(arm.name)}"
        parts[arm.name] = place.part(name, lambda arm=arm: part(place, arm), place.state(name))
    paper = place.name == "paper"
    return {
        "seeds": list(range(place.preset.curriculum.seeds)),
        "outcomes": parts,
        "tests": tests(parts),
        "verdict_inputs": {
            "1": {"claim": "the composite is learned only beside its atomics",
                  "paper": PAPER[1], "same_setting": paper, "measured": claim_1(parts)},
            "2": {"claim": "the composite is learned after its atomics",
                  "paper": PAPER[2], "same_setting": paper, "measured": claim_2(parts)},
            "3": {"claim": "depth helps", "paper": PAPER[3], "same_setting": paper,
                  "measured": claim_3(parts),
                  "paper_p": {SHALLOW[0]: exact.fisher(27, 40, 19, 40),
                              SHALLOW[1]: exact.fisher(27, 40, 16, 40)}},
        },
    }  # fmt: skip


def slug(name: str) -> str:
    """A name as part of a file name."""
    return "".join(c if c.isalnum() else "-" for c in name).replace("--", "-")


def part(place: Place, arm: Arm) -> dict[str, Any]:
    """Train one arm: all its seeds at once."""
    seeds = list(range(place.preset.curriculum.seeds))
    nets = fresh(arm.task.inputs, [arm.width] * (arm.depth - 1), seeds)
    asked = layout(arm.task, [arm.codes], arm.per_code, place.device)
    done = train(
        nets, asked, torch.tensor(seeds), arm.training,
        state=place.state(f"curriculum-{slug(arm.name)}"), save_every=place.save_every,
        track=place.track, what=arm.name,
    )  # fmt: skip
    after = measure(
        done.nets, layout(arm.task, [arm.codes], MEASURED, place.device), torch.tensor(seeds)
    )
    return {
        "parameters": arm.parameters,
        "samples": arm.samples,
        "settings": asdict(arm),
        "seconds": round(done.seconds, 1),
        **outcomes(arm, done),
        "accuracy": after.accuracy[:, -1].tolist(),  # of the composite, on fresh samples
        "curves": curves(arm, done),
    }


def outcomes(arm: Arm, done: Trained) -> dict[str, list[Any]]:
    """What became of each seed: by the paper's rule and by the mean, and when each code fell."""
    mean, least = done.mean / BITS, done.least / BITS  # (points, networks, codes)
    at = samples_at(arm, len(mean))
    below = mean < LEARNED
    first = below.to(torch.int8).argmax(0)  # 0 where never
    fell = [
        [at[first[n, c]] if bool(below[:, n, c].any()) else None for c in range(mean.shape[2])]
        for n in range(mean.shape[1])
    ]
    return {
        "converged": (least[-1, :, -1] < LEARNED).tolist(),
        "learned": below[-1, :, -1].tolist(),
        "begun": (mean[-1, :, -1] < BEGUN).tolist(),
        "loss_bits": mean[-1, :, -1].tolist(),
        "samples_to_learn": fell,  # of each code, the composite last
    }


def samples_at(arm: Arm, points: int) -> list[int]:
    """Samples seen by the end of each point of the curves, of all codes together."""
    a_step = arm.samples // arm.training.steps
    return [min((p + 1) * arm.training.window, arm.training.steps) * a_step for p in range(points)]


def curves(arm: Arm, done: Trained) -> dict[str, Any]:
    """Losses in bits: of the composite for all seeds, and of all codes for the seed shown."""
    points = len(done.mean)
    rows = sorted({round(i * (points - 1) / (POINTS - 1)) for i in range(POINTS)})
    at, mean = samples_at(arm, points), done.mean[rows] / BITS
    # The paper shows seed 2; here it is the first that learned, if any did.
    shown = next((n for n, x in enumerate(mean[-1, :, -1].tolist()) if x < LEARNED), 0)
    return {
        "samples": [at[r] for r in rows],
        "composite": mean[:, :, -1].T.tolist(),
        "shown_seed": shown,
        "shown": mean[:, shown].T.tolist(),
    }


def learned(part: Mapping[str, Any], rule: str = "learned") -> tuple[int, int]:
    """How many seeds of how many."""
    return sum(part[rule]), len(part[rule])


def tests(parts: Mapping[str, Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Every arm against the broad one, by both rules."""
    found = []
    for rule in ("learned", "converged", "begun"):
        whole = learned(parts[BROAD], rule)
        for name, arm in parts.items():
            if name != BROAD:
                counts = [*whole, *learned(arm, rule)]
                found.append(
                    exact.tested(
                        "Fisher's exact, two-sided", exact.fisher(*counts),
                        rule=rule, arms=[BROAD, name], counts=counts,
                    )
                )  # fmt: skip
    return found


def claim_1(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Counts of the broad arm, the paper's narrow one, the best narrow one, the strange atomics."""
    narrow = {name: learned(arm) for name, arm in parts.items() if name.startswith(NARROW)}
    best = max(narrow, key=lambda name: narrow[name][0])
    whole = learned(parts[BROAD])
    fell = [row[-1] for row, yes in zip(parts[BROAD]["samples_to_learn"], parts[BROAD]["learned"],
                                        strict=True) if yes]  # fmt: skip
    others = {"paper's way": NARROW, "best learning rate": best, "other atomics": "other atomics"}
    return {
        BROAD: exact.share(*whole),
        "begun": {name: sum(arm["begun"]) for name, arm in parts.items()},
        **{label: {"arm": name, **exact.share(*learned(parts[name])),
                   "p": exact.fisher(*whole, *learned(parts[name])),
                   "samples": parts[name]["samples"]}
           for label, name in others.items()},
        "samples": parts[BROAD]["samples"],
        "samples_to_learn": exact.middle(fell),
        "by the paper's rule": {name: "/".join(map(str, learned(arm, "converged")))
                                for name, arm in parts.items()},
    }  # fmt: skip


def claim_2(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """When atomics and composite fell, in the seeds of the broad arm that learned all of them."""
    rows = [row for row in parts[BROAD]["samples_to_learn"] if None not in row]
    after = [row[-1] > max(row[:-1]) for row in rows]
    before = [row[-1] < max(row[:-1]) for row in rows]
    return {
        "seeds": len(rows),
        "after_all_atomics": sum(after),
        "sign_test_p": exact.sign_test(sum(after), sum(after) + sum(before)),
        "last_atomic": exact.middle([max(row[:-1]) for row in rows]),
        "composite": exact.middle([row[-1] for row in rows]),
        "ratio": exact.middle([row[-1] / max(row[:-1]) for row in rows]),
    }


def claim_3(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The deep arm and the two shallow ones."""
    found = {}
    for name in (BROAD, *SHALLOW):
        found[name] = {"parameters": parts[name]["parameters"],
                       **exact.share(*learned(parts[name])),
                       "begun": sum(parts[name]["begun"])}  # fmt: skip
        for rule in ("learned", "begun") if name != BROAD else ():
            p = exact.fisher(*learned(parts[BROAD], rule), *learned(parts[name], rule))
            found[name][f"{rule}_p"] = p
    return found
