"""One budget over all kinds of unit: `prune --allocation joint`.

Large units are priced by removing each of them really, neurons by score on curves that a few real
removals draw, and what is cheapest for what it saves goes first, with prices measured again on the
way. Widths come out uneven. The best of the models whose layers all have the same widths is
measured beside that, and taken where it is no farther from the whole model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console

from . import contrast, pricing, processes
from . import recipe as recipes
from .blocks import Blocks
from .budget import Amounts, amounts
from .decision import Decision, carry_out
from .depth import shortened
from .errors import BadInput, TargetOutOfReach
from .inputs import Inputs
from .plan import Plan
from .prices import Prices
from .progress import Track
from .purchases import Floors, Spent, Tried
from .recipe import Recipe
from .refit import RefitFacts
from .sections import target_bytes
from .spend import spend
from .spend_even import spend_even
from .units import Group, Keep, Scores


def limits(recipe: Recipe, model: Any, loaded: Amounts) -> dict[str, float]:
    """How much may be left of what, in the terms of `spend`; nothing where it is reached already.

    `loaded` is what the model had as it was loaded, with its whole vocabulary and all query heads:
    shares are of that. Raises TargetOutOfReach for more than it had.
    """
    p, now = recipe.prune, amounts(model)
    entry = next(model.parameters()).element_size()
    asked: dict[str, tuple[str, float]] = {}
    if (most := p.parameters_wanted(round(loaded.parameters), entry)) is not None:
        name = "target_params" if p.target_params is not None else "target_size"
        asked["parameters"] = name, float(most)
    if p.target_flops is not None:
        asked["flops"] = "target_flops", float(recipes.target(p.target_flops, round(loaded.flops)))
    if p.target_kv_cache is not None:
        most_cached = target_bytes(p.target_kv_cache, loaded.kv_bytes)
        asked["kv_bytes"] = "target_kv_cache", most_cached
    for resource, (name, value) in asked.items():
        has = getattr(loaded, resource)
        if value > has:
            raise TargetOutOfReach(
                f"{name} {value:,.0f} is above the {has:,.0f} that the model has. Ask for less, or "
                "leave the model as it is."
            )
    return {r: value for r, (_, value) in asked.items() if value < getattr(now, r)}


def check_alone() -> None:
    """Raise BadInput on several processes."""
    if processes.count() > 1:
        raise BadInput(
            "prune.allocation joint prices in one process. Start it without torchrun, or choose "
            "uniform or global."
        )


def planned(
    recipe: Recipe, start: Inputs, scores: Scores, wanted: Mapping[str, float], parameters: int,
    *, console: Console, track: Track,
) -> tuple[Plan, dict[str, Any]]:  # fmt: skip
    """What to remove of the recipe's kinds to keep the limits, and what is told of it.

    `parameters` are those of the model as it was loaded.

    Losses that were measured before are taken from the cache, so that the same call goes on after
    a stop. Raises TargetOutOfReach, and BadInput on several processes.
    """
    check_alone()
    p = recipe.prune
    kinds = (*p.chosen_kinds, *p.parts)
    console.print(f"Pricing {' and '.join(kinds)} by removing some of them")
    fit_tokens = min(pricing.FIT_TOKENS, recipe.score.tokens)
    ground = pricing.ground_of(start, recipe, fit_tokens=fit_tokens, track=track)
    prices = pricing.listed(start, ground, scores, kinds=kinds, track=track)
    on: Callable[[Decision], Tried] = ground.trials(start.loaded.model)
    measured = 0

    def trials(decision: Decision) -> Tried:
        nonlocal measured
        if measured:
            console.print(f"Round {measured}: refitting and measuring what is left so far")
        measured += 1
        return on(decision)

    floors = Floors(layers=p.keep_layers or 1)
    (spent,) = spend(
        prices, wanted, kinds=kinds, multiple=p.multiple, trials=trials, floors=floors
    )
    beside = _even(prices, wanted, kinds, p.multiple, floors, on, console)
    uneven = spent.divergence
    if beside is not None and _apart(beside) <= _apart(spent):
        spent = beside
        console.print("Even widths are no farther from the whole model, so they are taken")
    plan = pricing.plan_of(start, spent)
    entry = next(start.loaded.model.parameters()).element_size()
    plan = replace(plan, parameters_before=parameters, bytes_before=parameters * entry)
    facts = spent.facts()
    correlation = prices.facts()["correlation_of_scores"]
    return plan, {
        **facts, "wanted": dict(wanted), "even": spent is beside,
        "divergence_of_uneven": uneven,
        "divergence_of_even": None if beside is None else beside.divergence,
        "tokens": prices.targets,
        "correlation_of_scores": correlation,
    }  # fmt: skip


def _even(
    prices: Prices, wanted: Mapping[str, float], kinds: Sequence[str], multiple: int,
    floors: Floors, trials: Callable[[Decision], Tried], console: Console,
) -> Spent | None:  # fmt: skip
    """The best even model within the limits, measured; None where none keeps them."""

    def told(decision: Decision) -> Tried:
        console.print("Even widths beside it: refitting and measuring")
        return trials(decision)

    try:
        return spend_even(
            prices, wanted, kinds=kinds, floors=floors, multiple=multiple, trials=told
        )
    except TargetOutOfReach:
        return None


def _apart(spent: Spent) -> float:
    assert spent.divergence is not None  # with trials it is measured
    return spent.divergence


def carried_out(
    recipe: Recipe, start: Inputs, blocks: Blocks, plan: Plan, *, refit: bool, track: Track
) -> tuple[tuple[Group, ...], Keep, Any, RefitFacts | None]:
    """Take layers and halves of layers out of the model, in place, and units, refitted.

    Gives what `checkpoint.save` wants: groups, what of them is kept, and the config of before,
    all of the model without the layers that go.
    """
    assert plan.layers is not None
    model = start.loaded.model
    config = shortened(model.config, plan.layers)
    groups, keep, fitted = carry_out(
        model, Decision(plan.layers, dict(plan.keep)), blocks.batches(recipe.blocks.batch_size),
        damping=recipe.prune.damping, sequential=recipe.prune.refit == "sequential", refit=refit,
        dtype=torch.bfloat16 if start.bf16 else None,
        against=contrast.against(start, recipe, track=track) if refit else None, track=track,
    )  # fmt: skip
    return groups, keep, config, fitted
