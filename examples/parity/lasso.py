"""Does the group lasso put one skill into units of its own, and unlearn the rest (figure 3, right)?

Whole networks are trained on the kept code alone: with the paper's penalty in the loss, with the
library's proximal step (exact zeros), and with no penalty at all, for as many steps: without that
arm nobody can tell what the penalty does from what narrow training does. Then they are cut and
recovered as in `pruning`.

That the other code does not come back in the recovery means unlearning only if it would not come
to a fresh network so soon either; so both are trained for longer too, and the question is who
learns it first.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import exact
import torch
from ablation import decisions, prices
from network import Networks, squares
from presets import Recovery
from pruning import GOOD, by_place, limits, pretrained
from recovering import jobs, recovered, selected
from task import layout
from train import measure, train

from llm_narrow.paper_toys import Place

BEFORE, NONE, PAPERS = "before", "none", "gradient"
FAIR = 0.9  # accuracy at which a code counts as known again
LEARNED = 0.1 * math.log(2)  # nats
PAPER = {"kept without recovery, to": 0.95, "kept with recovery, to": 0.97,
         "other after recovery, at every sparsity": 0.5}  # fmt: skip


def run(place: Place) -> dict[str, Any]:
    """Every arm, and the networks before any of them."""
    arms = [BEFORE, *place.preset.lasso.arms]
    parts = {arm: place.part(f"lasso-{arm}", lambda arm=arm: part(place, arm),
                             place.state(f"lasso-{arm}")) for arm in arms}  # fmt: skip
    seeds = list(range(place.preset.pruning.seeds))
    known = [n for n in seeds if min(parts[BEFORE]["whole"]["kept"][n],
                                     parts[BEFORE]["whole"]["other"][n]) >= GOOD]  # fmt: skip
    return {
        "seeds": seeds,
        "outcomes": parts,
        "tests": tests(parts, known),
        "verdict_inputs": {
            "6": {"claim": "the group lasso aligns the kept skill with units and unlearns the rest",
                  "paper": PAPER, "same_setting": place.name == "paper",
                  "measured": claim_6(parts, known)},
        },
    }  # fmt: skip


def trained(place: Place, arm: str) -> Networks:
    """The whole networks of the width, and then the training of the arm."""
    setting, lasso = place.preset.pruning, place.preset.lasso
    nets = pretrained(place, lasso.width)
    if arm == BEFORE:
        return nets
    done = train(
        nets, layout(setting.task, [[setting.kept]], lasso.samples, place.device),
        torch.arange(setting.seeds), lasso.arms[arm],
        state=place.state(f"lasso-{arm}"), save_every=place.save_every, track=place.track,
        what=f"kept code alone, {arm}",
    )  # fmt: skip
    return done.nets


def part(place: Place, arm: str) -> dict[str, Any]:
    """All that is measured of one arm."""
    setting, lasso = place.preset.pruning, place.preset.lasso
    seeds = list(range(setting.seeds))
    nets = trained(place, arm)
    both = measure(
        nets,
        layout(setting.task, [[setting.kept, setting.other]], setting.measured_samples,
               place.device),
        torch.tensor(seeds),
    ).accuracy  # fmt: skip
    norms = torch.cat([s.sqrt() for s in squares(nets)], dim=1)
    price = prices(
        nets, layout(setting.task, [[setting.kept]], setting.score_samples, place.device),
        torch.tensor(seeds, device=place.device), entries=place.preset.entries,
    )  # fmt: skip
    tasks = {"kept": setting.kept, "other": setting.other}

    def rows(name: str, at: Sequence[float], recovery: Recovery, **asked: Any) -> Any:
        keep = decisions(nets, price, at, "paper", seeds)
        todo = []
        for fresh in (False, True) if asked.pop("and_fresh", False) else (False,):
            todo += jobs(keep, seeds=seeds, way=arm, sparsities=at, fresh=fresh, **asked)
        return recovered(place, name, nets, todo, setting.task, recovery,
                         samples=setting.measured_samples)  # fmt: skip

    short = rows(f"lasso-cut-{arm}", lasso.sparsities, setting.recovery, tasks=tasks)
    longer = rows(f"lasso-longer-{arm}", lasso.longer_at, lasso.longer,
                  tasks={"other": setting.other}, and_fresh=True)  # fmt: skip
    a_point = lasso.longer.training.window * lasso.longer.samples
    for row in short:
        row.pop("losses")
    for row in longer:
        row["samples_to_learn"] = samples_to_learn(row.pop("losses"), a_point)
    kept = selected(short, trained_on="kept")
    return {
        "whole": {"kept": both[:, 0].tolist(), "other": both[:, 1].tolist()},
        "zero_share": (norms == 0).float().mean(1).tolist(),
        "norms": norms.sort(dim=1).values.tolist(),
        "limits": {field: limits(kept, seeds, field) for field in ("before", "after")},
        "rows": short,
        "longer": longer,
    }  # fmt: skip


def samples_to_learn(losses: Sequence[float], a_point: int) -> int | None:
    """Samples until the loss of a window is below 0.1 bits; None where it never is."""
    good = [n for n, loss in enumerate(losses, 1) if loss < LEARNED]
    return good[0] * a_point if good else None


def tests(
    parts: Mapping[str, Mapping[str, Any]], known: Sequence[int]
) -> list[Mapping[str, Any]]:
    """At each sparsity: networks in which the other code came back, of each arm beside `before`."""
    found = []
    for sparsity in sorted({row["sparsity"] for row in parts[BEFORE]["rows"]}):
        back = {arm: came_back(part, known, sparsity) for arm, part in parts.items()}
        for one, two in ((BEFORE, PAPERS), (NONE, PAPERS), (BEFORE, NONE), (BEFORE, "proximal")):
            counts = [back[one], len(known), back[two], len(known)]
            found.append(exact.tested(
                "Fisher's exact, two-sided", exact.fisher(*counts),
                of=f"other code at {FAIR} or more after recovery", sparsity=sparsity,
                arms=[one, two], counts=counts))  # fmt: skip
    return found


def came_back(part: Mapping[str, Any], known: Sequence[int], sparsity: float) -> int:
    """In how many networks the other code came back."""
    rows = selected(part["rows"], sparsity=sparsity, trained_on="other")
    return sum(accuracy >= FAIR for accuracy in by_place(rows, "after", known))


def claim_6(parts: Mapping[str, Mapping[str, Any]], known: Sequence[int]) -> dict[str, Any]:
    """How far each arm can be cut, what of the other code comes back, and how soon."""
    found: dict[str, Any] = {}
    for arm, part in parts.items():

        def of(values: Sequence[float]) -> dict[str, Any]:
            return exact.mean([values[n] for n in known])

        other = selected(part["rows"], trained_on="other")
        sparsities = sorted({row["sparsity"] for row in other})
        found[arm] = {
            "kept, whole": of(part["whole"]["kept"]),
            "other, whole": of(part["whole"]["other"]),
            "kept without recovery, to": of(part["limits"]["before"]["unbroken"]),
            "kept with recovery, to": of(part["limits"]["after"]["largest"]),
            "zero_share": of(part["zero_share"]),
            "other after recovery": {
                str(s): exact.mean(by_place(selected(other, sparsity=s), "after", known))
                for s in sparsities
            },
            "longer": [longer(part, known, arm, s)
                       for s in sorted({row["sparsity"] for row in part["longer"]})],
        }  # fmt: skip
    return {"networks": len(known), "arms": found}


def longer(
    part: Mapping[str, Any], known: Sequence[int], arm: str, sparsity: float
) -> dict[str, Any]:
    """Samples until the other code is learned: cut networks beside fresh ones of their shape."""
    here = selected(part["longer"], sparsity=sparsity)
    cut, fresh = (by_place(selected(here, way=way), "samples_to_learn", known)
                  for way in (arm, "fresh"))  # fmt: skip
    pairs = [(a or math.inf, b or math.inf) for a, b in zip(cut, fresh, strict=True)]
    sooner, later = sum(a < b for a, b in pairs), sum(a > b for a, b in pairs)
    return {
        "sparsity": sparsity,
        **{way: {"learned": sum(s is not None for s in found), "of": len(found),
                 **exact.middle([s for s in found if s is not None])}
           for way, found in (("cut", cut), ("fresh", fresh))},
        "sooner": sooner, "later": later,
        "sign_test_p": exact.sign_test(sooner, sooner + later),
    }  # fmt: skip
