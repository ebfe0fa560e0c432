"""What is left of a network's skills when units go (figures 3, left, and 10), by width and seed.

Networks that know two composites lose units by their price for the first, and are then trained for
a while on the first ("kept") or on the second ("other"): a skill that comes back is still there in
part. Beside the paper's way (absolute prices, all layers together with no floor), the library's
(signed prices, a unit in every layer), random units, and fresh networks of the same shapes, which
tell what the training alone would teach.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import exact
import torch
from ablation import WAYS, decisions, prices
from network import Networks, fresh
from recovering import jobs, recovered, selected
from task import layout
from train import measure, train

from llm_narrow.paper_toys import Place

GOOD = 0.98  # accuracy
PAPER_LIMITS = {
    64: [0.47, 0.44, 0.48, 0.48, 0.52], 128: [0.78, 0.80, 0.76, 0.74, 0.60],
    256: [0.88, 0.90, 0.92, 0.89, 0.82], 512: [0.95, 0.95, 0.93, 0.95, 0.94],
    1024: [0.97, 0.98, 0.96, 0.97, 0.97],
}  # fmt: skip
PAPER_OTHER = {0.54: 1.0, 0.74: 0.97, 0.80: 0.92, 0.86: 0.86, 0.90: 0.74}  # width 256, seed 1


def run(place: Place) -> dict[str, Any]:
    """Every width in turn, its seeds side by side."""
    setting = place.preset.pruning
    parts = {str(width): place.part(f"pruning-w{width}", lambda width=width: part(place, width))
             for width in setting.training}  # fmt: skip
    return {
        "seeds": list(range(setting.seeds)),
        "outcomes": parts,
        "tests": tests(parts),
        "verdict_inputs": {
            "4": {"claim": "the limit of pruning grows with width, and recovery is needed",
                  "paper": PAPER_LIMITS, "same_setting": place.name == "paper",
                  "measured": claim_4(parts)},
            "5": {"claim": "the other composite is recoverable from units kept for the first",
                  "paper": PAPER_OTHER, "same_setting": place.name == "paper",
                  "measured": claim_5(parts)},
        },
    }  # fmt: skip


def pretrained(place: Place, width: int) -> Networks:
    """Whole networks of one width; trained where that is not done yet."""
    setting = place.preset.pruning
    seeds = list(range(setting.seeds))
    nets = fresh(setting.task.inputs, [width] * (setting.depth - 1), seeds)
    asked = layout(setting.task, [setting.codes], setting.per_code, place.device)
    done = train(
        nets, asked, torch.tensor(seeds), setting.training[width],
        state=place.state(f"pretrained-w{width}"), save_every=place.save_every,
        track=place.track, what=f"whole networks, {width} wide",
    )  # fmt: skip
    return done.nets


def part(place: Place, width: int) -> dict[str, Any]:
    """All that is measured of one width."""
    setting = place.preset.pruning
    seeds = list(range(setting.seeds))
    nets = pretrained(place, width)
    known = measure(
        nets, layout(setting.task, [setting.codes], setting.measured_samples, place.device),
        torch.tensor(seeds),
    )  # fmt: skip
    price = prices(
        nets, layout(setting.task, [[setting.kept]], setting.score_samples, place.device),
        torch.tensor(seeds, device=place.device), entries=place.preset.entries,
    )  # fmt: skip
    tasks = {"kept": setting.kept, "other": setting.other}
    todo = []
    for way in WAYS:
        keep = decisions(nets, price, setting.sparsities, way, seeds)
        about: dict[str, Any] = {"seeds": seeds, "way": way, "sparsities": setting.sparsities}
        if way == "paper":
            todo += jobs(keep, tasks=tasks, **about)
            todo += jobs(keep, tasks={"other": setting.other}, fresh=True, **about)
        else:  # of which only the limits are asked
            todo += jobs(keep, tasks={"kept": setting.kept}, **about)
    rows = recovered(place, f"pruned-w{width}", nets, todo, setting.task, setting.recovery,
                     samples=setting.measured_samples)  # fmt: skip
    for row in rows:
        row.pop("losses")
    accuracy = known.accuracy[:, -2:].tolist()
    return {
        "hidden": sum(len(p[0]) for p in price),
        "whole": {"kept": [a for a, _ in accuracy], "other": [b for _, b in accuracy],
                  "loss": known.loss.tolist()},
        "limits": {way: {field: limits(selected(rows, way=way, trained_on="kept"), seeds, field)
                         for field in ("before", "after", "last_batch")} for way in WAYS},
        "rows": rows,
    }  # fmt: skip


def limits(rows: Sequence[dict[str, Any]], seeds: Sequence[int], field: str) -> dict[str, Any]:
    """By seed, the largest sparsity with an accuracy of GOOD, and the one up to which all have it.

    0 where none has; `left` is the number of units at the largest.
    """
    found: dict[str, list[float]] = {"largest": [], "unbroken": [], "left": []}
    for seed in seeds:
        mine = sorted(selected(rows, seed=seed), key=lambda row: row["sparsity"])
        good = [row for row in mine if row[field] >= GOOD]
        bad = [row["sparsity"] for row in mine if row[field] < GOOD]
        unbroken = [row["sparsity"] for row in good if not bad or row["sparsity"] < min(bad)]
        found["largest"].append(good[-1]["sparsity"] if good else 0.0)
        found["unbroken"].append(unbroken[-1] if unbroken else 0.0)
        found["left"].append(sum(good[-1]["left"]) if good else None)  # type: ignore[arg-type]
    return found


def able(part: Mapping[str, Any], *codes: str) -> list[int]:
    """The places of the seeds whose whole network knows the codes."""
    return [n for n, all_ in enumerate(zip(*(part["whole"][c] for c in codes), strict=True))
            if min(all_) >= GOOD]  # fmt: skip


def tests(parts: Mapping[str, Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What recovery is worth, whether scores beat chance, and whether width helps."""
    found = []
    for what, one, two in (
        ("recovery against none", ("paper", "after"), ("paper", "before")),
        ("by price against at random", ("paper", "after"), ("random", "after")),
        ("signed prices against absolute", ("signed", "after"), ("paper", "after")),
    ):
        pairs = [
            (part["limits"][one[0]][one[1]]["largest"][n],
             part["limits"][two[0]][two[1]]["largest"][n])
            for part in parts.values() for n in able(part, "kept")
        ]  # fmt: skip
        above, below = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
        found.append(exact.tested("sign test, two-sided", exact.sign_test(above, above + below),
                                  of=f"largest sparsity: {what}", above=above, below=below,
                                  equal=len(pairs) - above - below))  # fmt: skip
    rows = by_seed(parts)
    if rows and len(parts) > 1:
        found.append(exact.tested("Page's trend over widths, one-sided", exact.trend(rows),
                                  of="largest sparsity after recovery", rows=rows))  # fmt: skip
    return found


