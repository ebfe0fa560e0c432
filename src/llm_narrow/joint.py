"""One budget over all kinds of unit: `prune --allocation joint`.

Large units are priced by removing each of them really, neurons by score on curves that a few real
removals draw, and what is cheapest for what it saves goes first, with prices measured again on the
way. Widths come out uneven.
"""

from dataclasses import replace
from typing import Any

from rich.console import Console

from . import pricing, processes
from . import recipe as recipes
from .decision import Decision
from .errors import BadInput
from .inputs import Inputs
from .plan import Plan
from .progress import Track
from .purchases import Tried
from .recipe import Recipe
from .scoring import Scored
from .spend import spend


def wanted(recipe: Recipe, parameters: int) -> int:
    """How many parameters the recipe asks for, of a model that had so many when it was loaded."""
    assert recipe.prune.target_params is not None
    return recipes.target(recipe.prune.target_params, parameters)


def planned(
    recipe: Recipe, start: Inputs, scored: Scored, parameters: int, *, console: Console,
    track: Track,
) -> tuple[Plan, dict[str, Any]]:  # fmt: skip
    """What to remove of the recipe's kinds for the size that it asks for, and what is told of it.

    `parameters` are those of the model as it was loaded.

    Losses that were measured before are taken from the cache, so that the same call goes on after
    a stop. Raises TargetOutOfReach, and BadInput on several processes.
    """
    if processes.count() > 1:
        raise BadInput(
            "prune.allocation joint prices in one process. Start it without torchrun, or choose "
            "uniform or global."
        )
    p = recipe.prune
    target = wanted(recipe, parameters)
    console.print(f"Pricing {' and '.join(p.chosen_kinds)} by removing some of them")
    fit_tokens = min(pricing.FIT_TOKENS, recipe.score.tokens)
    ground = pricing.ground_of(start, recipe, fit_tokens=fit_tokens, track=track)
    prices = pricing.listed(start, ground, scored.scores, kinds=p.chosen_kinds, track=track)
    measured = 0

    def trials(decision: Decision) -> Tried:
        nonlocal measured
        if measured:
            console.print(f"Round {measured}: refitting and measuring what is left so far")
        measured += 1
        tried: Tried = ground.trials(start.loaded.model)(decision)
        return tried

    (spent,) = spend(
        prices, {"parameters": float(target)}, kinds=p.chosen_kinds, multiple=p.multiple,
        trials=trials,
    )  # fmt: skip
    plan = pricing.plan_of(start, spent)
    entry = next(start.loaded.model.parameters()).element_size()
    plan = replace(plan, parameters_before=parameters, bytes_before=parameters * entry)
    facts = spent.facts()
    correlation = prices.facts()["correlation_of_scores"]
    return plan, {**facts, "tokens": prices.targets, "correlation_of_scores": correlation}
