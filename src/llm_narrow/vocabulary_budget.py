"""How much of the vocabulary one budget buys: `prune --vocabulary-threshold auto`.

The vocabulary goes before units do, since all that follows works on the tokens that stay. So what
of it goes is settled first, at the same prices: units are priced in the model with all its tokens,
trimming at each threshold is carried out and measured, and the budget is spent over both from that
list, without measuring again on the way. The threshold that saves nearest to what was bought is
taken, and units are then priced anew in the trimmed model.
"""

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from . import beside, inputs, joint, pricing
from .beside import Beside
from .budget import Amounts
from .inputs import Inputs
from .progress import Track
from .purchases import Floors, Outside
from .recipe import Recipe
from .spend import spend
from .units import Scores

VOCABULARY: Beside = "vocabulary"


@dataclass(frozen=True)
class Settled:
    """The threshold that the budget buys, None where it buys no token, and what is told of it."""

    threshold: int | None
    facts: dict[str, Any]


def settled(
    recipe: Recipe, start: Inputs, scores: Scores, loaded: Amounts, *, console: Console,
    track: Track,
) -> Settled:  # fmt: skip
    """What `start`, which has its whole vocabulary and the scores given, is to lose of it.

    Raises TargetOutOfReach, and BadInput on several processes and for a vocabulary that cannot be
    trimmed.
    """
    joint.check_alone()
    p = recipe.prune
    wanted = joint.limits(recipe, start.loaded.model, loaded)
    kinds = (*p.chosen_kinds, *p.parts)
    console.print(f"Pricing the vocabulary beside {' and '.join(kinds)}")
    fit_tokens = min(pricing.FIT_TOKENS, recipe.score.tokens)
    ground = pricing.ground_of(start, recipe, fit_tokens=fit_tokens, track=track)
    blocks = inputs.calibration(start, recipe, track=track)
    options, refused = beside.options(
        start, recipe, ground, blocks, kinds=(VOCABULARY,), track=track
    )
    beside.check(refused)
    facts: dict[str, Any] = {"options": [option.facts() for option in options], "bought": 0.0}
    if not (options and wanted):
        return Settled(None, facts)
    prices = pricing.listed(start, ground, scores, kinds=kinds, track=track)
    points = [(option.saves.parameters, option.increase) for option in options]
    (spent,) = spend(
        prices, wanted, kinds=kinds, floors=Floors(layers=p.keep_layers or 1),
        outside=(Outside(VOCABULARY, tuple(points)),), multiple=p.multiple,
    )  # fmt: skip
    bought, expected = spent.outside.get(VOCABULARY, (0.0, 0.0))
    nearest = min([0.0, *(saved for saved, _ in points)], key=lambda saved: abs(saved - bought))
    facts |= {"bought": bought, "expected": expected}
    threshold = next((o.threshold for o in options if o.saves.parameters == nearest), None)
    return Settled(threshold, facts)
