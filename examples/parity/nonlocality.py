"""Do skills have units of their own (figures 8 and 9)? Prices of every unit for every code.

The paper shows the prices of one network. Here is also what the eye cannot tell from the picture:
over all seeds, how alike the prices for two codes rank the units, for a composite with a subtask
of its own, with one of the other composite, and with the other composite itself, and how many of
the dearest units two codes share beside what chance would give.
"""

from typing import Any

import exact
import torch
from ablation import prices
from pruning import pretrained
from task import Code, layout

from llm_narrow.paper_toys import Place

TOP = 0.25  # of the units


def run(place: Place) -> dict[str, Any]:
    """Prices for all codes, and how alike they are."""
    setting, width = place.preset.pruning, place.preset.scores_width
    seeds = list(range(setting.seeds))
    part = place.part("scores", lambda: {"prices": all_prices(place, width)})
    pairs = {
        "composite and own subtask": [(setting.kept, (i,)) for i in setting.kept],
        "composite and strange subtask": [(setting.kept, (i,)) for i in setting.other],
        "two composites": [(setting.kept, setting.other)],
        "two subtasks": [((setting.kept[0],), (setting.other[0],))],
    }
    alike = {
        kind: [sum(correlations) / len(correlations) for correlations in (
            [exact.rank_correlation(*of(part["prices"], setting.codes, n, pair)) for pair in some]
            for n in seeds)]
        for kind, some in pairs.items()
    }  # fmt: skip
    shared = [shared_top(*of(part["prices"], setting.codes, n, (setting.kept, setting.other)))
              for n in seeds]  # fmt: skip
    return {
        "seeds": seeds,
        "outcomes": {"width": width, "codes": [list(c) for c in setting.codes],
                     "rank_correlations": alike, "shared_of_the_dearest": shared,
                     "prices": part["prices"][0]},
        "tests": [
            exact.tested("sign test, two-sided", exact.sign_test(sum(c > 0 for c in rows),
                                                                 len(rows)),
                         of=f"rank correlation above 0: {kind}", values=rows)
            for kind, rows in alike.items()
        ],
        "verdict_inputs": {
            "5 (figures 8 and 9)": {
                "claim": "prices of different codes overlap on the same units",
                "paper": "shown, not counted", "same_setting": place.name == "paper",
                "measured": {"rank correlation": {kind: exact.mean(rows)
                                                  for kind, rows in alike.items()},
                             "shared of the dearest": exact.mean(shared), "by chance": TOP},
            },
        },
    }  # fmt: skip


def all_prices(place: Place, width: int) -> list[list[list[float]]]:
    """By seed, by code, of all hidden units, first layer first; in nats, absolute."""
    setting = place.preset.pruning
    nets = pretrained(place, width)
    found = []
    for code in setting.codes:
        asked = layout(setting.task, [[code]], setting.score_samples, place.device)
        seeds = torch.arange(setting.seeds, device=place.device)
        price = prices(nets, asked, seeds, entries=place.preset.entries)
        found.append(torch.cat(price, dim=1).abs().cpu())
    return torch.stack(found, dim=1).tolist()


def of(
    found: list[list[list[float]]], codes: tuple[Code, ...], seed: int, pair: tuple[Code, Code]
) -> list[list[float]]:
    """The prices of one network for two codes."""
    return [found[seed][codes.index(code)] for code in pair]


def shared_top(one: list[float], two: list[float]) -> float:
    """The share of the dearest units for one code that are among the dearest for the other."""
    count = max(1, int(TOP * len(one)))
    top = [set(sorted(range(len(x)), key=lambda u, x=x: -x[u])[:count]) for x in (one, two)]
    return len(top[0] & top[1]) / count