def by_seed(parts: Mapping[str, Mapping[str, Any]]) -> list[list[float]]:
    """The limits of the seeds that know the kept code at every width, widths rising."""
    known = set.intersection(*(set(able(part, "kept")) for part in parts.values()))
    return [[part["limits"]["paper"]["after"]["largest"][n] for part in parts.values()]
            for n in sorted(known)]  # fmt: skip


def claim_4(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Limits and units left, by width, of the networks that knew the kept code."""
    found: dict[str, Any] = {}
    for width, part in parts.items():
        known = able(part, "kept")

        def of(way: str, field: str, what: str, part: Any = part, known: Any = known) -> Any:
            values = part["limits"][way][field][what]
            return exact.mean([values[n] for n in known if values[n] is not None])

        found[width] = {
            "networks": len(known),
            "with recovery": of("paper", "after", "largest"),
            "with recovery, unbroken": of("paper", "after", "unbroken"),
            "without recovery": of("paper", "before", "unbroken"),
            "units left": of("paper", "after", "left"),
            "signed prices": of("signed", "after", "largest"),
            "random units": of("random", "after", "largest"),
        }
    rows = by_seed(parts)
    return {"widths": found, "trend_p": exact.trend(rows) if rows and len(parts) > 1 else None}


def claim_5(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracy on the other code after recovery, cut and fresh, by width and sparsity."""
    found: dict[str, Any] = {}
    for width, part in parts.items():
        known = able(part, "kept", "other")
        at: dict[str, Any] = {}
        for sparsity in sorted({row["sparsity"] for row in part["rows"]}):
            here = selected(part["rows"], sparsity=sparsity, trained_on="other")
            pair = [by_place(selected(here, way=way), "after", known) for way in ("paper", "fresh")]
            above = sum(a > b for a, b in zip(*pair, strict=True))
            below = sum(a < b for a, b in zip(*pair, strict=True))
            before = by_place(selected(here, way="paper"), "before", known)
            at[str(sparsity)] = {
                "recovered": exact.mean(pair[0]), "fresh": exact.mean(pair[1]),
                "before": exact.mean(before), "above": above, "below": below,
            }  # fmt: skip
        found[width] = {"networks": len(known), "sparsities": at}
    return {"widths": found}


def by_place(rows: Sequence[dict[str, Any]], field: str, known: Sequence[int]) -> list[float]:
    """A field of the rows of the known seeds, in their order."""
    return [row[field] for n in known for row in selected(rows, seed=n)]
